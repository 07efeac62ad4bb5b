#!/usr/bin/env bash
# The main job on this machine: a real chat model fine-tuned in two processes on the conversations of examples/data,
# asked the same before and after. `make demo` calls this with its environment first on PATH.
#   DEMO_DIR=DIR   where everything is written; default output/demo, which is emptied first
#   DEMO_STEPS=N   optimizer steps of 16 conversations each; default 12
# Further flags are handed on to train_sft.py.
set -euo pipefail
name=demo
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Two processes: on two GPUs, or on the CPU with half the cores each.
if [ "$(gpu_count)" -ge 2 ]; then
    use_least_used_gpus 2
else
    export CUDA_VISIBLE_DEVICES=
fi
threads=$((cores > 1 ? cores / 2 : 1))
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

ask() { # the same questions to the model $1
    OMP_NUM_THREADS=$cores "$python" examples/inference/inference.py --model_path "$1" --io simple --temperature 0 \
        --max_new_tokens 48 --conversation_template_config "$template" \
        --prompt "Hi! How are you doing?" --prompt "Do you have any pets?" --prompt "What do you do for fun?"
}

unpack_model

step "Before training"
ask "$model"

step "The conversations, tokenized, with the assistant's turns marked"
prepare sft examples/data/sft.jsonl 512 train
quietly eval.log prepare sft examples/data/sft_eval.jsonl 512 eval

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
