"""Reward models and critics from disk: with their head, or with a new one when the caller says that
is meant."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coati.models.attention_choice import caps_scores, eager_note
from coati.models.directory_files import read_config
from coati.models.loading import DTYPES, adapter_base, load_configuration, quantized
from coati.models.loading_errors import explained
from coati.utils.logging import get_logger

logger = get_logger(__name__)

Scalar = TypeVar("Scalar", bound=nn.Module)
# This library's name first; the second is what ColossalChat's own directories use.
HEADS = ("score", "value_head")
_SINGLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


def load_scalar_model(kind: Any, path: str | os.PathLike, **options: Any) -> Any:
    """:meth:`~coati.models.base.BaseModel.from_pretrained` of ``kind``, RewardModel or Critic."""
    return kind.from_pretrained(path, **options)


def saved_head(
    kind: str, path: str | os.PathLike, new_head: bool = False
) -> dict[str, Tensor] | None:
    """:func:`head_state` of ``path`` for a model of ``kind`` ("reward", "critic"); None where a new
    head is to be drawn.

    Raises ValueError when a head is wanted and not there, or it is a critic's and not a score.
    """
    try:
        state = head_state(path)
    except Exception as error:  # safetensors and pickle have error classes of their own
        raise explained(path, "model", error) from error
    if state is None:
        if adapter_base(path):
            raise ValueError(
                f"{path}: this LoRA adapter has no scalar head; it was not trained by coati rm"
            )
        if not new_head:
            raise ValueError(
                f"{path} has no scalar head (score.weight): it is a language model, not a reward "
                "model. Train one from it with coati rm, or name the directory that "
                "coati rm wrote"
            )
        logger.info(f"{path} has no scalar head: it is taken as the base, and a new head is drawn.")
    elif kind == "reward" and read_config(path).get("coati_head") == "critic":
        raise ValueError(
            f"{path} is a critic: its head gives the values of states, not the scores of responses"
        )
    return state


def load_scalar_weights(
    kind: type[Scalar],
    architecture: str | os.PathLike,
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantize_base: str | None = None,
) -> Scalar:
    """The reward model (or critic) whose weights and head lie in ``path`` without a configuration,
    as ColossalChat's checkpoints have them; ``architecture``: a directory or hub name with the
    configuration, its weights are not read.

    Raises ValueError when the head or weights of the backbone are missing, or others are there.
    """
    from transformers import AutoModel

    head = head_state(path)
    if head is None:
        raise ValueError(
            f"{path}: no scalar head (score.weight, value_head.weight) among its weights"
        )
    config = load_configuration(architecture, trust_remote_code)
    if caps_scores(config) and attn_implementation in (None, "sdpa"):
        logger.warning_once(eager_note(config))
        attn_implementation = "eager"
    keywords = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = kind(
        backbone=AutoModel.from_config(config, trust_remote_code=trust_remote_code, **keywords)
    )
    tensors = _backbone_tensors(path, f"{model.base_model_prefix}.")
    try:
        model.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        text = str(error).split("\n\t", 2)[1]
        raise ValueError(f"{path}: not the weights of {architecture} ({text[:300]})") from error
    model.train_padding()
    set_head(model.score, head, path)
    kept = next(iter(tensors.values())).dtype if dtype == "auto" else getattr(torch, DTYPES[dtype])
    return quantized(model.to(kept), quantize_base, dtype)


def _backbone_tensors(path: str | os.PathLike, prefix: str) -> dict[str, Tensor]:
    """Every tensor of the files of ``path`` but heads, without the name that the backbone had
    there: a wrapper's ``model.`` or its own ``prefix``."""
    tensors: dict[str, Tensor] = {}
    for file in sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("pytorch_model*.bin")]):
        tensors |= {name: _tensor(str(file), name) for name in _names_in(str(file))}
    heads = (*(f"{head}." for head in HEADS), "lm_head.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}
    for before in (prefix, "model."):
        if all(name.startswith(before) for name in tensors):
            return {name.removeprefix(before): tensor for name, tensor in tensors.items()}
    return tensors


def set_head(head: nn.Linear, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Put ``weight`` and perhaps ``bias`` of :func:`head_state` into ``head``. Raises ValueError
    for another shape."""
    found = tuple(state["weight"].shape)
    wanted = tuple(head.weight.shape)
    if found[0] != 1:
        raise ValueError(
            f"{path}: its head gives {found[0]} numbers, a classifier of {found[0]} labels; "
            "expected 1"
        )
    if found != wanted:
        raise ValueError(
            f"{path}: its head is {found}, the backbone has states of width {wanted[1]}: another "
            "model's?"
        )
    with torch.no_grad():
        head.weight.copy_(state["weight"])
        head.bias.copy_(state.get("bias", torch.zeros(1)))


def head_state(path: str | os.PathLike) -> dict[str, Tensor] | None:
    """``weight`` and perhaps ``bias`` of the scalar head among the weights of ``path``, or None."""
    from transformers.utils import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    for name in _SINGLE:
        if file := cached_file(path, name, **quiet):
            return _head_in(lambda _, file=file: file, _names_in(file))
        if index := cached_file(path, f"{name}.index.json", **quiet):
            with open(index, encoding="utf-8") as text:
                places = json.load(text)["weight_map"]
            return _head_in(lambda key, places=places: cached_file(path, places[key]), set(places))
    return None


def _names_in(file: str) -> set[str]:
    if file.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    return set(torch.load(file, weights_only=True, mmap=True))


def _head_in(place, names: set[str]) -> dict[str, Tensor] | None:
    for head in HEADS:
        for prefix in ("", "base_model.model."):
            if f"{prefix}{head}.weight" in names:
                keys = {part: f"{prefix}{head}.{part}" for part in ("weight", "bias")}
                return {
                    part: _tensor(place(key), key) for part, key in keys.items() if key in names
                }
    return None


def _tensor(file: str, key: str) -> Tensor:
    if file.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(key)
    return torch.load(file, weights_only=True, mmap=True)[key].clone()
