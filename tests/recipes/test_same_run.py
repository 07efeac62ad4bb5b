"""What a run is told and reads, as facts: equal for copies, different for whatever would train
something else."""

import shutil
from types import SimpleNamespace

import datasets
import pytest

from coati.parallel.options import ParallelOptions
from coati.recipes.same_run import rows_facts, run_facts
from tests.end_to_end.inputs import write_model

OPTIONS = ParallelOptions(plugin="ddp", precision="fp32")


def facts(**flags) -> dict:
    return run_facts(SimpleNamespace(flags=flags), OPTIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "one")


def test_flags_by_value_and_defaults_as_they_were_resolved():
    found = facts(lr=1e-5, dataset_weights=[1.0, 2.0], plugin=None, mixed_precision=None)
    assert found == {
        "--lr": "1e-05",
        "--dataset_weights": "1.0 2.0",
        "--plugin": "ddp",
        "--mixed_precision": "fp32",
    }


def test_what_is_each_hosts_own_is_no_fact():
    assert facts(nproc=2, hostfile="h", save_dir="x", log_dir="y", config_file="z") == {
        "--plugin": "ddp",
        "--mixed_precision": "fp32",
    }


def test_copies_of_a_model_are_equal_wherever_they_lie(model, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("a copy")
    assert facts(pretrain=model) == facts(pretrain=str(copy))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_one_byte_of_a_model_is_a_difference_that_names_the_file(model, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    before = facts(pretrain=model)
    after = facts(pretrain=str(copy))
    assert [key for key in before if before[key] != after[key]] == [f"--pretrain/{name}"]


def test_a_file_that_is_missing_is_a_difference(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "tokenizer_config.json").unlink()
    assert facts(pretrain=model) != facts(pretrain=str(copy))


def test_a_reward_function_is_compared_by_its_text(tmp_path):
    one = tmp_path / "one.py"
    one.write_text("def good(response): return 1.0\n")
    first = facts(reward_functions=[f"{one}:good", "length"])
    one.write_text("def good(response): return 2.0\n")
    second = facts(reward_functions=[f"{one}:good", "length"])
    assert first["--reward_functions[1]"] == "length" == second["--reward_functions[1]"]
    assert first["--reward_functions[0]"] != second["--reward_functions[0]"]


def test_only_one_rank_of_a_host_reads_files(model, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not [name for name in facts(pretrain=model, lr=1) if "pretrain" in name]


def test_a_large_file_is_sampled(tmp_path):
    """A sparse file of 40 GB is read in no time; a change at its end is seen."""
    file = tmp_path / "weights.safetensors"
    with open(file, "wb") as stream:
        stream.truncate(40 * 10**9)
    before = facts(pretrain=str(file))
    with open(file, "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert facts(pretrain=str(file)) != before


def rows(*ids: list[int]):
    lengths = [len(one) for one in ids]
    return datasets.Dataset.from_dict({"input_ids": list(ids), "seq_length": lengths})


@pytest.mark.parametrize("name", ["labels", "loss_weights", "chosen_loss_mask"])
def test_what_is_learned_of_the_same_tokens_counts(name):
    one, other = (rows([1, 2]).add_column(name, [marks]) for marks in ([0, 2], [1, 2]))
    assert rows_facts(a=one) != rows_facts(a=other)


def test_rows_by_number_order_lengths_and_tokens():
    same = rows_facts(a=rows([1, 2], [3]))["a"]
    assert same == rows_facts(a=rows([1, 2], [3]))["a"] and same.startswith("2 rows (hash ")
    others = [rows([3], [1, 2]), rows([1, 2]), rows([1, 2], [4]), rows([1, 2, 0], [3])]
    assert same not in [rows_facts(a=one)["a"] for one in others]
    assert rows_facts(a=None) == {}
