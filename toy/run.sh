#!/usr/bin/env bash
# The whole path on a small scale, from nothing to a scored grid of pictures: what `make toy` runs.
#   bash toy/run.sh                  in an environment with requirements.txt installed
# The same command goes on after an interruption; `rm -rf data/toy exps/reg-toy` starts afresh.
#
# Environment:  METHOD=reg|repa|sit   PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-python} NUM_GPUS=1
export DATA_DIR=data/toy OUTPUT_DIR=exps
DATA=$DATA_DIR
EXP=exps/${METHOD:-reg}-toy                 # where `train.sh toy` puts its run

# 1. Draw a labelled image folder as any other, and a fresh draw of the same kind to compare samples with.
[ -d $DATA/raw ] || "$PYTHON" -m toy.draw --dest $DATA/raw --num-images 8192 --seed 0
[ -f $DATA/reference.npz ] || "$PYTHON" -m toy.draw --npz $DATA/reference.npz --num-images 2048 --seed 1

# 2. Prepare it: crop and resize, then encode with the toy's VAE. ImageNet takes the same commands at 256x256.
"$PYTHON" -m preprocessing.dataset_tools convert --source $DATA/raw --dest $DATA/images --resolution=32x32 --transform=center-crop-dhariwal
"$PYTHON" -m preprocessing.dataset_tools encode --source $DATA/images --dest $DATA/vae-sd --model-url toy/networks/vae
"$PYTHON" -m preprocessing.dataset_tools check --source $DATA --output $DATA/check.png

# 3. Train.
bash train.sh toy

# 4. Sample and score, with fewer images and steps than for a paper. The distance is in the toy's own features: it is no FID.
#    On a CPU by two processes of one thread: the images are the same for any number of processes.
NUM_GPUS=$("$PYTHON" -c 'import os, torch; print(1 if torch.cuda.is_available() else min(os.cpu_count(), 2))')
SCORED=$(REF_BATCH=$DATA/reference.npz FEATURES=local-dir:toy/networks/features bash eval.sh "$EXP" --num-fid-samples 1024 --num-steps 100)
echo "$SCORED"

# 5. Do the samples show the class that was asked for?
SAMPLES=$(dirname "$(sed -n 's/^metrics: //p' <<< "$SCORED")")
"$PYTHON" -m toy.agreement "$SAMPLES/samples.npz"
echo "look at the picture: $SAMPLES/grid.png"
