#!/usr/bin/env bash
# Prepares conversations (or plain texts, the ptx data of PPO) for supervised fine-tuning.
# Every variable can be set in the environment:
#   SAVE_DIR=out/sft DATA_INPUT_DIRS=data/ TOKENIZER_DIR=models/llama ./prepare_sft_dataset.sh [more flags]
# Writes $SAVE_DIR/jsonl and $SAVE_DIR/arrow. Deletes nothing: an existing output is an error.
TYPE=sft
MAX_LENGTH="${MAX_LENGTH:-4096}"
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
