#!/usr/bin/env bash
# Distillation from a teacher with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/student TEACHER=my/teacher bash train_gkd.sh --max_steps 100
# Further flags are handed on to train_gkd.py (python train_gkd.py --help), and override those below.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=gkd MOST_PROCESSES=4
source "$here/launch.sh"

start train_gkd.py \
    --teacher "${TEACHER:?the Hugging Face directory or hub name of the teacher, of the same tokenizer}" \
    --plugin "${PLUGIN:-zero2}" \
    --batch_size "${BATCH_SIZE:-8}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-1}" \
    --max_epochs "${MAX_EPOCHS:-1}" \
    --max_length "${MAX_LENGTH:-2048}" \
    --lr "${LR:-1e-5}" \
    --save_interval "${SAVE_INTERVAL:-1000}" \
    "$@"
