#!/usr/bin/env bash
# Supervised fine-tuning with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_sft.sh --max_steps 100
# Further flags are handed on to train_sft.py (python train_sft.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=sft MOST_PROCESSES=4
source "$here/launch.sh"

start train_sft.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-4096}" \
    --lr "${LR:-5e-5}" \
    --save_interval "${SAVE_INTERVAL:-2000}" \
    "$@"
