"""LoRA through peft: the reference's settings, adapters that lose nothing when saved, merging that
is asked for.

Heavy imports stand inside the functions, so that a wrong ``--lora_config`` is refused before torch
is loaded.
"""

import difflib
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from coati.models.added_tokens import whole_modules
from coati.models.quantization_registry import BASES
from coati.utils.json_io import load_json
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import names_of_experts

logger = get_logger(__name__)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

HIGHEST_RANK = 2**14  # the width of the largest models: more is a number of another kind
# lora_train_bias -> peft's name for it
BIAS_MODES = {"none": "none", "all": "all", "lora": "lora_only"}
# lora_initialization_method -> peft's init_lora_weights; four subspace iterations, as the reference
# takes
INITIALIZATIONS = {"kaiming_uniform": True, "PiSSA": "pissa_niter_4"}
ALL_LINEAR = "all-linear"
ATTENTION = "attention"


@dataclass
class LoraConfig:
    """What ``--lora_config`` holds. The update of a layer is scaled by ``lora_alpha / r``, with
    ``use_rslora`` by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).

    ``lora_train_bias``: "none" keeps existing biases frozen, "all" trains every existing bias,
    "lora" those of adapted layers; no bias is ever added. ``target_modules``: names or endings of
    names ("q_proj", "mlp.up_proj"), or "attention": the linear layers of attention; None and
    "all-linear" mean every linear layer but the head. ``lora_experts``:
    adapt the experts of a mixture too, which are no linear layers under transformers 5.
    ``modules_to_save``: modules trained whole beside the adapters ("lm_head", "norm"), named as
    targets are. ``use_dora``: weights as magnitude and direction, the former trained whole (DoRA,
    arXiv 2402.09353). ``quantize_base``: how the base is stored, a key of
    :data:`~coati.models.quantization_registry.BASES`.
    """

    r: int = 0
    lora_alpha: float = 32
    linear_lora_dropout: float = 0.1
    embedding_lora_dropout: float = 0.0
    lora_train_bias: str = "none"
    lora_initialization_method: str = "kaiming_uniform"
    target_modules: list[str] | str | None = None
    lora_experts: bool = False
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    quantize_base: str | None = None

    @property
    def scale(self) -> float:
        """By which the adapters' output is multiplied."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def __post_init__(self) -> None:
        if self.quantize_base is not None:
            _one_of("quantize_base", self.quantize_base, BASES)
        for name in ("use_dora", "use_rslora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.target_modules == ALL_LINEAR:
            self.target_modules = None
        _one_of("lora_train_bias", self.lora_train_bias, BIAS_MODES)
        _one_of("lora_initialization_method", self.lora_initialization_method, INITIALIZATIONS)
        if not _is_number(self.r, int) or not 0 <= self.r <= HIGHEST_RANK:
            raise ValueError(
                f"LoRA r must be a whole number from 0 (off) to {HIGHEST_RANK}, not {self.r!r}"
            )
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be a positive number, not {self.lora_alpha!r}")
        for name in ("linear_lora_dropout", "embedding_lora_dropout"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, not {getattr(self, name)!r}"
                )
        for name in ("target_modules", "modules_to_save"):
            value = getattr(self, name)
            word = name == "target_modules" and value == ATTENTION
            if value is not None and not word and not _are_names(value):
                words = f", {ALL_LINEAR!r}, {ATTENTION!r}" if name == "target_modules" else ""
                raise ValueError(
                    f"{name} must be a list of layer names{words} or null, not {value!r}"
                )
        _check_together(self)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "LoraConfig":
        """Read a JSON object with the fields' names as keys. Raises ValueError naming the file and
        the wrong key."""
        content = load_json(path)
        if not isinstance(content, dict):
            raise ValueError(
                f"{path}: expected a JSON object of LoRA settings, found a {type(content).__name__}"
            )
        known = [field.name for field in fields(cls)]
        for key in content:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise ValueError(
                    f"{path}: unknown key {key!r}; did you mean {nearest!r}? Known: "
                    f"{', '.join(known)}"
                )
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_together(config: LoraConfig) -> None:
    """Raise ValueError for settings that exclude each other."""
    pissa = config.lora_initialization_method == "PiSSA"
    if config.use_dora and (pissa or config.lora_experts):
        raise ValueError(
            "use_dora: DoRA splits a weight into magnitude and direction, and goes with neither "
            "PiSSA nor lora_experts; use lora_initialization_method kaiming_uniform without "
            "lora_experts"
        )
    if config.quantize_base and pissa:
        raise ValueError(
            f"quantize_base {config.quantize_base}: PiSSA starts from the weights themselves; use "
            "lora_initialization_method kaiming_uniform"
        )


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _one_of(name: str, value: Any, allowed: dict) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def target_names(model: "nn.Module", wanted: list[str] | str | None = None) -> list[str]:
    """Full names of the layers meant by ``wanted``: names or endings of names; None is every linear
    layer but the head, "attention" those of them that lie in attention.

    Raises ValueError naming each entry of ``wanted`` without a layer, the nearest name, and those
    there are.
    """
    from torch import nn

    from coati.models.lora.layers import is_adaptable

    layers = {name: module for name, module in model.named_modules() if is_adaptable(module)}
    # What is trained whole, as a new head is, has nothing to adapt.
    whole = getattr(model, "trained_whole", ())
    layers = {
        name: module
        for name, module in layers.items()
        if not any(f"{name}.".startswith(f"{each}.") for each in whole)
    }
    if wanted is None or wanted == ATTENTION:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [n for n, m in layers.items() if m is not head and not isinstance(m, nn.Embedding)]
        names = _without_experts(model, _without_mamba(model, names))
        return names if wanted is None else _in_attention(model, names)
    found = {
        target: [n for n in layers if n == target or n.endswith(f".{target}")] for target in wanted
    }
    if missing := [target for target, names in found.items() if not names]:
        there = sorted({name.rsplit(".", 1)[-1] for name in layers})
        hints = [difflib.get_close_matches(target, there, n=1, cutoff=0) for target in missing]
        nearest = ", ".join(dict.fromkeys(name for hint in hints for name in hint))
        raise ValueError(
            f"LoRA target_modules {missing} match no linear or embedding layer of "
            f"{type(model).__name__}; nearest: {nearest}; there are: {', '.join(there)}"
        )
    names = list(dict.fromkeys(name for names in found.values() for name in names))
    if taken := [name for name in names if name.rsplit(".", 1)[-1] in names_of_experts(model)]:
        raise ValueError(
            f"LoRA target_modules: {taken[0]} is named as an expert of {type(model).__name__}, and "
            "peft would adapt the experts in its place; leave it out, and use --lora_experts if "
            "the experts are meant"
        )
    return names


def _in_attention(model: "nn.Module", names: list[str]) -> list[str]:
    """Those of ``names`` whose layers are inside a module named as attention."""
    found = [name for name in names if re.search(r"att(e)?n[^.]*\.", name)]
    if not found:
        there = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"LoRA target_modules {ATTENTION!r}: {type(model).__name__} has no module of that "
            f"name; name its layers in a file for --lora_target: {', '.join(there)}"
        )
    return found


def _without_mamba(model: "nn.Module", names: list[str]) -> list[str]:
    """``names`` without the output projections of Mamba blocks, whose fused kernels read the weight
    past an adapter."""
    return [
        name
        for name in names
        if not (
            name.endswith(".out_proj")
            and hasattr(model.get_submodule(name.rpartition(".")[0]), "A_log")
        )
    ]


def _without_experts(model: "nn.Module", names: list[str]) -> list[str]:
    taken = names_of_experts(model)
    left_out = [name for name in names if name.rsplit(".", 1)[-1] in taken]
    if left_out:
        kinds = ", ".join(sorted({re.sub(r"\d+", "*", name) for name in left_out}))
        logger.warning_once(
            f"LoRA: {kinds} are not adapted, since peft takes layers so named for the experts of "
            "the mixture"
        )
    return [name for name in names if name not in left_out]


def expert_parameters(model: "nn.Module") -> list[str]:
    """Full names of the parameters (experts, ..., ...) that hold the experts of a mixture."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 2)[-2] == "experts"
    ]


def apply_lora(model: "nn.Module", config: LoraConfig, seed: int = 0) -> "PeftModel":
    """``model`` with adapters, all else frozen; its output is unchanged until the adapters are
    trained, but for a base that ``quantize_base`` asks for and is not quantized yet.

    The adapters are drawn from ``seed`` without touching the run's random state, so every rank gets
    the same. Raises ValueError for r 0, unmatched targets, and what PiSSA cannot take.
    """
    import torch
    from peft import get_peft_model

    from coati.models.lora.layers import DroppedEmbedding, PissaLinear
    from coati.models.lora.quantized_base import quantization_of, quantize_base

    if config.r < 1:
        raise ValueError(f"LoRA needs r (--lora_rank) of at least 1, not {config.r}")
    if config.quantize_base and quantization_of(model) is None:
        quantize_base(model, config.quantize_base)
    config = replace(config, quantize_base=quantization_of(model))
    if config.modules_to_save:
        more = whole_modules(model, config.modules_to_save)
        _check_whole(model, more)
        base: Any = model
        base.trained_whole = tuple(dict.fromkeys((*getattr(model, "trained_whole", ()), *more)))
    settings = _peft_config(model, config)
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # peft 0.13 of layers that it does not know by name
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            adapted: Any = get_peft_model(cast(Any, model), settings)
    for module in adapted.modules():
        if isinstance(module, PissaLinear):
            module.freeze_start()
        elif isinstance(module, DroppedEmbedding):
            module.lora_dropout["default"] = torch.nn.Dropout(config.embedding_lora_dropout)
    for name in getattr(model, "trained_whole", ()):
        model.get_submodule(name).requires_grad_(True)
    adapted.coati_lora = config
    return adapted


def _check_whole(model: "nn.Module", names: list[str]) -> None:
    from coati.models.lora.quantized_base import quantized_layers

    for name in names:
        if quantized_layers(model.get_submodule(name)):
            raise ValueError(
                f"LoRA modules_to_save: {name} is stored in few bits by --quantize_base and cannot "
                "be trained whole; embed_tokens, lm_head and norms can"
            )


def _peft_config(model: "nn.Module", config: LoraConfig):
    import peft
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from coati.models.lora.layers import DroppedEmbedding, PissaLinear, QuantizedLora
    from coati.models.lora.quantized_base import QuantizedLinear

    names = target_names(model, config.target_modules)
    modules = {name: model.get_submodule(name) for name in names}
    custom: dict[type, type] = {nn.Embedding: DroppedEmbedding, QuantizedLinear: QuantizedLora}
    if config.lora_initialization_method == "PiSSA":
        _check_pissa(modules, config.r)
        custom[nn.Linear] = PissaLinear
    options: dict[str, Any] = dict(
        # peft wants a task only to choose its wrapper; without one it takes any module.
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.linear_lora_dropout,
        bias=BIAS_MODES[config.lora_train_bias],
        init_lora_weights=INITIALIZATIONS[config.lora_initialization_method],
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
    )
    experts = expert_parameters(model)
    if config.lora_experts:
        _check_experts(model, experts, config)
        options["target_parameters"] = experts
    elif experts:
        logger.warning_once(
            "LoRA: the experts of this mixture are not adapted; --lora_experts adapts them too"
        )
    if experts and config.quantize_base:
        logger.warning_once(
            f"--quantize_base {config.quantize_base}: the experts of this mixture are no linear "
            "layers and stay as they are"
        )
    settings = peft.LoraConfig(**options)
    settings._register_custom_module(custom)
    return settings


def _check_experts(model: "nn.Module", experts: list[str], config: LoraConfig) -> None:
    if not experts:
        raise ValueError(
            f"lora_experts: {type(model).__name__} has no experts that are parameters of their "
            "own; drop --lora_experts"
        )
    if config.lora_initialization_method == "PiSSA":
        raise ValueError(
            "lora_experts: adapters of experts cannot start from principal singular vectors; use "
            "lora_initialization_method kaiming_uniform"
        )
    if config.linear_lora_dropout:
        raise ValueError(
            "lora_experts: peft applies no dropout before experts; set linear_lora_dropout 0 in "
            "--lora_config"
        )


def _check_pissa(modules: dict[str, "nn.Module"], rank: int) -> None:
    from torch import nn

    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            logger.warning_once(
                f"PiSSA is for linear layers; the adapter of {name} starts at zero instead"
            )
        elif not isinstance(module, nn.Linear):
            raise ValueError(
                f"PiSSA cannot start from {name}, a {type(module).__name__}; use "
                "lora_initialization_method kaiming_uniform for this model"
            )
        elif rank > min(module.in_features, module.out_features):
            raise ValueError(
                f"PiSSA needs r at most {min(module.in_features, module.out_features)} for {name} "
                f"({module.in_features} x {module.out_features}), not {rank}"
            )


def convert_to_lora_module(
    module: "nn.Module", lora_config: LoraConfig | int, lora_train_bias: str = "none"
) -> "nn.Module":
    """The reference's name for :func:`apply_lora`; its older form took a rank. Rank 0 returns
    ``module`` as it is."""
    config = lora_config
    if isinstance(config, int):
        config = LoraConfig(r=config, lora_train_bias=lora_train_bias)
    return apply_lora(module, config) if config.r else module


def merge_lora(model: "PeftModel") -> "nn.Module":
    """The plain model with the adapters added into its weights; ``model`` is used up. See
    :func:`merged` to undo it. A quantized base becomes whole weights of its values."""
    from coati.models.lora.quantized_base import dequantize

    _check_adapted(model)
    dequantize(model)
    _untie(model.get_base_model())
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        plain = model.merge_and_unload(safe_merge=True)
    if tied:
        _retie(plain)
    return plain.requires_grad_(True)


def _retie(model: "nn.Module") -> None:
    """Tie embedding and head again that an adapter held whole, each on its own, if they are equal;
    else say in the configuration that they are two."""
    import torch

    if not hasattr(model, "get_output_embeddings"):
        return
    entrance = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None:
        return
    if torch.equal(head.weight, entrance.weight):
        head.weight = entrance.weight
        model.config.tie_word_embeddings = True
    else:
        model.config.tie_word_embeddings = False


@contextmanager
def merged(model: "PeftModel") -> Iterator["PeftModel"]:
    """Inside the block the adapters are part of the weights; afterward every bit is as before."""
    from coati.models.lora.quantized_base import dequantized_base

    _check_adapted(model)
    with dequantized_base(model), _merged(model):
        yield model


@contextmanager
def _merged(model: "PeftModel") -> Iterator[None]:
    from coati.models.lora.layers import adapter_layers

    base = model.get_base_model()
    tie = _untie(base)
    # peft adapts experts that are one parameter by its name, and wraps such a layer once for each.
    weights = [
        getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
        for layer in adapter_layers(model).values()
    ]
    kept = [weight.detach().clone() for weight in weights]
    model.merge_adapter()
    try:
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)
        for adapter in adapter_layers(model).values():
            adapter.merged_adapters.clear()
        if tie is not None:
            head, weight = tie
            head.weight = weight
            base.config.tie_word_embeddings = True


def _untie(model: "nn.Module") -> "tuple[nn.Module, nn.Parameter] | None":
    """Cut a tie that merging would spoil; returns the head and the weight it shared."""
    from torch import nn

    from coati.models.lora.layers import tied_head

    head = tied_head(model)
    if head is None:
        return None
    shared = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    model.config.tie_word_embeddings = False
    return head, shared


def _check_adapted(model: "nn.Module") -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"expected a model with LoRA adapters (from apply_lora), got {type(model).__name__}"
        )


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
    )
