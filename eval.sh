#!/usr/bin/env bash
# Sample an experiment and score it:   REF_BATCH=reference.npz bash eval.sh EXP_DIR [flags of generate.py and of scoring]
# Several values with commas make a sweep:   bash eval.sh EXP_DIR --cfg-scale 1,1.8,2.3 --guidance-high 0.75,0.85,1 --steps 200000,400000
# Leaves EXP_DIR/samples/<settings>/{images/, samples.npz, grid.png, settings.json, metrics.json}, and in EXP_DIR/samples/ a table of
# all that was scored there (sweep.csv, sweep.json) with the best marked, and a plot (sweep.png). The same command makes what is missing.
#
# Flags:        bash eval.sh EXP_DIR --help: what takes several values, and scoring.   python generate.py --help: all of sampling
# Environment:  REF_BATCH           reference .npz or image folder, e.g. ADM's VIRTUAL_imagenet256_labeled.npz
#               FEATURES            inception (FID, the default), dinov2, or local-dir:FOLDER (a Frechet distance in that network)
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
"$PYTHON" -c 'import torch, accelerate, timm, diffusers, matplotlib' 2>/dev/null || {
    echo "error: $PYTHON lacks torch, accelerate, timm, diffusers or matplotlib: pip install -r requirements.txt, or set PYTHON" >&2; exit 2
}

# The published guided setting; unguided rows are --cfg-scale 1. A later flag wins.
# The network samples in TF32 on a GPU and in float32 without one; the solver's state is float64.
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())')
exec "$PYTHON" -m evaluations.sweep "$EXP_DIR" --num-fid-samples 50000 \
    --mode sde --num-steps 250 --cfg-scale 2.3 --guidance-low 0 --guidance-high 0.85 \
    --labels random --global-seed 0 --precision "$([ "$GPU" = True ] && echo tf32 || echo fp32)" "$@"
