#!/usr/bin/env bash
# Sample an experiment and score the samples:   REF_BATCH=reference.npz bash eval.sh EXP_DIR [flags]
# Several values with commas make a sweep:      bash eval.sh EXP_DIR --cfg-scale 1,1.8,2.3 --steps 200000,400000
# Writes EXP_DIR/samples/<settings>/{images/, samples.npz, grid.png, settings.json, metrics.json}, and in
# EXP_DIR/samples/ a table (sweep.csv, sweep.json) and a plot (sweep.png) of everything scored there.
# The same command makes only what is missing.
#
# Flags:        bash eval.sh EXP_DIR --help: scoring, and flags that take several values
#               python generate.py --help: sampling
# Environment:  REF_BATCH           reference .npz or image folder, or several with commas,
#                                   e.g. ADM's VIRTUAL_imagenet256_labeled.npz
#               FEATURES            inception (FID, the default), dinov2, or local-dir:FOLDER (a Frechet distance there)
#               CLIP                hub id or folder: also the CLIP score, for models of captions
#               INCEPTION_WEIGHTS   file with the 2015 Inception weights, instead of cache and download
#               NUM_GPUS            default all; without a GPU the number of CPU processes, default 1
#               PYTHON              default python
# Relative paths start at the folder of this script.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"                  # `sh eval.sh`
set -euo pipefail
cd "$(dirname "$0")"
[ -f generate.py ] || cd "${SLURM_SUBMIT_DIR:-$OLDPWD}"              # sbatch runs a copy in a folder of its own
[ -f generate.py ] || { echo "error: $PWD: holds no generate.py; submit eval.sh from its own folder" >&2; exit 2; }

EXP_DIR=${1:-}; shift || true
PYTHON=${PYTHON:-python}
case "$EXP_DIR" in
    -h|--help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' eval.sh; exit 0 ;;
    ""|-*) echo "error: no experiment named: bash eval.sh EXP_DIR [flags of generate.py]" >&2; exit 2 ;;
esac
# generate.py's defaults are the published guided setting: SDE 250; class labels: scale 2.3 up to t = 0.85, 50,000 images;
# captions: scale 2 at all t, 30,000 images. --cfg-scale 1 is unguided. The network computes in TF32 on a GPU, else in float32.
"$PYTHON" -c 'from importlib.util import find_spec as f; import sys
sys.exit(not all(map(f, ("torch", "accelerate", "timm", "diffusers", "matplotlib"))))' 2>/dev/null || {
    echo "error: $PYTHON lacks torch, accelerate, timm, diffusers or matplotlib:" \
        "pip install -r requirements.txt, or set PYTHON" >&2
    exit 2
}
exec "$PYTHON" -m evaluations.sweep "$EXP_DIR" "$@"
