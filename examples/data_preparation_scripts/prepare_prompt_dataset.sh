#!/usr/bin/env bash
# Prepares prompts for PPO and GRPO; gt_answer is kept for verifiable rewards.
# Every variable can be set in the environment:
#   SAVE_DIR=out/prompt DATA_INPUT_DIRS=data/prompt.jsonl TOKENIZER_DIR=models/llama ./prepare_prompt_dataset.sh [more flags]
# Writes $SAVE_DIR/jsonl and $SAVE_DIR/arrow. Deletes nothing: an existing output is an error.
TYPE=prompt
MAX_LENGTH="${MAX_LENGTH:-300}"
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
