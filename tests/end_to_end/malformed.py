"""Malformed inputs of every verb: how each is made, what starts on it, and what is said."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.parallel.launch import shut_down
from coati.recipes import command

ROW = '{"messages":[{"from":"user","content":"q"},{"from":"assistant","content":"yes"}]}\n'


@dataclass(frozen=True)
class Place:
    """Where a case works: ``folder`` of its own, and good inputs that it may copy."""

    folder: Path
    model: Path
    reward_model: Path
    adapter: Path
    checkpoint: Path
    prepared: Path
    rows: dict[str, Path]

    def file(self, name: str, content: str | bytes) -> str:
        """A new file."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def copy(self, source: Path, change: Callable[[Path], object]) -> str:
        """A copy of a directory, after ``change``."""
        copy = self.folder / source.name
        shutil.copytree(source, copy)
        change(copy)
        return str(copy)


@dataclass(frozen=True)
class Case:
    """``verb`` with ``words`` besides the good ones, which ``model`` and ``rows`` replace;
    ``said``: what the one line must hold."""

    verb: str
    said: tuple[str, ...]
    model: Callable[[Place], str] | None = None
    rows: Callable[[Place], str] | None = None
    words: Callable[[Place], list[str]] | None = None
    code: int = 1


def good_words(verb: str, place: Place, model: str, rows: str | None) -> list[str]:
    """Words with which ``verb`` would succeed on good inputs, quickly."""
    out = str(place.folder / "out")
    training = ["--accumulation_steps", "1", "--plugin", "ddp", "--mixed_precision", "fp32"]
    training += ["--max_length", "96", "--save_dir", out, "--pretrain", model]
    if verb in ("sft", "pretrain", "rm", "dpo", "orpo", "kto", "gkd", "ilql"):
        kinds = {"sft": "sft", "pretrain": "sft", "kto": "kto", "gkd": "sft", "ilql": "kto"}
        data = rows or str(place.rows[kinds.get(verb, "pairs")])
        training += ["--teacher", str(place.model)] * (verb == "gkd")
        return [*training, "--dataset", data, "--batch_size", "2", "--max_steps", "1"]
    if verb in ("ppo", "grpo", "online-dpo"):
        own = ["--rm_pretrain", str(place.reward_model), "--experience_batch_size", "4"]
        if verb == "grpo":
            own = ["--reward_functions", "length", "--experience_batch_size", "2"]
            own += ["--num_generations", "2"]
        if verb == "online-dpo":
            own = ["--reward_functions", "length", "--experience_batch_size", "4"]
        collect = ["--num_episodes", "1", "--num_collect_steps", "1", "--train_batch_size", "4"]
        data = rows or str(place.rows["prompts"])
        return [*training, *collect, *own, "--max_seq_len", "8", "--prompt_dataset", data]
    if verb == "prepare":
        outputs = ["jsonl_output", "arrow_output", "cache"]
        places = [word for name in outputs for word in (f"--data_{name}_dir", f"{out}-{name}")]
        data = rows or str(place.rows["sft"])
        given = ["--type", "sft", "--num_proc", "1", "--tokenizer_dir", model]
        return [*given, "--data_input_dirs", data, *places]
    return _of_programs(verb, model, rows, place, out)


def ended(verb: str, words: list[str]) -> tuple[int | str, str]:
    """The exit code of the command, and standard error."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            command.run(verb, words, prog=f"coati {verb}")
        except SystemExit as end:
            return end.code or 0, error.getvalue()
        finally:
            shut_down()  # a run that fails leaves its group to the end of the process
    return 0, error.getvalue()


def _of_programs(verb: str, model: str, rows: str | None, place: Place, out: str) -> list[str]:
    pairs = rows or str(place.rows["pairs"])
    prompts = rows or str(place.rows["prompts"])
    loaded = ["--model_path", model]
    new = ["--max_new_tokens", "4"]
    words = {
        "chat": [*loaded, "--prompt", "hi", "--io", "simple", *new],
        "score": [*loaded, "--input", pairs],
        "compare": [*loaded, "--start_path", str(place.model), "--input", prompts, *new]
        + ["--reward_functions", "length"],
        "sample": [*loaded, "--input", prompts, "--output_dir", out, *new]
        + ["--num_samples", "2", "--reward_functions", "length"],
        "evaluate": [*loaded, "--perplexity", pairs, "--output_dir", out, *new],
        "export": [*loaded, "--output_dir", out],
        "merge": [*loaded, "--output_dir", out],
        "quantize": [*loaded, "--output_dir", out, "--method", "rtn", "--eval", pairs],
        "measure": [*loaded, "--batch_size", "1", "--new_tokens", "2"],
        "serve": [*loaded, "--http_port", "0"],
        "rollout-server": [*loaded, "--http_port", "0", "--engine", "own"],
        "fit": ["--model", model, "--memory", "24GB"],
        "report": ["--run_dir", model],
        "init": ["--verb", "sft"],
        "sample-prompts": ["--dataset_path", prompts, "--save_path", f"{out}.json"],
    }
    return words[verb]


# How a model directory is damaged


def with_file(name: str, content: str | bytes) -> Callable[[Place], str]:
    """The good model with another file ``name``."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return lambda place: place.copy(place.model, write)


def with_config(**changes: Any) -> Callable[[Place], str]:
    """The good model with other fields in its configuration."""
    return lambda place: place.copy(place.model, lambda folder: edit(folder, **changes))


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    """Other fields in a JSON file."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Only the first ``size`` bytes of the files of that pattern."""

    def change(folder: Path) -> None:
        for file in folder.rglob(name):
            os.truncate(file, size)

    return change


def with_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Place], str]:
    """The good model with what ``change`` makes of its weights."""

    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return lambda place: place.copy(place.model, rewrite)


def indexed(folder: Path) -> None:
    """An index in place of the weights, which names two files that are not there."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {f"model.layers.{i}.x": name for i, name in enumerate(names)}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def tokenizer_json(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Place], str]:
    """The good model with what ``change`` makes of its tokenizer.json."""

    def rewrite(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return lambda place: place.copy(place.model, rewrite)


def adapter(**changes: Any) -> Callable[[Place], str]:
    """The good adapter with other settings of peft."""
    return lambda place: place.copy(
        place.adapter, lambda folder: edit(folder, "adapter_config.json", **changes)
    )


def reward(text: str | bytes) -> Callable[[Place], list[str]]:
    """The flag of a reward function ``f`` in a file of that text."""
    return lambda place: ["--reward_functions", f"{place.file('reward.py', text)}:f"]


def flag(name: str, file: str, content: str | bytes) -> Callable[[Place], list[str]]:
    """``--name`` with a new file."""
    return lambda place: [f"--{name}", place.file(file, content)]


def begun(name: str, content: str) -> Callable[[Place], list[str]]:
    """``--output_dir`` with a file in it already."""

    def write(place: Place) -> list[str]:
        folder = place.folder / "begun"
        folder.mkdir()
        (folder / name).write_text(content)
        return ["--output_dir", str(folder)]

    return write


def below_a_file(name: str) -> Callable[[Place], list[str]]:
    """``--name`` with a place below a file."""
    return lambda place: [f"--{name}", place.file("file", "x") + "/below"]


def folder(flag: str) -> Callable[[Place], list[str]]:
    """``flag`` with a directory that is there."""
    return lambda place: [flag, str(place.folder)]


def rows(name: str, content: str | bytes) -> Callable[[Place], str]:
    """Data in a new file."""
    return lambda place: place.file(name, content)


def prepared(change: Callable[[Path], object]) -> Callable[[Place], str]:
    """Prepared rows after ``change``."""
    return lambda place: place.copy(place.prepared, change)


def checkpoint(change: Callable[[Path], object]) -> Callable[[Place], list[str]]:
    """``--checkpoint_path`` of a checkpoint after ``change``."""
    return lambda place: ["--checkpoint_path", place.copy(place.checkpoint, change)]
