#!/usr/bin/env bash
# Text to image at a small scale, from drawn pictures with captions to scored samples: what `make toy-t2i` runs.
#   bash toy/run-t2i.sh              in an environment with requirements.txt installed
# The same command continues after an interruption; `rm -rf data/toy-t2i exps/reg-toy-t2i` starts again.
#
# Environment:  METHOD=reg|repa|sit   PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-python} NUM_GPUS=1
export DATA_DIR=data/toy-t2i OUTPUT_DIR=exps
DATA=$DATA_DIR
EXP=exps/${METHOD:-reg}-toy-t2i             # the experiment folder of `train.sh toy-t2i`
IMAGES=256

# 1. Draw a data set with captions; crop, resize and encode it. Prompts: captions like training's of another draw
#    (reference.txt), in phrasings that training never sees, and of combinations that it never sees.
CAPTIONS=training bash toy/prepare.sh $DATA 32 8192
for KIND in phrasings combinations; do
    [ -f $DATA/$KIND.txt ] || "$PYTHON" -m toy.draw --npz $DATA/$KIND.npz --captions $KIND --num-images $IMAGES --seed 1
done

# 2. Train; on a CPU by two processes of one thread, which was faster than one of two.
NUM_GPUS=$("$PYTHON" -c 'import os, torch; print(1 if torch.cuda.is_available() else min(os.cpu_count(), 2))')
bash train.sh toy-t2i

# 3. Sample and score. The distance to the drawings of the same prompts is in the toy's own features: no FID.
MADE=() NAMES=
for KIND in reference phrasings combinations; do
    echo "== prompts: $KIND"
    SCORED=$(REF_BATCH=$DATA/$KIND.npz FEATURES=local-dir:toy/networks/features bash eval.sh "$EXP" \
        --prompts $DATA/$KIND.txt --num-fid-samples $IMAGES --mode ode --num-steps 25 --cfg-scale 4 --clip toy/networks/clip)
    echo "$SCORED"
    SAMPLES=$(dirname "$(sed -n 's/^metrics: //p' <<< "$SCORED")")
    echo "samples: $SAMPLES/grid.png"
    MADE+=("$SAMPLES/samples.npz") NAMES+="s|^$SAMPLES/samples.npz$|== prompts: $KIND|;"
done

# 4. Do the samples show what the prompts name?
"$PYTHON" -m toy.agreement "${MADE[@]}" | sed "$NAMES"
