#!/usr/bin/env bash
# The whole path at a small scale, from drawn images to scored samples: what `make toy` runs.
#   bash toy/run.sh                  in an environment with requirements.txt installed
# The same command continues after an interruption; `rm -rf data/toy exps/reg-toy` starts again.
#
# Environment:  METHOD=reg|repa|sit   PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-python} NUM_GPUS=1
export DATA_DIR=data/toy OUTPUT_DIR=exps
DATA=$DATA_DIR
EXP=exps/${METHOD:-reg}-toy                 # the experiment folder of `train.sh toy`

# 1. Draw a data set, crop and resize it, encode it with the toy's VAE.
bash toy/prepare.sh $DATA 32 8192

# 2. Train.
bash train.sh toy

# 3. Sample and score, with fewer images and steps than for a paper. The distance is in the toy's own features: no FID.
#    On a CPU by two processes of one thread: the images are the same for any number of processes.
NUM_GPUS=$("$PYTHON" -c 'import os, torch; print(1 if torch.cuda.is_available() else min(os.cpu_count(), 2))')
SCORED=$(REF_BATCH=$DATA/reference.npz FEATURES=local-dir:toy/networks/features \
    bash eval.sh "$EXP" --num-fid-samples 1024 --num-steps 100)
echo "$SCORED"

# 4. Do the samples show the class that was asked for?
SAMPLES=$(dirname "$(sed -n 's/^metrics: //p' <<< "$SCORED")")
"$PYTHON" -m toy.agreement "$SAMPLES/samples.npz"
echo "samples: $SAMPLES/grid.png"
