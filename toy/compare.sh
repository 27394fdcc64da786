#!/usr/bin/env bash
# SiT, REPA and REG side by side on the toy: what `make compare` runs.
#   bash toy/compare.sh --scale cpu                  about an hour on two cores
#   bash toy/compare.sh --scale words                captions: MMDiT, REPA, REG without alignment, REG; 6 minutes
#   bash toy/compare.sh --scale gpu --minutes 30     64 px, one GPU; runs that would end later are reported as not run
# The same command continues after an interruption, and after --minutes. Data in data/toy, data/toy64 or data/toy-t2i,
# results in exps/compare-SCALE.
#
# Environment:  PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m toy.compare "$@"
