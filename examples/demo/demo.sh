#!/usr/bin/env bash
# The main job on this machine: a real chat model fine-tuned in two processes on the conversations of examples/data,
# asked the same before and after. `make demo` calls this with its environment first on PATH.
#   DEMO_DIR=DIR   where everything is written; default output/demo, which is emptied first
#   DEMO_STEPS=N   optimiser steps of 16 conversations each; default 12
# Further flags are handed on to train_sft.py.
set -euo pipefail
# colossalai run exports every variable to its workers in double quotes; make's own (after make demo VENV=DIR) hold text
# that a shell then takes for a substitution.
unset MAKEFLAGS MAKEOVERRIDES MFLAGS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
source examples/training_scripts/least_used_gpus.sh
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=$(command -v python || command -v python3)
started=$SECONDS

if [ -n "${DEMO_DIR:-}" ]; then
    work=$DEMO_DIR
    if [ -e "$work" ]; then
        echo "demo.sh: DEMO_DIR=$work exists; name a directory that does not" >&2
        exit 2
    fi
else
    work=output/demo
    rm -rf output/demo
fi
mkdir -p "$work"

# Two processes: on two GPUs, or on the CPU with half the cores each.
if [ "$(gpu_count)" -ge 2 ]; then
    use_least_used_gpus 2
else
    export CUDA_VISIBLE_DEVICES=
fi
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((cores > 1 ? cores / 2 : 1))
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
template=config/conversation_template/HuggingFaceTB_SmolLM2-135M-Instruct.json

step() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - started))"; }
ask() { # the same questions to the model $1
    OMP_NUM_THREADS=$cores "$python" examples/inference/inference.py --model_path "$1" --io simple --temperature 0 \
        --max_new_tokens 48 --conversation_template_config "$template" \
        --prompt "Hi! How are you doing?" --prompt "Do you have any pets?" --prompt "What do you do for fun?"
}
prepare() { # rows of $1 for training and evaluation into $work/$2
    "$python" examples/data_preparation_scripts/prepare_dataset.py --type sft --data_input_dirs "$1" \
        --tokenizer_dir "$model" --conversation_template_config "$template" --max_length 512 \
        --num_spliced_dataset_bins 1 --data_cache_dir "$work/$2/cache" \
        --data_jsonl_output_dir "$work/$2/jsonl" --data_arrow_output_dir "$work/$2/arrow"
}

step "The model: SmolLM2-135M-Instruct, unpacked into a Hugging Face directory"
model=$("$python" examples/demo/smollm2.py)
echo "$model"

step "Before training"
ask "$model"

step "The conversations, tokenised, with the assistant's turns marked"
prepare examples/data/sft.jsonl train
prepare examples/data/sft_eval.jsonl eval >"$work/eval.log" 2>&1 || { cat "$work/eval.log" >&2; exit 1; }

step "Supervised fine-tuning in two processes"
OMP_NUM_THREADS=$threads colossalai run --nproc_per_node 2 --master_port "$port" examples/training_scripts/train_sft.py \
    --pretrain "$model" --dataset "$work"/train/arrow/part-* --eval_dataset "$work"/eval/arrow/part-* \
    --plugin zero2 --mixed_precision fp32 --batch_size 4 --accumulation_steps 2 --max_length 512 --lr 5e-5 \
    --max_epochs 2 --max_steps "${DEMO_STEPS:-12}" --save_interval 0 --save_dir "$work/sft" "$@"

step "After training"
ask "$work/sft/modeling"

step "Result"
"$python" examples/demo/result.py "$work/sft/metrics.jsonl"
printf 'Talk to it: %s examples/inference/inference.py --model_path %s\n' "$python" "$work/sft/modeling"
