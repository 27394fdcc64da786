#!/usr/bin/env bash
# Sample an experiment and score it:   REF_BATCH=reference.npz bash eval.sh EXP_DIR [any flag of generate.py]
# Leaves EXP_DIR/samples/<settings>/{images/, samples.npz, grid.png, settings.json, metrics.json}.
#
# Environment:  REF_BATCH           reference .npz or image folder, e.g. ADM's VIRTUAL_imagenet256_labeled.npz
#               FEATURES            inception (FID, the default) or local-dir:FOLDER (a Frechet distance in that network)
#               INCEPTION_WEIGHTS   file with the 2015 Inception weights, instead of cache and download
#               NUM_GPUS            default all; on a machine without one it counts CPU processes, default 1      PYTHON=python
set -euo pipefail
cd "$(dirname "$0")"

EXP_DIR=${1:-}; shift || true
PYTHON=${PYTHON:-python}
if [ -z "$EXP_DIR" ]; then
    echo "error: no experiment named: bash eval.sh EXP_DIR [flags of generate.py]" >&2; exit 2
fi
if [ -n "${REF_BATCH:-}" ] && [ ! -e "$REF_BATCH" ]; then
    echo "error: no reference at REF_BATCH=$REF_BATCH: name an .npz or an image folder" >&2; exit 2
fi

GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || {
    echo "error: $PYTHON has no torch: pip install -r requirements.txt, or set PYTHON" >&2; exit 2
}
NUM_GPUS=${NUM_GPUS:-$((GPUS > 0 ? GPUS : 1))}
PRECISION=tf32                              # of the network while sampling; the solver's state is float64
if [ "$GPUS" -eq 0 ]; then
    PRECISION=fp32
    export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + NUM_GPUS - 1) / NUM_GPUS ))}
fi

# The published guided setting; unguided rows are --cfg-scale 1. A later flag wins.
command=(generate.py --ckpt "$EXP_DIR" --num-fid-samples 50000
         --mode sde --num-steps 250 --cfg-scale 2.3 --guidance-low 0 --guidance-high 0.85
         --labels random --global-seed 0 --precision "$PRECISION" "$@")
if [ "$NUM_GPUS" -gt 1 ]; then
    SAMPLES=$("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" "${command[@]}" | tail -n 1)
else
    SAMPLES=$("$PYTHON" "${command[@]}" | tail -n 1)
fi

if [ -z "${REF_BATCH:-}" ]; then
    echo "error: the samples are in $SAMPLES, but cannot be scored without a reference: set REF_BATCH to an .npz or an image folder" >&2; exit 2
fi
"$PYTHON" -m evaluations.evaluator --ref-batch "$REF_BATCH" --sample-batch "$SAMPLES" --features "${FEATURES:-inception}" \
    ${INCEPTION_WEIGHTS:+--inception-weights "$INCEPTION_WEIGHTS"} --output "$(dirname "$SAMPLES")/metrics.json"
echo "grid: $(dirname "$SAMPLES")/grid.png"
echo "metrics: $(dirname "$SAMPLES")/metrics.json"
