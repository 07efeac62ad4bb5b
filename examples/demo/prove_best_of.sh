#!/usr/bin/env bash
# The best of 8 responses beats a single one: SmolLM2-135M-Instruct on sums, by a reward that checks the result.
# Prints the gain over one response with its 95% interval; some minutes on two cores.
set -euo pipefail
name=best_of
source "$(dirname "$0")/common.sh"

unpack_model
step "8 responses to each of 60 prompts"
"$python" examples/inference/sample.py --model_path "$model" --conversation_template_config "$template" \
    --input examples/data/sums.jsonl --max_prompts 60 --num_samples 8 --temperature 0.8 --max_new_tokens 48 --batch_size 32 \
    --reward_functions math_competition --write best rejection pairs groups --threshold 10 --output_dir "$work"
