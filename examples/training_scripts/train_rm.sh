#!/usr/bin/env bash
# A reward model with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_rm.sh --max_steps 100
# Further flags are handed on to train_rm.py (python train_rm.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=rm MOST_PROCESSES=8
source "$here/launch.sh"

start train_rm.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-3}" \
    --max_length "${MAX_LENGTH:-2048}" \
    --lr "${LR:-5e-6}" \
    --weight_decay "${WEIGHT_DECAY:-0.01}" \
    --warmup_steps "${WARMUP_STEPS:-40}" \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
