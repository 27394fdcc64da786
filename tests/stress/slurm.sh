#!/usr/bin/env bash
# Preempt and requeue a two-node training job under a real Slurm, and compare it with an undisturbed one.
#   PYTHON=python STEPS=400 DELAY=60 bash tests/stress/slurm.sh        by hand, about seven minutes on two quiet cores
# DELAY: seconds after each start at which Slurm sends SIGUSR1, or up to 30 earlier; longer than a start takes.
# Needs root, apt-get install slurm-wlm munge, and a line `127.0.0.1 n1 n2` in /etc/hosts.
# Starts munged, slurmctld and two slurmd on loopback, below one temporary folder, and ends them.
# Exit status 1 if the job was requeued less than twice, or if weights or losses differ in one bit.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python} STEPS=${STEPS:-400} DELAY=${DELAY:-60}
export PYTHON
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
getent hosts n1 n2 >/dev/null || { echo "error: n1, n2: unknown; add '127.0.0.1 n1 n2' to /etc/hosts" >&2; exit 2; }
T=$(mktemp -d)
daemons=()
stop() {
    scancel --quiet --user=root 2>/dev/null || true
    for _ in $(seq 90); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep 1; done  # slurmd waits for jobs
    for pid in $(printf '%s\n' "${daemons[@]}" | tac); do kill "$pid" 2>/dev/null || true; done
    wait
    rm -rf "$T"
}
trap stop EXIT

export SLURM_CONF=$T/slurm.conf
cat > "$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=17000
SlurmctldPidFile=$T/slurmctld.pid
SlurmdPidFile=$T/slurmd-%n.pid
SlurmdSpoolDir=$T/spool-%n
StateSaveLocation=$T/state
AuthType=auth/munge
AuthInfo=socket=$T/munge.sock,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
JobRequeue=1
NodeName=n[1-2] NodeAddr=127.0.0.1 Port=[17001-17002]
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=60
CONF
mkdir "$T/state"
chmod 755 "$T"                                                    # munged refuses a folder that others may write
head -c 1024 /dev/urandom > "$T/munge.key"
chmod 600 "$T/munge.key"
munged --foreground --force --socket "$T/munge.sock" --key-file "$T/munge.key" --pid-file "$T/munged.pid" \
    --log-file "$T/munged.log" --seed-file "$T/munged.seed" >"$T/munged.out" 2>&1 & daemons+=($!)
until [ -S "$T/munge.sock" ]; do sleep 0.2; done
slurmctld -D >"$T/slurmctld.log" 2>&1 & daemons+=($!)
for node in n1 n2; do slurmd -D -N $node >"$T/slurmd-$node.log" 2>&1 & daemons+=($!); done
for _ in $(seq 60); do [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && break; sleep 1; done
sinfo --noheader | grep -q idle || { cat "$T"/*.log >&2; exit 1; }

bash toy/prepare.sh "$T/data" 32 512 >"$T/prepare.log" 2>&1
cat > "$T/job.sh" <<'JOB'
#!/usr/bin/env bash
srun nice bash train.sh toy --batch-size 16 --logging-steps 1 --sampling-steps 0 --max-train-steps "$STEPS"
JOB
ended() {   # ended JOB: wait until it has ended, requeues included
    until squeue --noheader --states=all --jobs="$1" --format=%t | grep -qx 'CD\|F\|TO\|CA'; do sleep 1; done
}
submit() {  # submit NAME [flags of sbatch]
    local name=$1; shift
    ended "$(DATA_DIR="$T/data" OUTPUT_DIR="$T/$name" STEPS=$STEPS sbatch --parsable --nodes=2 --ntasks-per-node=1 \
        --open-mode=append --output="$T/$name.log" "$@" "$T/job.sh")"
}
# train.sh itself: Slurm runs its own copy, outside the project's folder, and signals it with --batch.
job=$(REQUEUE=1 sbatch --parsable --nodes=1 --requeue --open-mode=append --output="$T/batch.log" train.sh toy \
    --data-dir "$T/data" --output-dir "$T/batch" --batch-size 16 --logging-steps 1 --sampling-steps 0 --max-train-steps 60)
for _ in $(seq 120); do grep -q '^step      10' "$T/batch.log" 2>/dev/null && break; sleep 0.5; done
scancel --batch --signal=USR1 "$job"
ended "$job"
grep -q 'stopped by SIGUSR1' "$T/batch.log" && grep -q '^saved .*/0000060.pt' "$T/batch.log" || {
    cat "$T/batch.log" >&2; exit 1
}
REQUEUE=1 submit disturbed --requeue --time=5 --signal=USR1@$((300 - DELAY))
submit straight --time=60

"$PYTHON" - "$T" "$STEPS" <<'COMPARE' || { tail -n 40 "$T"/{disturbed,straight,slurmctld}.log >&2; exit 1; }
import json, re, sys
from pathlib import Path
import torch
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
log = (folder / "disturbed.log").read_text()
stopped = [int(step) for step in re.findall(r"stopped by SIGUSR1 after step (\d+)", log)]
resumed = [int(step) for step in re.findall(r"resumed .* at step (\d+)", log)]
resumed = [step for step in resumed if step < steps]              # a signal may find the run at its end
lost = sum(stopped) - sum(resumed)
runs = [folder / name / "reg-toy" for name in ("disturbed", "straight")]
states = [torch.load(run / "checkpoints" / f"{steps:07d}.pt", weights_only=True) for run in runs]
weights = all(torch.equal(states[0][part][name], value)
              for part in ("model", "ema") for name, value in states[1][part].items())
lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
def timeless(line):
    return {name: value for name, value in line.items() if not re.search("second|wait|time|memory|gib", name, re.I)}
losses = [list(map(timeless, part)) for part in lines]
same = losses[0] == losses[1]
print(f"{len(resumed)} requeues after steps {stopped}, {lost} steps lost, weights {'equal' if weights else 'DIFFER'}, "
      f"{len(lines[0])} log lines {'equal' if same else 'DIFFER'}")
sys.exit(not (weights and same and lost == 0 and len(resumed) >= 2 and len(losses[1]) == steps))
COMPARE
