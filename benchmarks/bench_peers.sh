#!/usr/bin/env bash
# What `make bench-peers` runs: this library and TRL side by side, TRL in environments of its own (.venv-trl, .venv-trl-ppo).
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p output/bench
python benchmarks/bench_sft_peers.py --output output/bench/sft_peers.json "$@"
python benchmarks/bench_preference_peers.py --output output/bench/preference_peers.json "$@"
python benchmarks/bench_ppo_peers.py --output output/bench/ppo_peers.json
