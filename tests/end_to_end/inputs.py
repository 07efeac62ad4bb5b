"""What the runs of this folder start from: a tiny model directory and some real rows prepared by
the library."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "examples" / "data" / "sft.jsonl"
MAX_LENGTH = 96


def write_model(folder: Path, **changes: Any) -> str:
    """A Hugging Face directory: a random Llama of 2 layers and its tokenizer. ``changes`` are
    config fields."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny_llama()
    if changes:
        fields = model.config.to_dict() | changes
        del fields["head_dim"]  # follows from the others
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def of_family(family: str):
    """A tiny model of docs/models.md, in which the family's windows, sinks and experts matter."""
    from tests.models_table.families import BY_TYPE, tiny_model

    return tiny_model(BY_TYPE[family])


def write_family(folder: Path, family: str) -> str:
    """The directory of a tiny model of ``family`` and its tokenizer."""
    of_family(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def short_lines(first: int, rows: int, file: Path = SAMPLE) -> str:
    """``rows`` short rows of a sample, from its ``first`` one on, as JSON lines."""
    lines = [
        line
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(line) < 500
    ]
    return "".join(lines[first : first + rows])


def prepare(folder: Path, text: str, max_length: int = MAX_LENGTH, type: str = "sft") -> str:
    """The arrow directory of the JSON lines ``text``."""
    from coati.dataset import setup_conversation_template
    from coati.dataset.prepare.preparation import prepare_dataset

    folder.mkdir(parents=True)
    raw = folder / "rows.jsonl"
    raw.write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    prepare_dataset(
        inputs=[raw],
        tokenizer=tokenizer,
        tokenizer_name="tiny",
        template=setup_conversation_template(tokenizer, {}),
        arrow_dir=folder / "arrow",
        type=type,
        max_length=max_length,
        num_bins=2,
        num_proc=1,
        show=None,
    )
    return str(folder / "arrow")


# What the machine says of a run: no two runs share it.
MEASURED = ("_per_second", "/seconds_", "/mfu", "memory/", "peak_memory_mb")


def metrics(save_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without times and memory, which no two runs share."""
    lines = [
        json.loads(line) for line in (Path(save_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    kept = [
        {name: value for name, value in line.items() if not any(part in name for part in MEASURED)}
        for line in lines
    ]
    return [line for line in kept if line.keys() != {"step"}]


def weights(save_dir: Path) -> dict[str, bytes]:
    """Contents of the files of weights of the final model, by name."""
    folder = Path(save_dir) / "modeling"
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
