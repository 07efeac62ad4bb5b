"""``coati sample`` and ``coati evaluate`` in this process: what they write, go on from, and decode
by; and who reads the rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coati.dataset.rows.formats import read_row
from coati.inference.model_loading import load
from coati.models.ilql_heads import FILE, ILQLHeads, tensors_of
from coati.utils.logging import forget_warnings
from tests.end_to_end.malformed import ended
from tests.experience_maker.rollout_servers import Server
from tests.tiny import tiny_llama, tiny_tokenizer

NEW = ("--max_new_tokens", "6", "--max_length", "64", "--batch_size", "8")
KINDS = ("best", "rejection", "pairs", "groups")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    tiny_llama(layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"hello {number}", "gt_answer": str(number)} for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("hello there, how are you today?\n" * 3)
    (folder / "judge.py").write_text(
        "def f(responses):\n    return [float(sum(map(ord, one)) % 7) for one in responses]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def every_warning():
    forget_warnings()


def sampled(place: Path, output: str, *more: str, model: str = "model") -> Path:
    words = ["--model_path", str(place / model), "--input", str(place / "prompts.jsonl")]
    code, said = ended("sample", [*words, "--output_dir", str(place / output), *NEW, *more])
    assert code == 0, said
    return place / output


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn(place) -> Path:
    judge = ("--reward_functions", f"{place / 'judge.py'}:f", "--threshold", "3")
    more = (*judge, "--num_samples", "4", "--keep_truncated", "--write", *KINDS)
    return sampled(place, "drawn", *more)


def test_every_file_holds_what_its_method_reads(drawn):
    """A group with all its scores is rows of ILQL, and the best and the worst of it a pair."""
    reads = {"best": "sft", "rejection": "sft", "pairs": "preference"}
    for kind, type in reads.items():
        for row in lines(drawn / f"{kind}.jsonl"):
            read_row(type, row)
    groups = lines(drawn / "groups.jsonl")
    assert len(groups) == 4 and all(len(group["responses"]) == 4 for group in groups)
    for group in groups:
        first = read_row("scored", group)
        found = [first, *first.branches]
        assert [one.reward for one in found] == group["scores"]
        assert [one.messages[-1] for one in found] == [said[-1] for said in group["responses"]]
        if len({*group["scores"]}) > 1:
            pair = read_row("preference", group)
            best = group["scores"].index(max(group["scores"]))
            assert pair.chosen == group["responses"][best]


def test_the_same_command_draws_nothing_and_writes_the_same(place, drawn):
    again = place / "again"
    shutil.copytree(drawn, again)
    for kind in KINDS:
        (again / f"{kind}.jsonl").unlink()
    before = (again / "responses.jsonl").read_bytes()
    judge = ("--reward_functions", f"{place / 'judge.py'}:f", "--threshold", "3")
    more = (*judge, "--num_samples", "4", "--keep_truncated", "--write", *KINDS)
    sampled(place, "again", *more)
    assert (again / "responses.jsonl").read_bytes() == before
    for kind in KINDS:
        assert (again / f"{kind}.jsonl").read_text() == (drawn / f"{kind}.jsonl").read_text()


@pytest.fixture(scope="module")
def with_values(place) -> str:
    """A copy of the model with heads that prefer one token everywhere: its name and that token."""
    shutil.copytree(place / "model", place / "values")
    heads = ILQLHeads(64, 384)
    with torch.no_grad():
        for head in (heads.q1, heads.q2):
            head[2].bias[tiny_tokenizer()("z")["input_ids"][0]] = 40.0
    heads.sync(1.0)
    save_file(tensors_of(heads, dict(heads.state_dict())), place / "values" / FILE)
    return "values"


def texts(folder: Path) -> list[str]:
    return [row["text"] for row in lines(folder / "responses.jsonl")[1:]]


def test_a_model_of_ilql_is_sampled_by_its_values_or_by_its_policy(place, with_values):
    guided = sampled(place, "guided", "--num_samples", "2", model=with_values)
    policy = sampled(place, "policy", "--num_samples", "2", "--beta_gen", "0", model=with_values)
    plain = sampled(place, "plain", "--num_samples", "2")
    assert set(texts(guided)) == {"z" * 6}
    assert texts(policy) == texts(plain)


def test_servers_sample_by_the_policy_and_that_is_said(place, with_values):
    server = Server(load(place / "model", device="cpu").model)
    words = ["--model_path", str(place / with_values), "--input", str(place / "prompts.jsonl")]
    words += ["--output_dir", str(place / "served"), "--num_samples", "2", *NEW]
    try:
        code, said = ended("sample", [*words, "--rollout_url", server.url])
    finally:
        server.stop()
    assert code == 0 and "responses are the policy's" in said
    plain = sampled(place, "here", "--num_samples", "2")
    assert sorted(texts(place / "served")) == sorted(texts(plain))


def test_responses_by_other_values_are_not_gone_on_from(place, with_values):
    folder = sampled(place, "weighed", "--num_samples", "2", model=with_values)
    words = ["--model_path", str(place / with_values), "--input", str(place / "prompts.jsonl")]
    words += ["--output_dir", str(folder), "--num_samples", "2", *NEW]
    code, said = ended("sample", [*words, "--beta_gen", "0"])
    assert code == 1 and "beta_gen null, now 0.0" in said
    file = place / with_values / FILE
    kept = file.read_bytes()
    file.write_bytes(kept[:-4] + b"\1\1\1\1")
    code, said = ended("sample", words)
    file.write_bytes(kept)
    assert code == 1 and "other settings: model {" in said


def evaluated(place: Path, output: str, model: str, *more: str) -> dict[str, dict]:
    """The measures by name."""
    words = ["--model_path", str(place / model), "--perplexity", str(place / "text.txt")]
    words += ["--input", str(place / "prompts.jsonl"), "--output_dir", str(place / output)]
    code, said = ended("evaluate", [*words, *NEW, "--num_samples", "3", *more])
    assert code == 0, said
    found = json.loads((place / output / "results.json").read_text())
    return {one["name"]: one for one in found["measures"]} | {"compared": found["compared"]}


def test_a_model_is_measured_and_compared_row_by_row(place, with_values):
    """Responses are those that the values choose, perplexity is the policy's."""
    plain = evaluated(place, "first", "model")
    name = "perplexity of text.txt"
    assert [*plain] == ["pass@1", "pass@3", "avg@3", "maj@3", name, "compared"]
    assert plain["pass@3"]["count"] == 4 and 1 < plain[name]["value"] < 1000
    found = evaluated(place, "second", with_values, "--baseline", str(place / "first"))
    assert found[name]["value"] == pytest.approx(plain[name]["value"], rel=1e-6)
    assert found["pass@3"]["value"] == 0.0  # no answer is z
    assert {each["name"]: each["p"] for each in found["compared"]}[name] == 1.0
