#!/usr/bin/env bash
# GRPO and its kin with ColossalAI's launcher. What is set below, and in launch.sh, can be set in the environment:
#   PRETRAINED_MODEL_PATH=my/sft PROMPT_DATASET="out/arrow/part-*" REWARD_FUNCTIONS=gsm8k bash train_grpo.sh --algo dapo
# REWARD_MODEL_PATH: a reward model beside the functions or in their place; EVAL_DATASET: prompts to evaluate on.
# Further flags are handed on to train_grpo.py (python train_grpo.py --help), and override those below. Per process,
# NUM_COLLECT_STEPS x EXPERIENCE_BATCH_SIZE x NUM_GENERATIONS is a whole multiple of TRAIN_BATCH_SIZE x
# ACCUMULATION_STEPS, whatever the number of processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGE=grpo MOST_PROCESSES=8
DATASET=${DATASET:-${PROMPT_DATASET:?the prompts: prepared arrow part directories, or raw json/jsonl files}}
source "$here/launch.sh"

# shellcheck disable=SC2086 # REWARD_FUNCTIONS is meant to be split into words
start train_grpo.py \
    ${REWARD_MODEL_PATH:+--rm_pretrain "$REWARD_MODEL_PATH"} \
    ${REWARD_FUNCTIONS:+--reward_functions $REWARD_FUNCTIONS} \
    ${CONVERSATION_TEMPLATE_CONFIG_PATH:+--conversation_template_config "$CONVERSATION_TEMPLATE_CONFIG_PATH"} \
    --plugin "${PLUGIN:-zero2_cpu}" \
    --num_episodes "${NUM_EPISODES:-100}" \
    --num_collect_steps "${NUM_COLLECT_STEPS:-8}" \
    --num_update_steps "${NUM_UPDATE_STEPS:-1}" \
    --num_generations "${NUM_GENERATIONS:-8}" \
    --experience_batch_size "${EXPERIENCE_BATCH_SIZE:-1}" \
    --train_batch_size "${TRAIN_BATCH_SIZE:-4}" \
    --accumulation_steps "${ACCUMULATION_STEPS:-4}" \
    --inference_batch_size "${INFERENCE_BATCH_SIZE:-8}" \
    --logits_forward_batch_size "${LOGITS_FORWARD_BATCH_SIZE:-2}" \
    --max_length "${MAX_LENGTH:-2000}" \
    --max_seq_len "${MAX_SEQ_LEN:-1700}" \
    --lr "${LR:-1e-6}" \
    --kl_coef "${KL_COEF:-0.01}" \
    --grad_clip "${GRAD_CLIP:-0.1}" \
    --weight_decay "${WEIGHT_DECAY:-0.01}" \
    --save_interval "${SAVE_INTERVAL:-100}" \
    "$@"
