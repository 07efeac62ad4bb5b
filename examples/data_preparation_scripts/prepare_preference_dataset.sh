#!/usr/bin/env bash
# Prepares pairs of chosen and rejected responses for reward models, DPO, SimPO and ORPO.
# Every variable can be set in the environment:
#   SAVE_DIR=out/preference DATA_INPUT_DIRS=data/preference.jsonl TOKENIZER_DIR=models/llama ./prepare_preference_dataset.sh [more flags]
# Writes $SAVE_DIR/jsonl and $SAVE_DIR/arrow. Deletes nothing: an existing output is an error.
TYPE=preference
MAX_LENGTH="${MAX_LENGTH:-1024}"
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
