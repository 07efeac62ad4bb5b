"""docs/extending.md: each diff applies to this checkout, costs what the page says, and works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "extending.md"

# section of the page -> most files, most added lines, and a program that uses what was added
PAIRWISE = """
import math, torch
from coati.cli.preferences import dpo_parser
from coati.models.pairwise_loss import Pair, PairwiseObjective

one = torch.ones(1)
loss = PairwiseObjective.of("dpop", beta=0.1)
# c = -1, r = -2, so d = 1 and x = 0.1 (1 - 50 * 1) = -4.9
pair = Pair(-one, -2 * one, 0 * one, 0 * one, one, one)
assert math.isclose(float(loss(pair)), math.log1p(math.exp(4.9)), rel_tol=1e-6)
# c = 1, r = 0: nothing is added to DPO
pair = Pair(one, 0 * one, 0 * one, 0 * one, one, one)
assert math.isclose(float(loss(pair)), math.log1p(math.exp(-0.1)), rel_tol=1e-6)
assert math.isclose(loss.at_reference(), math.log(2), rel_tol=1e-6)
assert dpo_parser().parse_args(["--loss_type", "dpop", "sft"]).loss_type == ["dpop", "sft"]
"""
TRAINER = """
import json, math, subprocess, sys, torch
from coati.trainer.rwr import RWRObjective
from tests.tiny import tiny_llama, tiny_tokenizer

batch = {
    "input_ids": torch.tensor([[1, 2, 3], [1, 2, 3]]),
    "attention_mask": torch.ones(2, 3).long(),
    "loss_mask": torch.tensor([[0, 1, 1], [0, 0, 1]]),
    "label": torch.tensor([True, False]),
}
objective = RWRObjective(beta=0.5)
batch = objective.prepare(batch)
assert int(objective.num_terms(batch)) == 3
# rewards 1 and 0 weigh e^2 and 1: e^2 (0.1 + 0.2) + 0.4
loss, metrics = objective.loss(torch.tensor([-0.1, -0.2, -0.4]), batch)
assert math.isclose(float(loss), math.exp(2) * 0.3 + 0.4, rel_tol=1e-6)
assert torch.allclose(metrics["weight"].values, torch.tensor([math.exp(2), 1.0]))

tiny_llama().save_pretrained("tiny")
tiny_tokenizer().save_pretrained("tiny")
words = ["--pretrain", "tiny", "--dataset", "examples/data/kto.jsonl", "--max_samples", "8"]
words += ["--beta", "0.5", "--max_steps", "1", "--accumulation_steps", "1", "--save_dir", "out"]
subprocess.run([sys.executable, "-m", "coati", "rwr", *words], check=True)
line = json.loads(open("out/metrics.jsonl").readline())
assert math.isfinite(line["train/loss"]) and 1 <= line["train/weight"] <= math.exp(2)
"""
DATA_TYPE = """
import json, subprocess, sys
from coati.dataset import load_tokenized_dataset
from tests.tiny import tiny_tokenizer

tokenizer = tiny_tokenizer()
tokenizer.save_pretrained("tiny")
text = "hello there, how are you today? " * 8
with open("text.jsonl", "w") as file:
    file.write(json.dumps({"text": text}))
words = ["--type", "windows", "--data_input_dirs", "text.jsonl", "--tokenizer_dir", "tiny"]
words += ["--max_length", "16", "--data_jsonl_output_dir", "rows/jsonl"]
words += ["--data_arrow_output_dir", "rows/arrow", "--data_cache_dir", "rows/cache"]
script = "examples/data_preparation_scripts/prepare_dataset.py"
subprocess.run([sys.executable, script, *words, "--num_spliced_dataset_bins", "1"], check=True)
rows = load_tokenized_dataset(["rows/arrow"])
whole = [*tokenizer.encode(text), tokenizer.eos_token_id]
predicted = [token for row in rows for token in row["labels"] if token != -100]
assert len(rows) > 2 and max(map(len, rows["input_ids"])) == 16
assert predicted == whole[1:]
assert all(row["labels"][:8] == [-100] * 8 for row in list(rows)[1:])
"""
ROW_FORMAT = """
from coati.dataset.rows.formats import read_row

row = {"qid": 7, "question": "1 + 1?", "response_j": "2", "response_k": "3"}
found = read_row("preference", row)
assert found.format == "stack_exchange"
assert found.messages == [{"role": "user", "content": "1 + 1?"}]
assert found.chosen == [{"role": "assistant", "content": "2"}]
assert found.rejected == [{"role": "assistant", "content": "3"}]
"""
PLUGIN = """
import torch
from coati.parallel.boost import boost
from coati.parallel.launch import launch
from coati.parallel.plugins import ParallelOptions
from coati.trainer.sft import SFTObjective
from tests.tiny import tiny_llama

launch(0)
ids = torch.tensor([[5, 6, 7, 8]])
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
trained = []
for plugin in ("ddp", "zero1"):
    model = tiny_llama()
    engine = boost(model, ParallelOptions(plugin=plugin, precision="fp32"), lr=1e-2)
    step = engine.train_step([batch], SFTObjective())
    trained.append((step.loss, engine.module.lm_head.weight.detach().clone()))
assert abs(trained[0][0] - trained[1][0]) < 1e-6
assert torch.allclose(trained[0][1], trained[1][1], atol=1e-6)
"""
REWARD = """
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards

batch = Responses(["say something"] * 3, ["It is.", "It is", "Is it? "])
assert Rewards(["ends"])(batch).total == [1.0, 0.0, 1.0]
"""
FLAG = """
from coati.cli.arguments import parse_sft
from coati.cli.rollouts import parse_ppo
from coati.parallel.optimizer import build_optimizer
from coati.parallel.plugins import ParallelOptions
from tests.tiny import tiny_llama

words = ["--pretrain", "coati", "--dataset", "examples/data/sft.jsonl", "--adam_eps", "1e-6"]
settings = parse_sft(words).optimizer
assert settings.adam_eps == 1e-6
optimizer = build_optimizer(tiny_llama(), ParallelOptions(plugin="ddp"), settings)
assert optimizer.param_groups[0]["eps"] == 1e-6
words = ["--pretrain", "coati", "--prompt_dataset", "examples/data/prompt.jsonl"]
words += ["--rm_pretrain", "coati", "--adam_eps", "1e-5"]
assert parse_ppo(words).optimizer.adam_eps == 1e-5
"""
EXTENSIONS = {
    "A pairwise loss": (2, 12, PAIRWISE),
    "A trainer": (4, 120, TRAINER),
    "A data type": (2, 60, DATA_TYPE),
    "A row format": (2, 8, ROW_FORMAT),
    "A plugin": (1, 12, PLUGIN),
    "A reward function": (2, 8, REWARD),
    "A flag": (3, 12, FLAG),
}


def diffs() -> dict[str, str]:
    """The diffs of the page by section; those of one section are one change."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for title, text in zip(sections[0::2], sections[1::2], strict=True):
        blocks = re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if blocks:
            found[title] = "".join(blocks)
    return found


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    names = ["git", "ls-files", "-z", "coati", "examples", "tests", "pyproject.toml"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture
def checkout(tracked, tmp_path) -> Path:
    """A copy of the files that git tracks."""
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def ran(checkout: Path, *words: str, **keywords) -> subprocess.CompletedProcess:
    """A program run in ``checkout``, which it takes for no part of a repository around it."""
    places = {"PYTHONPATH": str(checkout), "GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    return subprocess.run(
        words, cwd=checkout, env=os.environ | places, capture_output=True, text=True, **keywords
    )


def test_every_section_has_its_program():
    assert list(diffs()) == list(EXTENSIONS)


@pytest.mark.parametrize("section", EXTENSIONS)
def test_a_change_of_the_page(section, checkout):
    most_files, most_lines, program = EXTENSIONS[section]
    diff = diffs()[section]
    files = re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)
    added = re.findall(r"^\+(?!\+\+ )(.*)$", diff, re.MULTILINE)
    assert len(files) <= most_files, files
    assert len(added) <= most_lines, f"{len(added)} lines are added, at most {most_lines}"
    assert max(map(len, added)) <= 100
    steps = [
        (["git", "apply", "-"], diff),
        ([sys.executable, "-m", "ruff", "format", "--no-cache", "--check", *files], None),
        ([sys.executable, "-c", program], None),
    ]
    for words, given in steps:
        done = ran(checkout, *words, input=given)
        assert done.returncode == 0, f"{section}: {words[:4]}\n{done.stdout}{done.stderr}"
