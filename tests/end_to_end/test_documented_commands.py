"""The command lines of the older documents train a step and leave a model that loads.

Paths are those of a tiny model and a few rows, processes two at most (four where a sequence is
split over four), and ``--max_steps 1`` is added; everything else is as printed.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.documented import Command, documented_commands
from tests.distributed.spawn import run
from tests.end_to_end.inputs import prepare, short_lines, write_model
from tests.end_to_end.worker import Ended, Run

pytestmark = pytest.mark.matrix

COMMANDS = {f"{number:02d} {c.source}": c for number, c in enumerate(documented_commands("sft"))}


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """What the documents' variables stand for, apart from the directories of a run."""
    folder = tmp_path_factory.mktemp("documented")
    model = write_model(folder / "model", num_key_value_heads=4, max_position_embeddings=2048)
    rows = [json.loads(line)["messages"] for line in short_lines(0, 60).splitlines()]
    raw = [
        {"instruction": row[0]["content"], "input": "", "output": row[1]["content"]} for row in rows
    ]
    (folder / "raw.json").write_text(json.dumps(raw), encoding="utf-8")
    return {
        "PRETRAINED_MODEL_PATH": model,
        "PRETRAINED_TOKENIZER_PATH": model,
        "dataset": prepare(folder / "data", short_lines(0, 60), max_length=512),
        "RAW_DATASET": str(folder / "raw.json"),
    }


def flags(command: Command, variables: dict[str, str], folder: Path) -> list[str]:
    words = command.words(
        variables | {"SAVE_DIR": str(folder / "out"), "CONFIG_FILE": str(folder / "flags.json")}
    )
    script = next(index for index, word in enumerate(words) if word.endswith("train_sft.py"))
    return [*words[script + 1 :], "--max_steps", "1"]


@pytest.fixture(scope="module")
def ended(variables, tmp_path_factory) -> dict[str, tuple[Path, list[Ended]]]:
    """name -> where it ran and how its ranks ended. The commands of one plugin share a launch,
    plugins never do."""
    folder = tmp_path_factory.mktemp("commands")
    places = {name: folder / name[:2] for name in COMMANDS}
    groups: dict[tuple[str, int], dict[str, Run]] = {}
    for name, command in COMMANDS.items():
        places[name].mkdir()
        words = flags(command, variables, places[name])
        processes = 4 if "--enable_sequence_parallelism" in words else min(command.processes, 2)
        plugin = words[1 + words.index("--plugin" if "--plugin" in words else "--strategy")]
        groups.setdefault((plugin, processes), {})[name] = Run(words)
    env = {
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    found = {}
    for (_, processes), runs in groups.items():
        ranks = run(processes, "tests.end_to_end.worker:train_each", runs, env=env, timeout=200)
        found |= {name: (places[name], [rank[name] for rank in ranks]) for name in runs}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_trains_a_step_and_leaves_a_model(ended, name):
    from coati.models.loading import load_causal_lm
    from coati.models.tokenizer import load_tokenizer

    place, ranks = ended[name]
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks[0].err
    assert "the trained" in ranks[0].err and len(ranks[0].rows) == 1
    model = load_causal_lm(place / "out" / "modeling", dtype="fp32").eval()
    tokenizer = load_tokenizer(place / "out" / "modeling")
    assert tokenizer.chat_template is not None
    with torch.no_grad():
        assert model(**tokenizer("Hello", return_tensors="pt")).logits.isfinite().all()
    if "$CONFIG_FILE" in COMMANDS[name].text:
        assert json.loads((place / "flags.json").read_text())["save_dir"] == str(place / "out")
    if "--use_flash_attn" in COMMANDS[name].text:
        assert "scaled_dot_product_attention is used instead" in ranks[0].err
    if "$RAW_DATASET" in COMMANDS[name].text:
        assert json.loads((place / "out" / "arguments.json").read_text())["max_samples"] in (
            50,
            512,
            1000,
        )


def test_offline_wandb_records_the_runs(ended):
    place, _ = ended[next(iter(COMMANDS))]
    assert list((place.parent / "wandb").glob("offline-run-*/*.wandb"))
