#!/usr/bin/env bash
# Proof that PPO and GRPO learn: ten seeds each, half of the cores for each. `make prove-ppo` calls this.
#   SEEDS=N        default 10
#   LOSS=NAME      GRPO alone, with another --policy_loss: gspo, gspo-token, cispo or sapo
#   AHEAD=N        episodes whose responses are asked for ahead; default 0
#   DEMO_DIR=DIR   where the curves are drawn; default output/prove-ppo, which is emptied first
set -euo pipefail
name=prove-ppo
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1

prove() {
    quietly "$1.log" "$python" examples/demo/prove_online.py "$1" --seeds "${SEEDS:-10}" --ahead "${AHEAD:-0}" \
        --loss "${LOSS:-ppo}" --png "$work/$1.png"
    grep "^$1" "$work/$1.log"
    echo "the curves are in $work/$1.png"
}
if [ -n "${LOSS:-}" ]; then
    prove grpo
    exit
fi
prove ppo & first=$!
prove grpo & second=$!
wait $first && wait $second
