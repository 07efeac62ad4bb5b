#!/usr/bin/env bash
# Direct preference optimization with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_dpo.sh --max_steps 100
# Further flags are handed on to train_dpo.py (python train_dpo.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=dpo MOST_PROCESSES=4
source "$here/launch.sh"

start train_dpo.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-16}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-2}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-4096}" \
    --lr "${LR:-1e-6}" \
    --beta "${BETA:-0.1}" \
    --weight_decay "${WEIGHT_DECAY:-0.01}" \
    --warmup_steps "${WARMUP_STEPS:-60}" \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
