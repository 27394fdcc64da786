#!/usr/bin/env bash
# Train REG, REPA or SiT:   bash train.sh xl|l|b|t2i|toy|toy-t2i [any flag of train.py]
# The same command resumes. A later flag wins: every value below can be changed from the command line.
#
# Environment:  METHOD=reg|repa|sit   DATA_DIR   OUTPUT_DIR   REPORT_TO=none|wandb|tensorboard   PYTHON=python
#               NUM_GPUS   GPUs per node, default all; without a GPU the number of CPU processes, default 1
#               NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes; default: Slurm's, one task per node (srun)
#               REQUEUE=1  after SIGTERM or SIGUSR1, requeue the Slurm job
#
# SIGTERM, SIGUSR1, SIGHUP and Ctrl-C finish the step, write a checkpoint and exit with status 75; a second signal kills.
# Relative paths start at this folder. Several nodes need OUTPUT_DIR on a shared disk.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"                  # `sh train.sh`
set -euo pipefail
cd "$(dirname "$0")"
[ -f train.py ] || cd "${SLURM_SUBMIT_DIR:-$OLDPWD}"              # sbatch runs a copy in a folder of its own
[ -f train.py ] || { echo "error: $PWD: holds no train.py; submit train.sh from its own folder" >&2; exit 2; }

RECIPE=${1:-}; shift || true
for flag in "$RECIPE" "$@"; do
    case "$flag" in
        -h|--help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' train.sh; exit 0 ;;
        --method|--method=*) echo "error: $flag: the run would have another method's name; set METHOD=reg|repa|sit" >&2; exit 2 ;;
    esac
done
METHOD=${METHOD:-reg}
PYTHON=${PYTHON:-python}

imagenet=(                                  # the paper's recipe; 400,000 steps of 256 images = 80 epochs
    --data-dir "${DATA_DIR:-data/imagenet256}"
    --enc-type dinov2-vit-b                 # repa and reg: the class token and the alignment target
    --proj-coeff 0.5 --cls 0.03             # lambda and beta of the objective
    --projector-dim 2048
    --batch-size 256 --gradient-accumulation-steps 1 --max-train-steps 400000
    --learning-rate 1e-4 --adam-beta1 0.9 --adam-beta2 0.999 --adam-epsilon 1e-8 --adam-weight-decay 0
    --max-grad-norm 1.0 --ema-decay 0.9999
    --path-type linear --weighting uniform --cfg-prob 0.1
    --seed 0 --num-workers 4
    --logging-steps 100 --checkpointing-steps 50000 --sampling-steps 10000
)                                           # precision: bf16 autocast where CUDA has it, losses and norms in float32

case "$RECIPE" in
    # FID-50K without guidance at 400K steps, ImageNet 256: REG / REPA / SiT. (Guided, XL: 1.86 at 400K steps, 1.36 at 4M.)
    xl)  recipe=("${imagenet[@]}" --model SiT-XL/2 --encoder-depth 8) ;;      #  3.4 /  7.9 / 17.2
    l)   recipe=("${imagenet[@]}" --model SiT-L/2 --encoder-depth 8) ;;       #  4.6 /  9.7 / 18.8
    b)   recipe=("${imagenet[@]}" --model SiT-B/2 --encoder-depth 4) ;;       # 15.2 / 24.4 / 33.0
    # FID on COCO 2014, 256 px, guidance 2, SDE 250: MMDiT 5.30, with REPA 4.14 (published); REG on captions: ours alone, not run.
    t2i) recipe=("${imagenet[@]}" --data-dir "${DATA_DIR:-data/coco256}" --model MMDiT/2 --encoder-depth 8
                 --text-encoder openai/clip-vit-large-patch14 --max-train-steps 150000) ;;
    # 32 px shapes in 16 classes, 2 CPU cores: see README.md for what to expect.
    toy) recipe=(
        --data-dir "${DATA_DIR:-data/toy}"
        --model SiT-T/2 --encoder-depth 4
        --enc-type local-dir:toy/networks/encoder
        --proj-coeff 0.5 --cls 0.03
        --projector-dim 256
        --batch-size 64 --max-train-steps 3000
        --learning-rate 1e-3 --adam-weight-decay 0 --max-grad-norm 1.0 --ema-decay 0.998
        --path-type linear --weighting uniform --cfg-prob 0.1
        --logging-steps 100 --checkpointing-steps 1000 --sampling-steps 1000
        --num-workers 1
    ) ;;
    # The same from captions: see docs/text-to-image.md for what to expect.
    toy-t2i) recipe=(
        --data-dir "${DATA_DIR:-data/toy-t2i}"
        --model MMDiT-T/2 --encoder-depth 4 --text-encoder toy/networks/clip
        --enc-type local-dir:toy/networks/encoder
        --proj-coeff 0.5 --cls 0.03
        --projector-dim 256
        --batch-size 32 --max-train-steps 2200
        --learning-rate 4e-3 --adam-weight-decay 0 --max-grad-norm 1.0 --ema-decay 0.995
        --path-type linear --weighting uniform --cfg-prob 0.1
        --logging-steps 100 --checkpointing-steps 500 --sampling-steps 500
        --num-workers 1
    ) ;;
    *) echo "error: unknown recipe '$RECIPE': bash train.sh xl|l|b|t2i|toy|toy-t2i [flags of train.py]" >&2; exit 2 ;;
esac

"$PYTHON" -c 'from importlib.util import find_spec as f; import sys; sys.exit(not all(map(f, ("torch", "accelerate", "timm"))))' 2>/dev/null || {
    echo "error: $PYTHON lacks torch, accelerate or timm: pip install -r requirements.txt, or set PYTHON" >&2; exit 2
}
exec "$PYTHON" -m runtime.launch train.py "${recipe[@]}" --method "$METHOD" --exp-name "$METHOD-$RECIPE" \
    --output-dir "${OUTPUT_DIR:-exps}" --report-to "${REPORT_TO:-none}" "$@"
