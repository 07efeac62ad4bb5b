#!/usr/bin/env bash
# What `make bench-peers` runs: this library beside TRL (in .trl and .trl-ppo), transformers' own
# Trainer and generation, and vLLM where its environment is. Each part writes its JSON into
# output/bench as soon as it is done; a part that fails is named at the end, and the others go on.
# STEPS: steps, episodes and batches, those that warm up included. SHAPE: one or several of 28M and
# 135M, the size that users have. PARTS: some of grpo ppo dpo rm sft rollout. Arguments are passed on
# to all but rollout (--trl_defaults: TRL's own settings).
set -uo pipefail
cd "$(dirname "$0")/.."
out=output/bench
mkdir -p "$out"
steps=${STEPS:-12}
failed=()

run() { # NAME SCRIPT ARGUMENTS
    local name=$1
    shift
    echo "== $name"
    python "$@" --output "$out/$name.json" || failed+=("$name")
}

for shape in ${SHAPE:-28M}; do
    for part in ${PARTS:-grpo ppo dpo rm sft rollout}; do
        name=${part}_peers
        [ "$shape" = 28M ] || name=${name}_$shape
        case $part in
        grpo | ppo)
            run "$name" benchmarks/bench_ppo_peers.py --algorithm "$part" --shape "$shape" \
                --episodes "$steps" "$@"
            ;;
        dpo | rm)
            run "$name" benchmarks/bench_preference_peers.py --algorithm "$part" \
                --shape "$shape" --steps "$steps" "$@"
            ;;
        sft) run "$name" benchmarks/bench_sft_peers.py --shape "$shape" --steps "$steps" "$@" ;;
        rollout)
            run "$name" benchmarks/bench_rollout_peers.py --shape "$shape" --batches "$steps"
            ;;
        *) failed+=("$part: no such part") ;;
        esac
    done
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'bench-peers: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
