#!/usr/bin/env bash
# Odds-ratio preference optimization with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_orpo.sh --max_steps 100
# Further flags are handed on to train_orpo.py (python train_orpo.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=orpo MOST_PROCESSES=8
source "$here/launch.sh"

start train_orpo.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-16}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-3}" \
    --max_length "${MAX_LENGTH:-1024}" \
    --lr "${LR:-8e-6}" \
    --lam "${LAM:-0.5}" \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
