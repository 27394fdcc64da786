#!/usr/bin/env bash
# SiT, REPA and REG side by side on the toy: steps to the same distance. What `make compare` runs; RESULTS.md is what it found.
#   bash toy/compare.sh --scale cpu                  an hour at most on two cores
#   bash toy/compare.sh --scale gpu --minutes 30     64 px, pieces of some minutes on one GPU; what did not fit is reported as not run
# The same command goes on after an interruption, and after --minutes. Data in data/toy or data/toy64, results in exps/compare-SCALE.
#
# Environment:  PYTHON=python
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m toy.compare "$@"
