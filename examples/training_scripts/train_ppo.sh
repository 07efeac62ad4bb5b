#!/usr/bin/env bash
# PPO with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/sft REWARD_MODEL_PATH=my/rm PROMPT_DATASET="out/arrow/part-*" bash train_ppo.sh --dry_run
# PTX_DATASET: conversations to learn beside it; EVAL_DATASET: prompts to evaluate on; REWARD_FUNCTIONS: beside the
# reward model or in its place. Further flags are handed on to train_ppo.py (python train_ppo.py --help), and override
# those below. Per process, NUM_COLLECT_STEPS x EXPERIENCE_BATCH_SIZE is a whole multiple of TRAIN_BATCH_SIZE x
# ACCUMULATION_STEPS, whatever the number of processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=ppo MOST_PROCESSES=8
DATASET=${DATASET:-${PROMPT_DATASET:?the prompts: prepared arrow part directories, or raw json/jsonl files}}
source "$here/launch.sh"

# shellcheck disable=SC2086 # PTX_DATASET and REWARD_FUNCTIONS are meant to be split into words
start train_ppo.py \
    ${REWARD_MODEL_PATH:+--rm_pretrain "$REWARD_MODEL_PATH"} \
    ${REWARD_FUNCTIONS:+--reward_functions $REWARD_FUNCTIONS} \
    ${CONVERSATION_TEMPLATE_CONFIG_PATH:+--conversation_template_config "$CONVERSATION_TEMPLATE_CONFIG_PATH"} \
    ${PTX_DATASET:+--ptx_dataset $PTX_DATASET --ptx_coef "${PTX_COEF:-0.1}" --ptx_batch_size "${PTX_BATCH_SIZE:-1}"} \
    --plugin "${PLUGIN:-zero2}" \
    --num_episodes "${NUM_EPISODES:-2000}" \
    --num_collect_steps "${NUM_COLLECT_STEPS:-2}" \
    --num_update_steps "${NUM_UPDATE_STEPS:-1}" \
    --experience_batch_size "${EXPERIENCE_BATCH_SIZE:-4}" \
    --train_batch_size "${TRAIN_BATCH_SIZE:-4}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-2}" \
    --lr "${LR:-9e-6}" \
    --critic_lr "${CRITIC_LR:-9e-6}" \
    --grad_clip "${GRAD_CLIP:-0.1}" \
    --weight_decay "${WEIGHT_DECAY:-0.01}" \
    --warmup_steps "${WARMUP_STEPS:-40}" \
    --save_interval "${SAVE_INTERVAL:-100}" \
    "$@"
