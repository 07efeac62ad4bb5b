#!/usr/bin/env bash
# Implicit language Q-learning with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/model DATASET="out/arrow/part-*" bash train_ilql.sh --max_steps 100
# Further flags are handed on to train_ilql.py (python train_ilql.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=ilql MOST_PROCESSES=4
source "$here/launch.sh"

start train_ilql.py \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-1024}" \
    --lr "${LR:-5e-5}" \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
