#!/usr/bin/env bash
# Kahneman-Tversky optimization with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_kto.sh --max_steps 100
# Further flags are handed on to train_kto.py (python train_kto.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=kto MOST_PROCESSES=4
source "$here/launch.sh"

start train_kto.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-1024}" \
    --lr "${LR:-1e-5}" \
    --auto_weight \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
