#!/usr/bin/env bash
# Prepares responses labeled good or bad, for KTO.
# Every variable can be set in the environment:
#   SAVE_DIR=out/kto DATA_INPUT_DIRS=data/kto.jsonl TOKENIZER_DIR=models/llama ./prepare_kto_dataset.sh [more flags]
# Writes $SAVE_DIR/jsonl and $SAVE_DIR/arrow. Deletes nothing: an existing output is an error.
TYPE=kto
MAX_LENGTH="${MAX_LENGTH:-1024}"
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
