#!/usr/bin/env bash
# What `make bench` runs: speed and memory of this machine, results as JSON beside the printed lines.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p output/bench
python benchmarks/bench_sft.py --output output/bench/sft.json "$@"
python benchmarks/bench_head_memory.py --output output/bench/head_memory.json
python benchmarks/bench_dpo.py --output output/bench/dpo.json
python benchmarks/bench_rollout.py --output output/bench/rollout.json
python benchmarks/bench_prepack.py
if [ -f benchmarks/bench_data.py ]; then
    python benchmarks/bench_data.py --output output/bench/data.json
fi
python benchmarks/bench_ppo.py --output output/bench/ppo.json
