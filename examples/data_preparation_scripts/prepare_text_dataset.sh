#!/usr/bin/env bash
# Prepares documents for continued pre-training.
# Every variable can be set in the environment:
#   SAVE_DIR=out/text DATA_INPUT_DIRS=data/texts TOKENIZER_DIR=models/llama ./prepare_text_dataset.sh [more flags]
# Writes $SAVE_DIR/jsonl and $SAVE_DIR/arrow. Deletes nothing: an existing output is an error.
TYPE=text
MAX_LENGTH="${MAX_LENGTH:-4096}"
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
