#!/usr/bin/env bash
# SiT, REPA and REG side by side on the toy: steps to the same distance. What `make compare` runs; RESULTS.md is what it found.
#   bash toy/compare.sh --scale cpu                  an hour at most on two cores
#   bash toy/compare.sh --scale gpu --minutes 30     64 px, pieces of some minutes on one GPU; what did not fit is reported as not run
# The same command goes on after an interruption, and after --minutes. Data in data/toy or data/toy64, results in exps/compare-SCALE.
#
# Environment:  PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python}

SCALE=cpu
for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = --scale ]; then next=$((i + 1)); SCALE=${!next}; fi
done
case "$SCALE" in
    cpu) DATA=data/toy RESOLUTION=32 NUM_IMAGES=8192 ;;
    gpu) DATA=data/toy64 RESOLUTION=64 NUM_IMAGES=32768 ;;
    *) echo "error: --scale $SCALE: expected cpu or gpu" >&2; exit 2 ;;
esac

bash toy/prepare.sh $DATA $RESOLUTION $NUM_IMAGES
# Every piece aligns to the same features: the encoder looks at each image once.
"$PYTHON" -m preprocessing.dataset_tools encode --source $DATA/images --dest $DATA/features-local-dir-toy-networks-encoder \
    --enc-type local-dir:toy/networks/encoder
exec "$PYTHON" -m toy.compare --data-dir $DATA --output exps/compare-$SCALE "$@"
