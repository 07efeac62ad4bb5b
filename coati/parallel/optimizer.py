"""AdamW and its settings, and which implementation a plugin gets.

Imports neither torch nor ColossalAI before an optimizer is built.
"""

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coati.parallel.lr_schedule import DECAY, DEFAULT, FLOOR, LRSchedule
from coati.parallel.options import ParallelOptions
from coati.parallel.plugins import PLUGINS
from coati.utils.logging import get_logger

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

logger = get_logger(__name__)

ADAM_BETA1 = 0.9


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101) and its schedule.

    ``lr``: peak learning rate, ``head_lr`` that of a scalar head (None: ``lr``). ``warmup_steps``:
    optimizer steps of linear warmup (None: 2.5% of all). The rest are fields of
    :class:`~coati.parallel.lr_schedule.LRSchedule`.
    """

    lr: float = 5e-6
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    warmup_steps: int | None = None
    head_lr: float | None = None
    lr_scheduler: str = DEFAULT
    lr_min_ratio: float = FLOOR
    decay_ratio: float = DECAY

    @property
    def schedule(self) -> LRSchedule:
        """The shape of the learning rate."""
        return LRSchedule(self.lr_scheduler, self.warmup_steps, self.lr_min_ratio, self.decay_ratio)


def build_optimizer(
    model: "nn.Module", options: ParallelOptions, settings: OptimizerSettings
) -> "Optimizer":
    """AdamW over the trainable parameters of ``model``: ColossalAI's where the plugin needs it or
    it can be compiled, else PyTorch's."""
    import torch

    parameters = _groups(model, settings.head_lr)
    keywords: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (ADAM_BETA1, settings.adam_beta2),
        "weight_decay": settings.weight_decay,
    }
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


def _groups(model: "nn.Module", head_lr: float | None) -> list[Any]:
    """What is trained; with ``head_lr`` the scalar head in a group of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if head_lr is None:
        return trained
    head = {id(parameter) for parameter in model.score.parameters()}
    mine = [parameter for parameter in trained if id(parameter) in head]
    return [{"params": [p for p in trained if id(p) not in head]}, {"params": mine, "lr": head_lr}]


def can_compile() -> bool:
    """Whether ColossalAI's CUDA kernels could be compiled here: they are, at first use."""
    from torch.utils.cpp_extension import CUDA_HOME

    return (
        CUDA_HOME is not None
        and shutil.which("ninja") is not None
        and shutil.which("g++") is not None
    )
