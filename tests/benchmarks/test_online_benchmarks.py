"""The benchmarks of PPO and GRPO: episodes are the same work for both systems, and the arithmetic
is counted right."""

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import bench_ppo, bench_ppo_peers
from benchmarks import online_case as case
from tests.distributed.spawn import run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 97,
    "tie_word_embeddings": True,
    "pad_token_id": 1,
}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
EPISODES = 2


def episodes_of(folder: str, algorithm: str) -> list[dict]:
    """In a worker: what each episode took."""
    from benchmarks import preference_case
    from benchmarks.gpu_models import LeftPad as Ids
    from benchmarks.online_ways import Paced, loader, make_trainer, stored
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions

    launch()
    preference_case.write_models(Path(folder), TINY)
    size = case.Size(prompts=2, new=4, generations=1 if algorithm == "ppo" else 3, passes=2)
    told: list[dict] = []
    rows = Paced(loader(PROMPTS, Ids), tell=told.append)
    models = stored(
        algorithm,
        Path(folder),
        ParallelOptions(plugin="ddp", precision="fp32", grad_clip=case.MAX_NORM),
    )
    trainer = make_trainer(models, size, EPISODES, rows, Ids)
    trainer.run(rows)
    assert len(trainer.buffer) == 0 and trainer.state.step == EPISODES * size.passes
    return told


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_an_episode_is_all_prompts_answered_and_learned(algorithm, tmp_path):
    (told,) = run(
        1,
        "tests.benchmarks.test_online_benchmarks:episodes_of",
        str(tmp_path),
        algorithm,
        env=ENVIRONMENT,
    )
    assert len(told) == EPISODES
    for found in told:
        assert 1 <= found["answer_tokens"] <= 4
        assert 0 < sum(found[phase] for phase in bench_ppo.PHASES) <= found["seconds"]


def test_the_arithmetic_of_an_episode_by_hand():
    # One layer: queries and output 2 x 4 x 4, keys and values 2 x 4 x 2, MLP 3 x 4 x 8: 144
    # weights. Vocabulary 4 x 10.
    model = {
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 10,
    }

    def forward(tokens: int) -> float:
        return 2 * 144 * tokens + 2 * 4 * tokens**2

    head = 2 * 40 * 2  # of two answer tokens
    once = case.Size(prompts=1, new=2)
    assert case.flops("ppo", once, [3], model) == 10 * forward(5) + 5 * head
    assert case.flops("ppo", case.Size(1, 2, passes=2), [3], model) == 16 * forward(5) + 8 * head
    # Of a group of three the prompt is read once for sampling; the update reads every row whole.
    group = case.Size(prompts=1, new=2, generations=3)
    assert case.flops("grpo", group, [3], model) == 12 * forward(5) - 2 * forward(3) + 12 * head
    assert case.flops("grpo", once, [3, 4], model) == 4 * (forward(5) + forward(6)) + 4 * head


def test_both_systems_get_the_same_prompts_and_score(tmp_path):
    lines = [json.dumps({"text": f"prompt {number}", "input_ids": [number]}) for number in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    for size in case.SIZES.values():
        assert [row["input_ids"] for row in case.read(tmp_path, size)] == [
            [n] for n in range(size.prompts)
        ]
    assert case.SIZES["ppo"].answers == case.SIZES["grpo"].answers == 8
    assert case.score(completions=["abc1", "", "42"], prompts=["", "", ""]) == [0.75, 0.0, 0.0]


def test_figures_leave_the_first_episode_out(capsys):
    steps = [
        {
            "seconds": s,
            "processor_seconds": 2 * s,
            "reward": 1.0,
            "rollout": s / 2,
            "scoring": 0.0,
            "update": s / 4,
        }
        for s in (9.0, 2.0, 4.0)
    ]
    found = bench_ppo_peers.figures(steps, case.SIZES["ppo"], 100.0)
    assert found["samples_per_second"] == pytest.approx(8 / 3)
    assert found["shares"] == {"rollout": 0.5, "scoring": 0.0, "update": 0.25}
    other = [{"seconds": 4.0, "processor_seconds": 4.0, "reward": 0.0}] * 3
    results = {"coati": found, "trl": bench_ppo_peers.figures(other, case.SIZES["ppo"], 1.0)}
    assert "shares" not in results["trl"]
    assert bench_ppo_peers.ratios_of(results, "seconds") == [2.0, 1.0]
    result = results | bench_ppo_peers.outcome(results, needed=8e9, rates=[1e9, 2e9, 4e9])
    assert (result["ratio"], result["ratio_of_processor_seconds"], result["floor_seconds"]) == (
        1.5,
        0.75,
        4.0,
    )
    about = {
        "size": {"prompts": 2, "new": 48, "generations": 4},
        "shape": "28M",
        "about": {
            "trl": "1.12.0",
            "transformers": "5.20.2",
            "torch": "2.14.1",
            "cores": 2,
            "processor": "EPYC AVX2",
        },
    }
    bench_ppo_peers.show("ppo", result | about)
    said = capsys.readouterr().out
    assert (
        "8 answers of 48 tokens; TRL 1.12.0" in said
        and "2 cores of EPYC AVX2" in said
        and "1.5 x as fast (quartiles 0.8 to 2.2" in said
    )
    assert (
        "peak 100 MiB (rollout 50%, scoring 0%, update 25%)" in said
        and "the floor of the arithmetic is 4.0 s" in said
    )


def test_shares_of_an_episode_from_the_lines_of_a_run():
    lines = [
        {
            "step": step,
            "train/seconds_rollout": a,
            "train/seconds_scoring": b,
            "train/seconds_update": c,
            "train/tokens_per_second": 50.0 * step,
        }
        for step, a, b, c in ((1, 50.0, 50.0, 50.0), (2, 2.0, 1.0, 3.0), (3, 1.0, 0.0, 1.0))
    ]
    found = bench_ppo.figures([*lines, {"step": 3, "memory/rank_0_peak_mb": 700.0}])
    assert found["shares"] == {"rollout": 3 / 8, "scoring": 1 / 8, "update": 4 / 8}
    assert (
        found["samples_per_second"] == bench_ppo.PROMPTS * 2 / 8
        and found["peak_memory_mb"] == 700.0
    )
    assert found["rollout_tokens_per_second"] == 125.0


@pytest.mark.parametrize("way", bench_ppo.WAYS)
def test_the_command_of_every_way_is_one_that_the_script_takes(way, tmp_path):
    from tests.cli.flat import parse_ppo

    command = bench_ppo.command(
        way, tmp_path, str(tmp_path / "out"), Namespace(episodes=3, new_tokens=16)
    )
    args = parse_ppo(command[2:])
    assert (
        args.shared_base == (way == "one base")
        and args.num_episodes == 3
        and args.max_seq_len == 16
    )
    assert Path(args.rm_pretrain).name == ("adapter" if args.shared_base else "reward")
