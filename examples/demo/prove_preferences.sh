#!/usr/bin/env bash
# Proof that a reward model learns from real pairs, on the CPU in one to two hours: an epoch over all pairs of
# examples/data, a curve of its accuracy on pairs held out, and at the end the accuracy on pairs that no setting was
# chosen by, which must be above 0.75. `make prove-preferences` calls this with its environment first on PATH.
#   DEMO_DIR=DIR   where everything is written; default output/prove-preferences, which is emptied first
#   RM_STEPS=N     optimizer steps of 8 pairs each; default 216, one epoch
set -euo pipefail
name=prove-preferences
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}

unpack_model

step "Pairs of answers, tokenized, the last answer of each marked"
prepare preference "examples/data/preference.jsonl examples/data/preference_more.jsonl" 384 train
quietly eval.log prepare preference examples/data/preference_eval.jsonl 384 eval

step "A reward model"
"$python" examples/training_scripts/train_rm.py --pretrain "$model" --conversation_template_config "$template" \
    --dataset "$work/train/arrow" --eval_dataset "$work/eval/arrow" --plugin ddp --mixed_precision fp32 \
    --batch_size 4 --accumulation_steps 2 --eval_batch_size 8 --max_length 384 --max_epochs 1 \
    --max_steps "${RM_STEPS:-216}" --eval_interval 54 --save_interval 54 --keep_last_k 1 \
    --lr 5e-5 --head_lr 1e-3 --center_coef 0.01 --save_dir "$work/rm"

step "Result, on the pairs of preference_test.jsonl"
"$python" examples/inference/score.py --model_path "$work/rm/modeling" --input examples/data/preference_test.jsonl \
    --output "$work/scores.jsonl" --histogram "$work/scores.png"
"$python" examples/demo/curves.py "$work/rm/metrics.jsonl" eval/acc --png "$work/accuracy.png" --mark 0.75
"$python" examples/demo/result.py "$work/scores.jsonl" pairs --reward_accuracy 0.75
