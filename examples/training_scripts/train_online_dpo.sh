#!/usr/bin/env bash
# Online DPO with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/sft PROMPT_DATASET="out/arrow/part-*" REWARD_MODEL_PATH=my/rm bash train_online_dpo.sh
# What tells two responses apart: REWARD_MODEL_PATH, REWARD_FUNCTIONS, or both; with REWARD_FUNCTIONS=pairwise_judge a
# model, which --judge_url and --judge_model name. EVAL_DATASET: prompts to evaluate on. Further flags are handed on to
# train_online_dpo.py (python train_online_dpo.py --help), and override those below. Per process, NUM_COLLECT_STEPS x
# EXPERIENCE_BATCH_SIZE is a whole multiple of TRAIN_BATCH_SIZE x ACCUMULATION_STEPS, whatever the number of processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=online_dpo MOST_PROCESSES=8
DATASET=${DATASET:-${PROMPT_DATASET:?the prompts: prepared arrow part directories, or raw json/jsonl files}}
source "$here/launch.sh"

# shellcheck disable=SC2086 # REWARD_FUNCTIONS and BETA are meant to be split into words
start train_online_dpo.py \
    ${REWARD_MODEL_PATH:+--rm_pretrain "$REWARD_MODEL_PATH"} \
    ${REWARD_FUNCTIONS:+--reward_functions $REWARD_FUNCTIONS} \
    ${CONVERSATION_TEMPLATE_CONFIG_PATH:+--conversation_template_config "$CONVERSATION_TEMPLATE_CONFIG_PATH"} \
    --plugin "${PLUGIN:-zero2}" \
    --num_episodes "${NUM_EPISODES:-100}" \
    --num_collect_steps "${NUM_COLLECT_STEPS:-2}" \
    --num_update_steps "${NUM_UPDATE_STEPS:-1}" \
    --num_generations "${NUM_GENERATIONS:-2}" \
    --experience_batch_size "${EXPERIENCE_BATCH_SIZE:-8}" \
    --train_batch_size "${TRAIN_BATCH_SIZE:-4}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-4}" \
    --max_length "${MAX_LENGTH:-2048}" \
    --max_seq_len "${MAX_SEQ_LEN:-512}" \
    --beta ${BETA:-0.1} \
    --lr "${LR:-5e-7}" \
    --missing_eos_penalty "${MISSING_EOS_PENALTY:-1.0}" \
    --save_interval "${SAVE_INTERVAL:-50}" \
    "$@"
