#!/usr/bin/env bash
# Draw a labelled image folder as any other, and prepare it as ImageNet is, at 256x256, with the same commands.
#   bash toy/prepare.sh DATA_DIR RESOLUTION NUM_IMAGES
# What is whole is kept. `reference.npz` is a fresh draw of the same kind, to compare samples with.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=$1 RESOLUTION=$2 NUM_IMAGES=$3
PYTHON=${PYTHON:-python}

[ -d "$DATA/raw" ] || "$PYTHON" -m toy.draw --dest "$DATA/raw" --num-images "$NUM_IMAGES" --seed 0 --resolution "$RESOLUTION"
[ -f "$DATA/reference.npz" ] || "$PYTHON" -m toy.draw --npz "$DATA/reference.npz" --num-images 2048 --seed 1 --resolution "$RESOLUTION"

"$PYTHON" -m preprocessing.dataset_tools convert --source "$DATA/raw" --dest "$DATA/images" --resolution="${RESOLUTION}x$RESOLUTION" \
    --transform=center-crop-dhariwal
"$PYTHON" -m preprocessing.dataset_tools encode --source "$DATA/images" --dest "$DATA/vae-sd" --model-url toy/networks/vae
"$PYTHON" -m preprocessing.dataset_tools check --source "$DATA" --output "$DATA/check.png"
