#!/usr/bin/env bash
# Draw the toy data set, and prepare it with the same commands as ImageNet.
#   bash toy/prepare.sh DATA_DIR RESOLUTION NUM_IMAGES
#   CAPTIONS=training bash toy/prepare.sh DATA_DIR RESOLUTION NUM_IMAGES     scenes with captions instead of classes
# What is complete is kept. `reference.npz` is another draw of the same kind, to compare samples with.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=$1 RESOLUTION=$2 NUM_IMAGES=$3
PYTHON=${PYTHON:-python}

draw() { "$PYTHON" -m toy.draw --resolution "$RESOLUTION" ${CAPTIONS:+--captions "$CAPTIONS"} "$@"; }
[ -d "$DATA/raw" ] || draw --dest "$DATA/raw" --num-images "$NUM_IMAGES" --seed 0
[ -f "$DATA/reference.npz" ] || draw --npz "$DATA/reference.npz" --num-images 2048 --seed 1

"$PYTHON" -m preprocessing.dataset_tools convert --source "$DATA/raw" --dest "$DATA/images" \
    --resolution="${RESOLUTION}x$RESOLUTION" --transform=center-crop-dhariwal
"$PYTHON" -m preprocessing.dataset_tools encode --source "$DATA/images" --dest "$DATA/vae-sd" --model-url toy/networks/vae
"$PYTHON" -m preprocessing.dataset_tools check --source "$DATA" --output "$DATA/check.png"
