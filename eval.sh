#!/usr/bin/env bash
# Sample an experiment and score it:   REF_BATCH=reference.npz bash eval.sh EXP_DIR [any flag of generate.py]
# Leaves EXP_DIR/samples/<settings>/{images/, samples.npz, grid.png, settings.json, metrics.json}.
#
# Environment:  REF_BATCH           reference .npz or image folder, e.g. ADM's VIRTUAL_imagenet256_labeled.npz
#               FEATURES            inception (FID, the default) or local-dir:FOLDER (a Frechet distance in that network)
#               INCEPTION_WEIGHTS   file with the 2015 Inception weights, instead of cache and download
#               NUM_GPUS            default all; on a machine without one it counts CPU processes, default 1      PYTHON=python
# Relative paths start at this folder.
set -euo pipefail
cd "$(dirname "$0")"

EXP_DIR=${1:-}; shift || true
PYTHON=${PYTHON:-python}
case "$EXP_DIR" in
    -h|--help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' eval.sh; exit 0 ;;
    ""|-*) echo "error: no experiment named: bash eval.sh EXP_DIR [flags of generate.py]" >&2; exit 2 ;;
esac
"$PYTHON" -c 'import torch, accelerate, timm, diffusers' 2>/dev/null || {
    echo "error: $PYTHON lacks torch, accelerate, timm or diffusers: pip install -r requirements.txt, or set PYTHON" >&2; exit 2
}
scoring=(evaluations.evaluator --ref-batch "${REF_BATCH:-}" --features "${FEATURES:-inception}"
         ${INCEPTION_WEIGHTS:+--inception-weights "$INCEPTION_WEIGHTS"})
if [ -n "${REF_BATCH:-}" ]; then            # what scoring lacks is said before the images are made
    "$PYTHON" -m "${scoring[@]}" --dry-run
fi

# The published guided setting; unguided rows are --cfg-scale 1. A later flag wins.
# The network samples in TF32 on a GPU and in float32 without one; the solver's state is float64.
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())')
SAMPLES=$("$PYTHON" -m models.processes generate.py --ckpt "$EXP_DIR" --num-fid-samples 50000 \
         --mode sde --num-steps 250 --cfg-scale 2.3 --guidance-low 0 --guidance-high 0.85 \
         --labels random --global-seed 0 --precision "$([ "$GPU" = True ] && echo tf32 || echo fp32)" "$@" | tail -n 1)
if [ ! -f "$SAMPLES" ]; then
    exit 0                                  # --help: nothing was made
fi

if [ -z "${REF_BATCH:-}" ]; then
    echo "error: the samples are in $SAMPLES, but cannot be scored without a reference: set REF_BATCH to an .npz or an image folder," \
         "or score these: python -m evaluations.evaluator --ref-batch REF --sample-batch $SAMPLES" >&2; exit 2
fi
OUT=$(dirname "$SAMPLES")
"$PYTHON" -m "${scoring[@]}" --sample-batch "$SAMPLES" --output "$OUT/metrics.json"
echo "grid: $OUT/grid.png"
echo "metrics: $OUT/metrics.json"
