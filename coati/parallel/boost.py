"""A model becomes an Engine: plugin, optimizer and schedule put together in one place."""

import inspect
from dataclasses import replace
from difflib import get_close_matches
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from coati.models.block_mask import counts_blocks, holds_for
from coati.models.kernels import choose_kernels
from coati.models.padding_free import PaddingFree, runs_varlen
from coati.parallel import offload_activations
from coati.parallel.compat.cpu.malloc import align_weights, keep_freed_memory
from coati.parallel.compat.import_colossalai import import_colossalai
from coati.parallel.engine import Engine
from coati.parallel.families import check_family, prepare_family
from coati.parallel.optimizer import OptimizerSettings, build_optimizer
from coati.parallel.plugin_checks import (
    check_heads,
    check_options,
    resolve_options,
    scalar_head_problem,
)
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger
from coati.utils.phases import phase

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

logger = get_logger(__name__)


def prepare_colossalai() -> None:
    """Import ColossalAI quietly; fix it on every device and make it run without an accelerator
    where there is none."""
    import_colossalai()
    from coati.parallel.compat import cpu, fixes

    fixes.apply()
    if not torch.cuda.is_available():
        cpu.apply()


@phase("preparing the model for training")
def boost(
    model: nn.Module,
    options: ParallelOptions,
    *,
    optimizer: OptimizerSettings | None = None,
    total_steps: int = 1,
    custom_policy: Any = None,
    **changes: Any,
) -> Engine:
    """Wrap ``model`` for training under ``options`` and return its :class:`Engine`.

    One plugin instance is made per call, because a custom policy belongs to the plugin. The
    schedule is linear warmup, then by default cosine decay to 0.1 ``lr`` at ``total_steps``.
    ``changes``:
    fields of :class:`~coati.parallel.optimizer.OptimizerSettings` (``lr``, ...) that override those
    of ``optimizer``.

    Raises:
        ValueError: naming the flag, when the model or the plugin cannot do what ``options`` ask.
    """
    options, notes = resolve_options(options)
    for note in notes:
        logger.warning_once(note)
    check_options(world_size=world_size(), **vars(options))
    check_heads(model.config, options)
    check_family(model.config, options)
    prepare_colossalai()
    _prepare_model(model, options)
    if not torch.cuda.is_available():
        keep_freed_memory()
        align_weights(model)
    padding_free = padding_free_of(model, options)
    if options.packing and padding_free is None:
        check_packs(model, options)
    check_scalar(model, options)
    plugin = make_plugin(options, custom_policy)
    settings = replace(optimizer or OptimizerSettings(), **changes)
    adam = build_optimizer(model, options, settings)
    schedule = settings.schedule.bind(adam, total_steps)
    booster = _booster(plugin, options)
    model, adam, _, _, schedule = booster.boost(model, adam, lr_scheduler=schedule)
    return Engine(booster, model, adam, schedule, options, padding_free)


def padding_free_of(model: nn.Module, options: ParallelOptions) -> PaddingFree | None:
    """How batches are given to ``model`` without padding; None if it needs padded ones.

    The plugin must leave the model's own forward in place. On a GPU in half precision only: other
    attention would run row by row, which costs more there than padding does.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tp > 1 or device not in PLUGINS[options.plugin].padding_free:
        return None
    half = _HALF.get(options.precision)
    if device == "cuda":
        attention = getattr(model.config, "_attn_implementation", None)
        if half is None or not runs_varlen(attention, device):
            return None
        # Where the plugin moves it next; its kernels can only be probed there.
        model.to("cuda")
    with torch.autocast(device, half, enabled=device == "cuda"):
        return PaddingFree.of(model)


def check_packs(model: nn.Module, options: ParallelOptions) -> None:
    """Raise ValueError if ``model`` lets the rows of a pack attend to each other."""
    if not holds_for(model):
        why = "a probe of two rows in one sequence came out otherwise than each row alone"
        if counts_blocks(model.config):
            why = "it counts the blocks that a token attends to from the beginning of the pack"
        raise ValueError(
            f"--packing: this {model.config.model_type} model ({model.config._attn_implementation} "
            f"attention) does not keep the rows of a pack apart ({why}); drop --packing: rows of "
            "like length are batched together anyway"
        )


def check_scalar(model: nn.Module, options: ParallelOptions) -> None:
    """Teach ColossalAI to split a model with a scalar head, which it does not know
    (shardformer/policies/auto_policy.py:276): as its backbone.

    Raises ValueError under a pipeline, and under gemini with ``--tp``.
    """
    if getattr(model, "backbone", None) is None:
        return
    if options.pp > 1:
        raise ValueError(
            f"--pp {options.pp}: a model with a scalar head (reward model, critic) cannot be split "
            "into pipeline stages; use --tp, or --plugin zero2 or gemini"
        )
    if problem := scalar_head_problem(options.plugin, options.tp, options.zero_stage):
        raise ValueError(problem)
    from colossalai.shardformer.policies import auto_policy

    original = auto_policy._fullname
    if not hasattr(original, "__wrapped__"):
        auto_policy._fullname = wraps(original)(
            lambda model: original(getattr(model, "backbone", model))
        )


def _check_kind(key: str, value: Any, default: Any) -> None:
    """Raise ValueError for a value of ``--plugin_args`` of another kind than the ``default``."""
    kinds = {bool: ("true or false", (bool,)), str: ("a text", (str,))}
    numbers = ("a number", (int, float))
    if default is inspect.Parameter.empty or default is None or value is None:
        return
    wanted, types = kinds.get(type(default), numbers if type(default) in numbers[1] else ("", ()))
    wrong = isinstance(value, bool) and bool not in types
    if types and (wrong or not isinstance(value, types)):
        raise ValueError(f"--plugin_args: {key} is {value!r}; expected {wanted} ({default!r})")


def make_plugin(options: ParallelOptions, custom_policy: Any = None):
    """The ColossalAI plugin of ``options``. Raises ValueError for a key of ``plugin_args`` it does
    not know."""
    from colossalai.booster import plugin as upstream

    row = PLUGINS[options.plugin]
    constructor = getattr(upstream, row.upstream)
    keywords = row.keywords(options)
    signature = inspect.signature(constructor.__init__)
    known = set(signature.parameters) - {"self"}
    for key in options.plugin_args:
        if key not in known:
            nearest = get_close_matches(key, known, n=1)
            hint = (
                f"did you mean {nearest[0]!r}?"
                if nearest
                else f"it takes {', '.join(sorted(known))}"
            )
            raise ValueError(
                f"--plugin_args: {row.upstream} of --plugin {options.plugin} has no keyword "
                f"{key!r}; {hint}"
            )
        _check_kind(key, options.plugin_args[key], signature.parameters[key].default)
    keywords |= options.plugin_args
    if custom_policy is not None:
        keywords["custom_policy"] = custom_policy
    plugin = constructor(**keywords)
    # Newer releases of torch can be told that there is nobody to send the weights to.
    if world_size() == 1 and "init_sync" in inspect.signature(DistributedDataParallel).parameters:
        getattr(plugin, "ddp_kwargs", {})["init_sync"] = False
    return plugin


def _booster(plugin, options: ParallelOptions):
    from colossalai.booster import Booster

    if plugin.control_precision():
        return Booster(plugin=plugin)
    from coati.parallel.compat.amp import AutocastPrecision

    return Booster(
        plugin=plugin, mixed_precision=AutocastPrecision(options.precision, options.max_norm)
    )


def _offload_activations(model: nn.Module) -> None:
    if torch.cuda.is_available():
        offload_activations.install(model)
    else:
        logger.warning_once(
            "--offload_activations changes nothing here: without a GPU activations are in host "
            "memory already."
        )


def apply_kernels(model: nn.Module, options: ParallelOptions) -> None:
    """:func:`~coati.models.kernels.choose_kernels` for the plugin of ``options``."""
    row = PLUGINS[options.plugin]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own_layers = not (row.sharded_forward or row.hybrid)
    choose_kernels(model, options.kernels, device, own_layers)


def _prepare_model(model: nn.Module, options: ParallelOptions) -> None:
    if PLUGINS[options.plugin].fp32_weights or options.precision == "fp32":
        model.float()
    if options.grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if options.lora:
            model.enable_input_require_grads()
        if options.offload_activations:
            _offload_activations(model)
    for note in prepare_family(model, options):
        logger.warning_once(note)
    apply_kernels(model, options)
    if options.pp > 1:
        model.config.use_cache = False
