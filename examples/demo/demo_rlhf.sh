#!/usr/bin/env bash
# The three stages on this machine, on real prompts: SFT, a reward model, and PPO with both; then how often the trained
# model's answers score higher than the SFT model's on prompts that neither has seen. `make demo-rlhf` calls this with
# its environment first on PATH. Models of `make demo` and `make demo-preferences` are taken where they are there.
#   DEMO_DIR=DIR   where everything is written; default output/demo-rlhf, which is emptied first
#   SFT=DIR        a model directory to start from; default output/demo/sft/modeling, made first if it is not there
#   RM=DIR         a reward model; default output/demo-preferences/rm/modeling, made first if it is not there
#   EPISODES=N     episodes of 32 answers each; default 20
# Further flags are handed on to train_ppo.py.
set -euo pipefail
name=demo-rlhf
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ "$(gpu_count)" -ge 1 ]; then
    use_least_used_gpus 1
else
    export CUDA_VISIBLE_DEVICES=
fi
export OMP_NUM_THREADS=$cores

unpack_model
sft=${SFT:-output/demo/sft/modeling} rm=${RM:-output/demo-preferences/rm/modeling}

if [ ! -d "$sft" ]; then
    step "Supervised fine-tuning ($sft is not there)"
    DEMO_DIR=$work/demo bash examples/demo/demo.sh
    sft=$work/demo/sft/modeling
fi
if [ ! -d "$rm" ]; then
    step "A reward model ($rm is not there)"
    prepare preference examples/data/preference.jsonl 384 pairs
    "$python" examples/training_scripts/train_rm.py --pretrain "$model" --conversation_template_config "$template" \
        --dataset "$work/pairs/arrow" --plugin ddp --mixed_precision fp32 --batch_size 4 --accumulation_steps 2 \
        --max_length 384 --max_steps 56 --save_interval 0 --lr 5e-5 --head_lr 1e-3 --center_coef 0.01 --save_dir "$work/rm"
    rm=$work/rm/modeling
fi

step "Prompts: contexts of the preference pairs; those to evaluate on are of other conversations"
prepare prompt examples/data/preference.jsonl 96 prompts
quietly eval.log prepare prompt examples/data/preference_test.jsonl 96 unseen
quietly ptx.log prepare sft examples/data/sft.jsonl 128 ptx

step "PPO: $rm judges, the critic starts from it, conversations are learned beside"
"$python" examples/training_scripts/train_ppo.py --pretrain "$sft" --rm_pretrain "$rm" \
    --prompt_dataset "$work/prompts/arrow" --eval_prompt_dataset "$work/unseen/arrow" --ptx_dataset "$work/ptx/arrow" \
    --plugin ddp --mixed_precision fp32 --lora_rank 16 --lr 1e-3 --critic_lr 2e-4 --kl_coef 0.05 --ptx_coef 0.1 \
    --num_episodes "${EPISODES:-20}" --num_collect_steps 1 --experience_batch_size 32 --num_update_steps 1 \
    --train_batch_size 8 --accumulation_steps 1 --ptx_batch_size 2 --max_length 128 --max_seq_len 32 \
    --sample_interval 8 --eval_interval 0 --save_interval 0 --save_dir "$work/ppo" "$@"

step "How often its answers score higher than those of the model that it started from"
"$python" examples/inference/compare.py --model_path "$work/ppo/actor/modeling" --start_path "$sft" --rm_path "$rm" \
    --input examples/data/preference_test.jsonl --temperature 1 --max_length 160 --max_new_tokens 32 \
    --output "$work/compared.jsonl"

step "Result"
"$python" examples/demo/curves.py "$work/ppo/metrics.jsonl" train/reward train/approx_kl --png "$work/ppo.png"
"$python" examples/demo/result.py "$work/ppo/metrics.jsonl" ppo
