#!/usr/bin/env bash
# Continued pre-training on plain texts with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_pt.sh --max_steps 100
# Further flags are handed on to train_pt.py (python train_pt.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=pt MOST_PROCESSES=8
source "$here/launch.sh"

start train_pt.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-4}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-8}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-4096}" \
    --lr "${LR:-3e-5}" \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
