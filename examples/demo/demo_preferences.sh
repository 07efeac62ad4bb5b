#!/usr/bin/env bash
# Preferences on this machine: a reward model and a DPO policy, both from a real chat model and the chat pairs of
# examples/data, each measured on pairs it has not seen, before and after. `make demo-preferences` calls this with its
# environment first on PATH.
#   DEMO_DIR=DIR     where everything is written; default output/demo-preferences, which is emptied first
#   RM_STEPS=N     optimizer steps of 8 pairs each for the reward model; default 64
#   DPO_STEPS=N    the same for DPO; default 30
set -euo pipefail
name=demo-preferences
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# One process: on one GPU, or on the CPU with all cores.
if [ "$(gpu_count)" -ge 1 ]; then
    use_least_used_gpus 1
else
    export CUDA_VISIBLE_DEVICES=
fi
export OMP_NUM_THREADS=$cores

train() { # script $1 into $work/$2, with further flags
    "$python" "examples/training_scripts/$1" --pretrain "$model" --conversation_template_config "$template" \
        --dataset "$work/train/arrow" --eval_dataset "$work/eval/arrow" --plugin ddp --mixed_precision fp32 \
        --batch_size 4 --accumulation_steps 2 --eval_batch_size 8 --max_length 384 --eval_interval 0 \
        --save_interval 0 --save_dir "$work/$2" "${@:3}"
}

unpack_model

step "Pairs of answers, tokenized, the last answer of each marked"
prepare preference examples/data/preference.jsonl 384 train
quietly eval.log prepare preference examples/data/preference_eval.jsonl 384 eval

step "A reward model"
train train_rm.py rm --max_steps "${RM_STEPS:-64}" --lr 5e-5 --head_lr 1e-3 --center_coef 0.01

step "DPO, by LoRA adapters: the reference is the model without them"
train train_dpo.py dpo --max_steps "${DPO_STEPS:-30}" --lora_rank 16 --lr 2e-4 --beta 0.1

step "Result"
echo "Reward model"
"$python" examples/demo/result.py "$work/rm/metrics.jsonl" rm
echo "DPO"
"$python" examples/demo/result.py "$work/dpo/metrics.jsonl" dpo
