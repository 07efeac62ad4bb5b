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

    ``lr``: peak learning rate, ``head_lr`` that of a scalar head, ``embedding_lr`` that of token
    embedding and vocabulary head (None: ``lr``). ``warmup_steps``: optimizer steps of linear warmup
    (None: 2.5% of all). The rest are fields of :class:`~coati.parallel.lr_schedule.LRSchedule`.
    """

    lr: float = 5e-6
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    warmup_steps: int | None = None
    head_lr: float | None = None
    embedding_lr: float | None = None
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
    it can be compiled, else PyTorch's. Raises ValueError for a rate of its own for what is not
    trained."""
    import torch

    parameters = _groups(model, settings)
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


def _groups(model: "nn.Module", settings: OptimizerSettings) -> list[Any]:
    """What is trained: one group, and one more for each part with a learning rate of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own: list[tuple[float, set[int]]] = []
    if settings.head_lr is not None:
        own.append((settings.head_lr, {id(p) for p in model.score.parameters()}))
    if settings.embedding_lr is not None:
        own.append((settings.embedding_lr, _vocabulary(model)))
    if not own:
        return trained
    apart = set().union(*(ids for _, ids in own))
    groups: list[Any] = [{"params": [p for p in trained if id(p) not in apart]}]
    for rate, ids in own:
        groups.append({"params": [p for p in trained if id(p) in ids], "lr": rate})
    return groups


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
