"""What the benchmarks beside other libraries count, and that all get the same."""

import json
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import bench_rollout_peers, bench_sft_peers
from benchmarks.bench_sft_peers import compared, trl_folder, trl_release
from coati.utils.transformers_compat import transformers_major
from tests.tiny import tiny_llama, tiny_tokenizer


def system(seconds: list[float], losses: list[float], peak: float = 100.0) -> dict:
    return {"seconds": seconds, "losses": losses, "peak_memory_mb": peak}


def test_a_ratio_is_the_median_of_single_steps_after_the_warm_up():
    one = system([9.0, 9.0, 1.0, 2.0, 4.0, 1.0], [4.0, 2.0])
    other = system([1.0, 1.0, 2.0, 6.0, 8.0, 5.0], [4.0, 2.5], peak=400.0)
    found = compared(one, other)
    assert found["ratio"] == 2.5 and found["steps"] == 4  # of 2, 3, 2, 5
    assert found["quartiles"] == [2.0, 4.5]
    assert found["memory_ratio"] == 0.25
    assert found["largest_relative_loss_difference"] == pytest.approx(0.2)


def batch(tokens: int, seconds: float, answers: list[list[int]]) -> dict:
    return {"tokens": tokens, "seconds": seconds, "answers": answers}


def test_rollouts_are_compared_by_tokens_per_second_of_single_batches():
    same, other = [[1], [2, 3]], [[1], [2, 4]]
    ours = [batch(9, 9, same)] * 2 + [batch(30, 1, same), batch(9, 9, same)] * 2
    theirs = [batch(9, 1, same)] * 2 + [batch(20, 2, other), batch(9, 9, same)] * 2
    theirs[4] = batch(30, 2, same)
    found = bench_rollout_peers.figures({"coati": ours, "vllm": theirs}, "greedy")
    assert found["tokens_per_second"] == {"coati": 30.0, "vllm": 12.5}
    row = found["beside"]["vllm"]
    assert row["ratio"] == 2.5 and row["batches"] == 2
    assert row["same_responses"] == pytest.approx(5 / 6)


def test_trl_is_installed_alone_and_once(tmp_path, monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        (tmp_path / "trl").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench_sft_peers.subprocess, "run", run)
    for _ in range(2):
        assert trl_folder(tmp_path / "trl") == tmp_path / "trl"
    assert len(commands) == 1 and {"--no-deps", "--target"} < set(commands[0])
    trl_folder(tmp_path / "trl", "requirements-trl-ppo.txt")  # another release
    assert len(commands) == 2


def test_the_release_is_that_of_the_requirements():
    assert trl_release("requirements-trl-ppo.txt") == "1.12.0"
    assert trl_release().count(".") == 2


def sft_folder(folder: Path) -> Path:
    """As sft_case.prepare makes one, tiny."""
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = []
    for length in (9, 14, 7, 12, 10, 8):
        ids = [5 + (7 * k + length) % 200 for k in range(length)]
        labels = [-100] * 3 + ids[3:]
        rows.append({"input_ids": ids, "labels": labels, "seq_length": length})
    lines = [json.dumps({"input_ids": r["input_ids"], "labels": r["labels"]}) for r in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    Dataset.from_list(rows).save_to_disk(str(folder / "arrow"))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(transformers_major() < 5, reason="dtype, not torch_dtype")
def test_our_steps_are_those_of_transformers_trainer(tmp_path):
    args = Namespace(steps=4, batch_size=2, plugin="ddp", peers=["transformers"], shape="28M")
    args.trl_defaults = False
    found = bench_sft_peers.run(args, sft_folder(tmp_path))
    row = found["beside"]["transformers"]
    assert row["largest_relative_loss_difference"] < 1e-5 and row["steps"] == 2
    assert len(found["coati"]["losses"]) == 4
    assert found["coati"]["supervised_share_of_tokens"] == pytest.approx(
        found["transformers"]["supervised_share_of_tokens"]
    )
