"""An adapter that was trained on top of another, saved as one adapter of the base below both: peft
reads the adapter of a directory and its base, and loses what lies between without a word.

Two updates of a weight, s1 B1 A1 + s2 B2 A2, are one of rank r1 + r2: A = [A2; A1] and
B = [B2, (s1/s2) B1] under the scale s2. The trained factors A2, B2 stand first and unchanged, so
that training goes on from them to the bit; layers of lower rank are filled up with zeros, so that
one rank and one scale serve all layers, which is all that some programs read.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coati.models.loading import CHAIN, adapter_base, base_quantization
from coati.utils.json_io import load_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

PREFIX = "base_model.model."
# Settings of peft that do not change what an adapter computes, or are taken into account here.
_KNOWN = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "modules_to_save",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "auto_mapping",
    "fan_in_fan_out",
    "init_lora_weights",
    "peft_version",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "megatron_core",
}
_A_NAME = re.compile(r"(.*)\.(lora_embedding|lora)_A(.*)")
# Initializations that change the base weight, so that the adapter is one of another base.
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass
class Earlier:
    """The adapters below the trained one. ``base``: the model below them all; ``paths``: theirs,
    the nearest first. ``factors``: A (r, in) and B (out, r) by layer and side ("lora" or
    "lora_embedding"), scales multiplied into B. ``whole``: tensors of modules saved whole.
    ``cannot``: why they cannot be part of one adapter."""

    base: str
    paths: list[str]
    factors: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    cannot: str | None = None

    @property
    def rank(self) -> int:
        """The largest of a layer."""
        return max((len(a) for a, _ in self.factors.values()), default=0)


def earlier_adapters(model: nn.Module) -> Earlier | None:
    """What ``model``, a PeftModel of ``apply_lora``, was trained on beside the base: read once, at
    its first save or the rehearsal of it, and kept. None where its base is no adapter."""
    known: dict[str, Any] = vars(model)
    if "coati_earlier" not in known:
        known["coati_earlier"] = _read_chain(model.peft_config["default"].base_model_name_or_path)
        found = known["coati_earlier"]
        if found is not None and found.cannot is None:
            found.cannot = _conflict(model, found)
        if found is not None and found.cannot is not None:
            logger.warning_once(told(found))
    return known["coati_earlier"]


def told(earlier: Earlier) -> str:
    """That plain peft does not read the adapter, why, and how to merge."""
    return (
        f"this adapter was trained on another one ({', '.join(earlier.paths)}), and the two cannot "
        f"be saved as one ({earlier.cannot}). Plain peft would read the last one alone and give "
        "other logits; coati reads both. For other programs merge them: coati merge --model_path "
        "THIS_DIRECTORY --output_dir MERGED"
    )


def _read_chain(path: str | None) -> Earlier | None:
    try:
        base = adapter_base(path) if path and Path(path).is_dir() else None
        if base is None:
            return None
        found = _read_chain(base) or Earlier(base, [])
        found.paths.insert(0, str(path))
        _add(found, Path(str(path)))
    except (OSError, ValueError) as error:
        return Earlier(str(path), [str(path)], cannot=f"it is not readable: {error}")
    return found


def _add(found: Earlier, directory: Path) -> None:
    from peft.utils import load_peft_weights

    config = load_json(directory / "adapter_config.json")
    if kind := base_quantization(directory):
        found.cannot = f"{directory} belongs to a base quantized to {kind}"
        return
    if why := _unusual(config):
        found.cannot = f"{directory}: {why}"
        return
    tensors = load_peft_weights(str(directory), device="cpu")
    for name in tensors:
        if (match := _A_NAME.match(name)) is None:
            continue
        layer, side = match.group(1, 2)
        a = tensors[name].float()
        b = tensors[f"{layer}.{side}_B{match[3]}"].float()
        b = b * _scale(config, layer.removeprefix(PREFIX), len(a))
        if (older := found.factors.get((layer, side))) is not None:
            a = torch.cat([a, older[0]], dim=0)
            b = torch.cat([b, older[1]], dim=1)
        found.factors[layer, side] = (a, b)
    if taken := [layer for layer, _ in found.factors if _is_of(layer, found.modules)]:
        found.cannot = f"{directory} adapts {taken[0]}, which an adapter below saved whole"
        return
    for module in config.get("modules_to_save") or []:
        if any(_is_of(layer, [module]) for layer, _ in found.factors):
            found.cannot = f"{directory} has {module} whole, an adapter below adapts it"
            return
        found.modules.append(module)
        kept = {n: t for n, t in tensors.items() if ".lora_" not in n and _is_of(n, [module])}
        found.whole |= kept


def _unusual(config: dict[str, Any]) -> str | None:
    """Why an adapter of these settings is no plain sum of products, or None."""
    if config.get("peft_type") != "LORA":
        return f"it is a {config.get('peft_type')} adapter"
    if config.get("bias", "none") != "none":
        return "it trains biases"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        return f"init_lora_weights {start} changes the base"
    other = [
        name
        for name, value in config.items()
        if value not in (None, False, [], {}, "", "none")
        and name not in _KNOWN | {"peft_type", "bias", "qalora_group_size"}
        and value != _default(name)
    ]
    return f"it has {', '.join(sorted(other))}" if other else None


def _default(name: str) -> Any:
    import peft

    return getattr(peft.LoraConfig(), name, None)


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", layer))
    key = next(matching, None)
    alpha = config["lora_alpha"] if key is None else patterns[key]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _is_of(name: str, modules: list[str]) -> bool:
    """Whether ``name``, of a tensor or layer, belongs to one of ``modules``."""
    plain = name.removeprefix(PREFIX)
    return any(re.search(rf"(^|\.){re.escape(module)}(\.|$)", plain) for module in modules)


def _conflict(model: nn.Module, earlier: Earlier) -> str | None:
    """Why ``model``'s adapter cannot be joined with ``earlier``; drops what the model has no place
    for, the adapter of a head that it lacks, and what it trains whole itself."""
    config = model.coati_lora
    if config.lora_experts:
        return "adapters of experts are no plain factors"
    if config.use_dora:
        return "DoRA's adapters are no plain factors"
    if config.quantize_base:
        return f"the base was quantized to {config.quantize_base} with the earlier one inside"
    base: Any = model.get_base_model()
    own = list(getattr(base, "trained_whole", ())) + list(
        getattr(config, "modules_to_save", None) or []
    )
    inside = f"{PREFIX}{base.base_model_prefix}." if hasattr(base, "score") else PREFIX
    for layer, side in list(earlier.factors):
        if not layer.startswith(inside) or _is_of(layer, own):
            del earlier.factors[layer, side]
    earlier.whole = {name: t for name, t in earlier.whole.items() if not _is_of(name, own)}
    earlier.modules = [m for m in dict.fromkeys(earlier.modules) if m not in own]
    adapted = [name for name in model.state_dict() if ".lora_" in name]
    if taken := [name for name in adapted if _is_of(name, earlier.modules)]:
        return f"{taken[0]} adapts a module that the earlier one saved whole"
    return None


def join(state: dict[str, Tensor], earlier: Earlier, rank: int, scale: float) -> dict[str, Tensor]:
    """``state``, an adapter in peft's names of ``rank`` and ``scale``, with ``earlier`` behind
    it."""
    more = earlier.rank
    found = (_A_NAME.match(name) for name in state)
    own = [(match[1], match[2]) for match in found if match]
    joined = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for layer, side in dict.fromkeys([*own, *earlier.factors]):
        end = "" if side == "lora_embedding" else ".weight"
        name_a = f"{layer}.{side}_A{end}"
        name_b = f"{layer}.{side}_B{end}"
        below = earlier.factors.get((layer, side))
        width = (state[name_a] if below is None else below[0]).shape[1]
        height = (state[name_b] if below is None else below[1]).shape[0]
        a = state.get(name_a, torch.zeros(rank, width))
        b = state.get(name_b, torch.zeros(height, rank))
        if below is None:
            below = (a.new_zeros(0, width), b.new_zeros(height, 0))
        fill = more - len(below[0])
        joined[name_a] = torch.cat([a, below[0], a.new_zeros(fill, width)], dim=0)
        joined[name_b] = torch.cat([b, below[1] / scale, b.new_zeros(height, fill)], dim=1)
    return {**earlier.whole, **joined}


def is_chained(directory: str | os.PathLike) -> bool:
    """Whether an adapter directory holds a trained adapter joined with those below it."""
    return (Path(directory) / CHAIN).is_file()
