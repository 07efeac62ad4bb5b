"""What is wrong with the files of a model or tokenizer directory, in one sentence each. Imports
nothing heavy."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coati.utils.json_io import load_object

# Files that hold one JSON object each, in the order in which loaders read them.
SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)
OBJECTS = (*SMALL, "tokenizer.json", "vocab.json")  # those of tokenizers are megabytes
# Sizes under the names of several families: whole numbers, or one a layer.
SIZES = (
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
)
NEVER_NULL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
AGAIN = "copy it again from where the model is from"
# Of the language model itself, not of a vision tower beside it
LAYER = re.compile(
    r"^(?:(?:model|transformer|gpt_neox|backbone|decoder|language_model)\.)*(?:layers|h|blocks)"
    r"\.(\d+)\."
)


def check_small_files(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, for a small JSON file of a directory that is damaged, and
    for impossible sizes in ``config.json``. Hub names pass."""
    folder = Path(path)
    for name in SMALL:
        if (folder / name).is_file():
            found = _object(folder / name)
            check_types(folder / name, found)
            if name == "config.json":
                check_sizes(folder / name, found)


def damaged_file(path: str | os.PathLike) -> str | None:
    """What is wrong with the first damaged JSON file of a directory; None where all are objects."""
    for name in OBJECTS:
        if (Path(path) / name).is_file():
            try:
                _object(Path(path) / name)
            except ValueError as error:
                return str(error)
    return None


def _object(file: Path) -> dict[str, Any]:
    try:
        return load_object(file)
    except ValueError as error:
        raise ValueError(f"{error}; {AGAIN}") from error


def check_sizes(file: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a size in a configuration, or in its language model's part, that is no
    whole number of at least 1."""
    parts = [("", config)]
    if isinstance(config.get("text_config"), dict):
        parts.append(("text_config.", config["text_config"]))
    for before, part in parts:
        for name in SIZES:
            value = part.get(name)
            values = value if isinstance(value, list) else [value]
            counts = value is not None or (name in part and name in NEVER_NULL)
            if counts and not all(_is_size(each) for each in values):
                raise ValueError(
                    f"{file}: {before}{name} is {value!r}; expected a whole number of at least 1. "
                    "Put back the config.json that these weights came with"
                )


def check_types(file: Path, content: dict[str, Any]) -> None:
    """Raise ValueError for a field whose type loaders do not look at, or trip over."""
    for name, (fits, wanted) in TYPES.items():
        value = content.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{file}: {name} is {value!r}; expected {wanted}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_token(value: Any) -> bool:
    return isinstance(value, str | dict)


def _are_ids(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


IDS = (_are_ids, "a token id, a list of them, or null")
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (_is_text, "the name of a model family, llama say"),
    "architectures": (_are_texts, "a list of names of classes"),
    "auto_map": (_is_object, "an object: name of a class of transformers -> file.Class"),
    "quantization_config": (_is_object, "an object"),
    "dtype": (_is_text, "the name of a type, bfloat16 say"),
    "torch_dtype": (_is_text, "the name of a type, bfloat16 say"),
    "eos_token_id": IDS,
    "bos_token_id": IDS,
    "pad_token_id": IDS,
    **{
        name: (_is_number, "a number")
        for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")
    },
    **{
        f"{name}_token": (_is_token, "a text, an object, or null")
        for name in ("bos", "eos", "pad", "unk")
    },
    "tokenizer_class": (_is_text, "the name of a class"),
    "model_max_length": (_is_number, "a number"),
    "chat_template": (lambda value: isinstance(value, str | list | dict), "Jinja text"),
}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_index(path: str | os.PathLike) -> None:
    """Raise ValueError for an index of weights that names files which are not there, and for files
    of weights without a byte."""
    folder = Path(path)
    for index in sorted(folder.glob("*.index.json")):
        shards = _object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index}: no weight_map, which says where each weight is; {AGAIN}")
        names = sorted({str(name) for name in shards.values()})
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(
                f"{index}: {len(missing)} of {len(names)} files of weights are not there, the "
                f"first: {missing[0]}; the copy is incomplete"
            )
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for file in sorted(folder.glob(pattern)):
            if not file.is_file():
                raise ValueError(f"{file} is no file that can be read; {AGAIN}")
            if not file.stat().st_size:
                raise ValueError(f"{file} is empty: no weights in it; {AGAIN}")


def check_adapter(path: str | os.PathLike) -> None:
    """Raise ValueError for an adapter's directory without weights, or of another kind than LoRA."""
    folder = Path(path)
    if not folder.is_dir():
        return
    file = folder / "adapter_config.json"
    settings = _object(file)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}; expected LORA, the one that is read here")
    if not _is_size(settings.get("r")):
        raise ValueError(
            f"{file}: r is {settings.get('r')!r}; expected the rank, a whole number of at least 1"
        )
    weights = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    held = [each for each in weights if each.is_file()]
    if not held:
        raise ValueError(f"{path}: no adapter_model.safetensors; the copy is incomplete")
    if not held[0].stat().st_size:
        raise ValueError(f"{held[0]} is empty: no weights in it; {AGAIN}")


def mismatch(path: str | os.PathLike, model_class: str, keys: Sequence[Any]) -> str:
    """One sentence about weights of other shapes than the configuration says; ``keys``: (name,
    shape in the file, shape of the model), as transformers reports them; None for what it does
    not."""
    name, there, wanted = sorted(keys, key=lambda key: key[0])[0]
    there = there if there is not None else _shape_in_file(Path(path), name)
    found = f" {tuple(there)} in the file and" if there is not None else ""
    shape = f" is{found} {tuple(wanted)} by config.json" if wanted is not None else ""
    return (
        f"{path}: {len(keys)} weights have other shapes than {model_class} by config.json, the "
        f"first: {name}{shape}; put back the config.json that these weights came with, or the "
        "weights"
    )


def _shape_in_file(directory: Path, name: str) -> Sequence[int] | None:
    from safetensors import safe_open

    for file in directory.glob("*.safetensors") if directory.is_dir() else ():
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_slice(name).get_shape()
    return None


def check_layers(path: str | os.PathLike, unexpected: Sequence[str], layers: int | None) -> None:
    """Raise ValueError for weights of layers that a model of ``layers`` layers does not have: it
    would be cut off without a word."""
    numbers = [(int(found[1]), key) for key in unexpected if (found := LAYER.search(key))]
    beyond = [key for number, key in numbers if layers is not None and number >= layers]
    if beyond:
        raise ValueError(
            f"{path}: {len(beyond)} weights are of layers that the model does not have by "
            f"config.json (num_hidden_layers {layers}), the first: {min(beyond)}; put back the "
            "config.json that these weights came with"
        )


def damaged_weights(directory: Path) -> Path | None:
    """The first file of weights in a directory that is not of the kind that its name says."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return file
    for file in sorted(directory.glob("*_model*.bin")) if directory.is_dir() else ():
        with open(file, "rb") as stream:
            start = stream.read(2)
        if start not in (b"PK", b"\x80\x02"):  # a zip archive, or the older pickle
            return file
    return None


def shortened(text: str, most: int = 400) -> str:
    """``text``, without its middle where it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """``config.json`` of a directory as it stands there; empty where there is none (a hub name,
    say)."""
    file = Path(path) / "config.json"
    return load_object(file) if file.is_file() else {}
