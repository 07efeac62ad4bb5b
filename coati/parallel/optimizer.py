"""The optimizer of a run: its settings, its parameter groups, and which implementation a plugin
gets.

Imports neither torch nor ColossalAI before an optimizer is built.
"""

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coati.parallel.lr_schedule import DECAY, DEFAULT, FLOOR, LRSchedule
from coati.parallel.optimizer_table import DEFAULT as ADAMW
from coati.parallel.optimizer_table import OPTIMIZERS, installed_problem, optimizer_problem
from coati.parallel.options import ParallelOptions
from coati.parallel.plugins import PLUGINS
from coati.utils.logging import get_logger

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

logger = get_logger(__name__)

ADAM_BETA1 = 0.9
LION_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer of :data:`~coati.parallel.optimizer_table.OPTIMIZERS` and its schedule.

    ``lr``: peak learning rate, ``head_lr`` that of a scalar head, ``embedding_lr`` that of token
    embedding and vocabulary head (None: ``lr``). ``lora_plus_ratio``: rate of the adapters' B in
    units of ``lr`` (LoRA+, arXiv 2402.12354). ``warmup_steps``: optimizer steps of linear warmup
    (None: 2.5% of all). The rest are fields of :class:`~coati.parallel.lr_schedule.LRSchedule`.
    """

    lr: float = 5e-6
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    warmup_steps: int | None = None
    head_lr: float | None = None
    embedding_lr: float | None = None
    lora_plus_ratio: float | None = None
    lr_scheduler: str = DEFAULT
    lr_min_ratio: float = FLOOR
    decay_ratio: float = DECAY
    optim: str = ADAMW

    @property
    def schedule(self) -> LRSchedule:
        """The shape of the learning rate."""
        return LRSchedule(self.lr_scheduler, self.warmup_steps, self.lr_min_ratio, self.decay_ratio)


def build_optimizer(
    model: "nn.Module", options: ParallelOptions, settings: OptimizerSettings
) -> "Optimizer":
    """The optimizer of ``settings`` over the trainable parameters of ``model``.

    Raises ValueError for a rate of its own for what is not trained, and for an optimizer that the
    plugin, what is installed or this machine cannot train with.
    """
    problem = installed_problem(settings.optim) or optimizer_problem(settings.optim, options)
    if problem or (problem := machine_problem(settings.optim)):
        raise ValueError(problem)
    keywords: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (ADAM_BETA1, settings.adam_beta2),
        "weight_decay": settings.weight_decay,
    }
    return BUILDERS[settings.optim](model, options, settings, keywords)


def machine_problem(name: str) -> str | None:
    """Why this machine cannot train with ``--optim name``; None where it can. The optimizers of
    another package are tried: which devices they run on depends on how it was built."""
    import torch

    row = OPTIMIZERS[name]
    on_gpu = torch.cuda.is_available()
    if row.cuda and not on_gpu:
        return f"--optim {name} needs a CUDA GPU, and there is none here; use --optim adamw8bit"
    if row.package is None:
        return None
    from coati.parallel import bitsandbytes_optimizers as of_package

    device = "cuda" if on_gpu else "cpu"
    if reason := of_package.works_on(getattr(of_package, _CLASSES[name]), device):
        return (
            f"--optim {name} does not run on a {device.upper()} with what is installed ({reason}); "
            f"use --optim {ADAMW}, or: pip install -U '{row.package}'"
        )
    return None


def _adamw(
    model: "nn.Module",
    options: ParallelOptions,
    settings: OptimizerSettings,
    keywords: dict[str, Any],
) -> "Optimizer":
    """AdamW: ColossalAI's where the plugin needs it or it can be compiled, else PyTorch's."""
    import torch

    parameters = _groups(model, settings)
    row = PLUGINS[options.plugin]
    on_gpu = torch.cuda.is_available()
    if row.own_adam or (on_gpu and can_compile()):
        from colossalai.nn.optimizer import HybridAdam

        return HybridAdam(parameters, adamw_mode=True, **keywords)
    if on_gpu:
        logger.warning_once(
            "the optimizer is PyTorch's AdamW: ColossalAI's own needs nvcc, ninja and g++ to be "
            "compiled here."
        )
    if not (row.host_optimizer or options.zero_cpu_offload):
        keywords["fused"] = True
    return torch.optim.AdamW(parameters, **keywords)


def _of_bitsandbytes(
    model: "nn.Module",
    options: ParallelOptions,
    settings: OptimizerSettings,
    keywords: dict[str, Any],
) -> "Optimizer":
    """AdamW with moments in 8 bits, or Lion. The moments of embeddings, whose rows are seen
    unequally often, have 32 bits (arXiv 2110.02861, section 2.3)."""
    from coati.parallel import bitsandbytes_optimizers as of_package

    kind = getattr(of_package, _CLASSES[settings.optim])
    if settings.optim == "lion":
        return kind(_groups(model, settings), **keywords | {"betas": LION_BETAS})
    embedding = model.get_input_embeddings()
    ids = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    return kind(_groups(model, settings, ({"optim_bits": 32}, ids)), **keywords)


def _adafactor(
    model: "nn.Module",
    options: ParallelOptions,
    settings: OptimizerSettings,
    keywords: dict[str, Any],
) -> "Optimizer":
    """torch's Adafactor: no momentum, steps relative to each weight's size, which counts as 1e-3 at
    least."""
    import torch

    usual = "1e-3 to 1e-2 is usual"
    if options.lora:
        usual = "of LoRA, whose B is 0 at first and grows by 1e-3 of that, about 1e-1 is usual"
    logger.info(
        f"--optim adafactor: a weight moves by up to --lr {settings.lr:g} times its root mean "
        f"square in a step; {usual}"
    )
    del keywords["betas"]
    return torch.optim.Adafactor(_groups(model, settings), **keywords)


def _muon(
    model: "nn.Module",
    options: ParallelOptions,
    settings: OptimizerSettings,
    keywords: dict[str, Any],
) -> "Optimizer":
    """Muon for hidden matrices, AdamW for the rest."""
    from coati.parallel.muon import MuonWithAdamW, hidden_matrices

    stacked = sum(p.requires_grad and p.ndim > 2 for p in model.parameters())
    if stacked:
        logger.warning_once(
            f"--optim muon: {stacked} weights of more than two dimensions (experts that are held "
            "as one tensor) are trained by AdamW"
        )
    groups = _groups(model, settings, ({"muon": True}, hidden_matrices(model)))
    return MuonWithAdamW([{"muon": False} | group for group in groups], fused=True, **keywords)


_CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion": "Lion"}
BUILDERS = {
    ADAMW: _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    **dict.fromkeys(_CLASSES, _of_bitsandbytes),
}

# Settings of a parameter group, and ids of the parameters that have them
Own = tuple[dict[str, Any], set[int]]


def _groups(model: "nn.Module", settings: OptimizerSettings, *more: Own) -> list[Any]:
    """What is trained: one group, and one more for each part with settings of its own, such as a
    learning rate; a parameter may have several. ``more``: those of the optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own: list[Own] = []
    if settings.head_lr is not None:
        own.append(({"lr": settings.head_lr}, {id(p) for p in model.score.parameters()}))
    if settings.embedding_lr is not None:
        own.append(({"lr": settings.embedding_lr}, _vocabulary(model)))
    if settings.lora_plus_ratio is not None:
        own.append(({"lr": settings.lora_plus_ratio * settings.lr}, _factors_b(model)))
    own += more
    if not own:
        return trained
    parts: dict[tuple[int, ...], dict[str, Any]] = {}
    for parameter in trained:
        which = tuple(i for i, (_, ids) in enumerate(own) if id(parameter) in ids)
        group = parts.setdefault(which, {"params": []})
        group["params"].append(parameter)
        for index in which:
            group |= own[index][0]
    return [parts[which] for which in sorted(parts)]


def _factors_b(model: "nn.Module") -> set[int]:
    """B of LoRA's adapters, linear layers' and embeddings'. Raises ValueError without adapters."""
    names = (".lora_B.", ".lora_embedding_B.")
    found = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(part in name for part in names)
    }
    if not found:
        raise ValueError("--lora_plus_ratio: the model has no LoRA adapters; set --lora_rank")
    return found


def _vocabulary(model: "nn.Module") -> set[int]:
    """The trained parameters of token embedding and vocabulary head, once where they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {
        id(parameter)
        for module in modules
        if module is not None
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    if not found:
        raise ValueError(
            "--embedding_lr: embedding and head are not trained: LoRA adapts neither. Name them in "
            "modules_to_save of --lora_config (embed_tokens and lm_head, as most models call "
            "them), or train without LoRA"
        )
    return found


def can_compile() -> bool:
    """Whether ColossalAI's CUDA kernels could be compiled here: they are, at first use."""
    from torch.utils.cpp_extension import CUDA_HOME

    return (
        CUDA_HOME is not None
        and shutil.which("ninja") is not None
        and shutil.which("g++") is not None
    )


def grad_scaler(optimizer):
    """The dynamic loss scaler of ColossalAI's fp16 optimizers, or None."""
    for name in ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision"):
        scaler = getattr(getattr(optimizer, name, None), "grad_scaler", None)
        if scaler is not None:
            return scaler
    return None
