"""Adapters on disk: a directory that plain peft reads, and from which training goes on to the
bit."""

import copy
import os
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coati.models.loading import CHAIN
from coati.models.loading import LORA_SETTINGS as SETTINGS
from coati.models.lora.chained import PREFIX, earlier_adapters, is_chained, join, told
from coati.models.lora.lora import LoraConfig
from coati.utils.json_io import load_json, save_json
from coati.utils.logging import get_logger
from coati.utils.output_paths import open_like_folder

logger = get_logger(__name__)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Settings without which the tensors of an adapter mean something else.
_OF_THE_RUN = (
    *("r", "lora_alpha", "lora_train_bias", "lora_initialization_method"),
    *("use_dora", "use_rslora"),
)
# DoRA's magnitudes are a module in a model and a tensor in a file.
_ADAPTER_NAME = re.compile(
    r"(\.lora_(?:embedding_)?[AB])\.default|(\.lora_magnitude_vector)\.default\.weight"
)


def save_lora(
    model: nn.Module, directory: str | os.PathLike, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter of ``model`` (a PeftModel of ``apply_lora``) into ``directory``.

    ``state_dict``: what ``model.state_dict()`` would be, where a plugin had to gather it. A PiSSA
    adapter is written as the ordinary adapter of rank 2r that it equals. Beside it
    ``lora_config.json`` keeps the settings of the training.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model, state_dict)
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    open_like_folder(directory / WEIGHTS)
    save_settings(model, directory)


def save_settings(model: nn.Module, directory: str | os.PathLike) -> None:
    """What :func:`save_lora` writes beside the tensors."""
    directory = Path(directory)
    settings = copy.deepcopy(model.peft_config["default"])
    settings.inference_mode = True
    if _is_pissa(model):
        settings.r *= 2
        settings.lora_alpha *= 2**0.5 if settings.use_rslora else 2
        settings.init_lora_weights = True
    whole = list(_trained_whole(model))
    base = settings.base_model_name_or_path
    if base and Path(base).is_dir():
        settings.base_model_name_or_path = str(Path(base).resolve())
    earlier = earlier_adapters(model)
    if earlier is not None and earlier.cannot is None:
        rank = settings.r
        chain = {"trained_on": settings.base_model_name_or_path, "joined": earlier.paths}
        save_json(chain | {"rank": rank}, directory / CHAIN)
        # In one scale for all layers, that of the trained factors.
        settings.r += earlier.rank
        settings.lora_alpha = model.coati_lora.scale * settings.r
        settings.use_rslora = False
        settings.base_model_name_or_path = earlier.base
        if Path(earlier.base).is_dir():
            settings.base_model_name_or_path = str(Path(earlier.base).resolve())
        whole += earlier.modules
        from coati.models.lora.layers import adapter_layers

        layers = [*adapter_layers(model), *(layer for layer, _ in earlier.factors)]
        settings.target_modules = sorted({layer.removeprefix(PREFIX) for layer in layers})
    elif earlier is not None:
        (directory / "README.md").write_text(f"Note: {told(earlier)}.\n", encoding="utf-8")
    settings.modules_to_save = whole or None
    settings.save_pretrained(str(directory))
    save_json(asdict(model.coati_lora), directory / SETTINGS)


def adapter_state(
    model: nn.Module, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Everything LoRA trains, under the names peft gives it in a file, joined with the adapters
    that it was trained on."""
    tensors = model.state_dict() if state_dict is None else state_dict
    biases = _trained_biases(model) | _whole_names(model)
    state = {_file_name(key): t for key, t in tensors.items() if ".lora_" in key or key in biases}
    if _is_pissa(model):
        state = {key: _with_start(key, tensor, tensors) for key, tensor in state.items()}
    earlier = earlier_adapters(model)
    if earlier is not None and earlier.cannot is None:
        rank = _own_rank(model)
        state = {key: tensor.detach().cpu() for key, tensor in state.items()}
        state = join(state, earlier, rank, model.coati_lora.scale)
    whole = _whole_names(model)  # tied ones share a tensor, which a file may not
    state = {key: t.detach().clone() if key in whole else t for key, t in state.items()}
    return {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}


def _file_name(key: str) -> str:
    """The name in a file of the adapter's tensor ``key``."""
    return _ADAPTER_NAME.sub(lambda found: found[1] or found[2], key)


def _own_rank(model: nn.Module) -> int:
    """The rank of the trained adapter in a file."""
    return (2 if _is_pissa(model) else 1) * model.coati_lora.r


def _is_pissa(model: nn.Module) -> bool:
    return model.coati_lora.lora_initialization_method == "PiSSA"


def _trained_biases(model: nn.Module) -> set[str]:
    # peft's own list for "lora_only" looks for a name its layers no longer have and saves no bias
    # at all.
    mode = model.coati_lora.lora_train_bias
    if mode == "none":
        return set()
    if mode == "lora":
        from coati.models.lora.layers import adapter_layers

        return {f"{name}.base_layer.bias" for name in adapter_layers(model)}
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


def _trained_whole(model: nn.Module) -> tuple[str, ...]:
    """Modules beside the adapters that are trained as they are: the head of a reward model."""
    return getattr(model.get_base_model(), "trained_whole", ())


def _whole_names(model: nn.Module) -> set[str]:
    heads = tuple(f"base_model.model.{name}." for name in _trained_whole(model))
    return {name for name in model.state_dict() if name.startswith(heads)} if heads else set()


def _with_start(key: str, tensor: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """A -> [A; A0] and B -> [B, -B0]; an embedding, which has no start, is filled up with zeros."""
    layer, _, side = key.partition(".lora_")
    if side == "A.weight":
        return torch.cat([tensor, tensors[f"{layer}.pissa_A"]], dim=0)
    if side == "B.weight":
        return torch.cat([tensor, -tensors[f"{layer}.pissa_B"]], dim=1)
    if side.startswith("embedding"):
        return torch.cat([tensor, torch.zeros_like(tensor)], dim=0 if side.endswith("A") else 1)
    return tensor  # a bias


def load_lora(model: nn.Module, directory: str | os.PathLike) -> None:
    """Put the adapter of ``directory`` (of :func:`save_lora`) into ``model``, which has the same
    LoRA settings."""
    model.load_state_dict(read_lora(model, directory), strict=False)


def read_lora(model: nn.Module, directory: str | os.PathLike) -> dict[str, Tensor]:
    """The adapter of ``directory`` under the names of ``model.state_dict()``, bit for bit as it was
    saved.

    Raises ValueError if the directory was trained with other LoRA settings or lacks a tensor of
    this model.
    """
    directory = Path(directory)
    _check_settings(directory, model)
    file = load_file(directory / WEIGHTS)
    state: dict[str, Tensor] = {}
    wanted = {name for name in model.state_dict() if ".lora_" in name or ".pissa_" in name}
    cut = _is_pissa(model) or is_chained(directory)
    rank = model.coati_lora.r if cut else None
    for name in wanted:
        state |= _saved(name, file, rank)
    whole = _whole_names(model)
    state |= {name: file[name] for name in (_trained_biases(model) | whole) & set(file)}
    if missing := sorted((wanted | whole) - set(state)):
        raise ValueError(
            f"{directory / WEIGHTS}: no tensor for {missing[0]} ({len(missing)} missing); other "
            "targets?"
        )
    return state


def _check_settings(directory: Path, model: nn.Module) -> None:
    config = model.coati_lora
    if not (directory / WEIGHTS).exists():
        raise ValueError(
            f"{directory}: no {WEIGHTS}; expected a directory that holds a LoRA adapter"
        )
    file = directory / SETTINGS
    saved = LoraConfig.from_file(file) if file.exists() else config
    for field in _OF_THE_RUN:
        if getattr(saved, field) != getattr(config, field):
            raise ValueError(
                f"{file}: the adapter was trained with {field} {getattr(saved, field)!r}, this run "
                f"has {getattr(config, field)!r}; give the same LoRA settings"
            )
    if saved.quantize_base != config.quantize_base:
        trained, here = (
            kind or "whole weights" for kind in (saved.quantize_base, config.quantize_base)
        )
        logger.warning_once(
            f"{directory}: the adapter was trained on a base of {trained}, this one is of {here}: "
            "its outputs shift by the difference; use the same --quantize_base to avoid that"
        )
    file = directory / (CHAIN if is_chained(directory) else CONFIG)
    content = load_json(file)
    rank = content["rank" if is_chained(directory) else "r"]
    expected = _own_rank(model)
    if rank != expected:
        raise ValueError(
            f"{file}: r is {rank}, expected {expected}; was this adapter trained elsewhere?"
        )


def _saved(name: str, file: dict[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    """The tensor of ``name`` in ``file``, with ``rank`` cut out of an adapter of a larger rank;
    nothing if it is not there. Of experts a factor has ``r`` rows or columns for each."""
    key = (
        _file_name(name).replace(".pissa_A", ".lora_A.weight").replace(".pissa_B", ".lora_B.weight")
    )
    if key not in file:
        return {}
    if rank is None:
        return {name: file[key]}
    columns = key.endswith(("B.weight", "embedding_B"))  # B is (out, r), A is (r, in)
    whole = file[key].T if columns else file[key]
    part = whole[rank : 2 * rank] if ".pissa_" in name else whole[:rank]
    part = -part if ".pissa_B" in name else part
    return {name: (part.T if columns else part).contiguous()}
