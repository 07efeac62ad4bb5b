"""--embedding_lr in the training commands that have it: the embedding learns at its own rate."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dataset.stream.streams import write_lines
from tests.end_to_end.inputs import write_model
from tests.end_to_end.malformed import ended

PAIRS = [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(4)]
LABELED = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(4)]
TALKS = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(4)]
ROWS = {"sft": TALKS, "rm": PAIRS, "dpo": PAIRS, "orpo": PAIRS, "kto": LABELED}
ROWS |= {"gkd": TALKS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("verb", ROWS)
def test_only_what_has_the_rate_moves_by_it(verb, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_lines(tmp_path / "rows.jsonl", ROWS[verb])
    words = ["--pretrain", model, "--dataset", str(tmp_path / "rows.jsonl"), "--batch_size", "4"]
    words += ["--accumulation_steps", "1", "--max_steps", "1", "--warmup_steps", "0"]
    words += ["--plugin", "ddp", "--mixed_precision", "fp32", "--weight_decay", "0"]
    if verb == "gkd":
        words += ["--teacher", write_model(tmp_path / "teacher", intermediate_size=48)]
    words += ["--lr", "1e-9", "--embedding_lr", "1e-2", "--save_dir", str(tmp_path / "run")]
    code, said = ended(verb, words)
    assert code == 0, said
    before = weights(Path(model))
    after = weights(tmp_path / "run" / "modeling")
    assert json.loads((tmp_path / "run" / "arguments.json").read_text())["embedding_lr"] == 1e-2
    moved = {
        name.rpartition("model.")[2]
        for name, weight in after.items()
        if (old := before.get(name)) is not None and (weight - old).abs().max() > 1e-4
    }
    head = set() if verb == "rm" else {"lm_head.weight"}  # a reward model has none
    assert moved == {"embed_tokens.weight"} | head & before.keys()
