"""The plugins a user can name, one row each: what it shards, takes, needs and cannot do.

What depends on a plugin reads a field of its row; nothing else tests a plugin's name, so that a
plugin more is a row more. Imports neither torch nor ColossalAI.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coati.parallel.options import PRECISIONS, SP_MODES, ParallelOptions

__all__ = [
    "HYBRID",
    "PLUGINS",
    "PRECISIONS",
    "SP_MODES",
    "ZERO_3",
    "ParallelOptions",
    "Plugin",
]


@dataclass(frozen=True)
class Plugin:
    """One row of the plugin table. A field that is left out says what plain data parallelism does.

    Attributes:
        upstream: name of ColossalAI's class.
        keywords: the options as that class's keywords.
        shards, best_for, cannot, generation, packing: texts of docs/plugins.md.
        precisions: values of ``--mixed_precision``.
        lora: it trains LoRA adapters.
        accumulation: several backward passes may come before a step.
        tensor_parallel: it takes ``--tp``; with ``scalar_head_tp`` for a scalar head too.
        hybrid: it takes ``--pp``, ``--sp`` and ``--zero_cpu_offload``, and splits layers by
            ColossalAI's policy for the model family, even with ``--tp 1``.
        zero_stages: values of ``--zero_stage`` beside 0.
        offload_plugin: the plugin that ``--zero_cpu_offload`` makes of it.
        offload_instead: what the refusal of ``--zero_cpu_offload`` names.
        fp32_weights: weights are held in fp32 and run under autocast; no master weights beside
            them.
        shards_optimizer, shards_gradients: over the data-parallel processes.
        sharded_forward: parameters are gathered for each forward and every one needs a gradient
            (ZeRO-3), so that all ranks must call it together.
        places_weights: it decides itself whether weights are on the device or on the host.
        host_optimizer: the optimizer's states are in host memory.
        own_adam: it needs ColossalAI's HybridAdam.
        own_attention: with ``--use_flash_attn`` it puts ColossalAI's attention in the model's
        place. padding_free: device types on which the model can be given batches without padding.
    """

    upstream: str
    shards: str
    keywords: Callable[[ParallelOptions], dict[str, Any]]
    precisions: tuple[str, ...]
    best_for: str
    cannot: str
    generation: str = "yes"
    packing: str = "yes"
    lora: bool = True
    accumulation: bool = True
    tensor_parallel: bool = False
    scalar_head_tp: bool = True
    hybrid: bool = False
    zero_stages: tuple[int, ...] = ()
    offload_plugin: str | None = None
    offload_instead: str = "zero2_cpu"
    fp32_weights: bool = False
    shards_optimizer: bool = False
    shards_gradients: bool = False
    sharded_forward: bool = False
    places_weights: bool = False
    host_optimizer: bool = False
    own_adam: bool = False
    own_attention: bool = False
    padding_free: tuple[str, ...] = ("cpu", "cuda")

    @property
    def whole_weights(self) -> bool:
        """Every process holds the weights whole, so that several models can share them."""
        return not (self.hybrid or self.sharded_forward)


def low_level_zero(options: ParallelOptions, stage: int, offload: bool = False) -> dict[str, Any]:
    """Keywords of ColossalAI's LowLevelZeroPlugin."""
    return {
        "stage": stage,
        "precision": options.precision,
        "max_norm": options.max_norm,
        "initial_scale": 2**16,
        "cpu_offload": offload,
    }


def _gemini(options: ParallelOptions, placement: str) -> dict[str, Any]:
    return {
        "precision": options.precision,
        "placement_policy": placement,
        "max_norm": options.max_norm,
        "initial_scale": 2**16,
        "tp_size": options.tp,
        "enable_flash_attention": options.use_flash_attn,
        "enable_gradient_accumulation": options.accumulates,
    }


def _hybrid(options: ParallelOptions) -> dict[str, Any]:
    keywords = {
        "tp_size": options.tp,
        "pp_size": options.pp,
        "precision": options.precision,
        "zero_stage": options.zero_stage,
        "cpu_offload": options.zero_cpu_offload,
        "max_norm": options.max_norm,
        "initial_scale": 2**16,
        "enable_flash_attention": options.use_flash_attn,
        # The vocabulary head gathers its own output: generation and the chunked log-probs both need
        # whole rows.
        "parallel_output": False,
        # Lengths vary from batch to batch; the cache would keep the first one (one_f_one_b.py:93).
        "enable_metadata_cache": False,
    }
    if options.pp > 1:
        keywords["microbatch_size"] = options.microbatch_size
    if options.enable_sequence_parallelism:
        keywords |= {
            "sp_size": options.sp,
            "enable_sequence_parallelism": True,
            "sequence_parallelism_mode": options.sp_mode,
            # With SDPA and no padding ColossalAI's sequence-parallel attention loses its causal
            # mask.
            "enable_flash_attention": True,
        }
    return keywords


# What both Gemini rows have in common (zero/gemini: chunks of parameters, gathered when they are
# used)
_GEMINI: dict[str, Any] = {
    "upstream": "GeminiPlugin",
    "precisions": ("fp16", "bf16"),
    "generation": "with the library's own sampling loop",
    "lora": False,
    "scalar_head_tp": False,
    "zero_stages": (3,),
    "shards_optimizer": True,
    "shards_gradients": True,
    "sharded_forward": True,
    "places_weights": True,
    "own_adam": True,
    "own_attention": True,
}

HYBRID = "3d"  # what --tp, --pp, --sp and --zero_stage 1 or 2 ask for
ZERO_3 = "gemini"  # what --zero_stage 3 asks for

PLUGINS: dict[str, Plugin] = {
    "ddp": Plugin(
        upstream="TorchDDPPlugin",
        shards="nothing: every process holds the whole model",
        keywords=lambda options: {},
        precisions=PRECISIONS,
        best_for="one process on a CPU; small models; debugging; the reference the others are "
        "compared with",
        cannot="shard anything: weights, gradients and optimizer states are held whole by every "
        "process",
        fp32_weights=True,
    ),
    "zero2": Plugin(
        upstream="LowLevelZeroPlugin",
        shards="gradients and optimizer states over the data-parallel processes",
        keywords=lambda options: low_level_zero(options, stage=2),
        precisions=PRECISIONS,
        best_for="most runs: one process or many, with or without LoRA",
        cannot="be combined with a pipeline (gradients would be exchanged once per micro-batch)",
        zero_stages=(2,),
        offload_plugin="zero2_cpu",
        shards_optimizer=True,
        shards_gradients=True,
    ),
    "zero2_cpu": Plugin(
        upstream="LowLevelZeroPlugin",
        shards="as zero2, and keeps the optimizer states in host memory",
        keywords=lambda options: low_level_zero(options, stage=2, offload=True),
        precisions=PRECISIONS,
        best_for="models whose optimizer states do not fit the GPU",
        cannot="be combined with a pipeline",
        zero_stages=(2,),
        offload_plugin="zero2_cpu",
        shards_optimizer=True,
        shards_gradients=True,
        host_optimizer=True,
    ),
    ZERO_3: Plugin(
        shards="weights, gradients and optimizer states in chunks (ZeRO-3)",
        keywords=lambda options: _gemini(options, "static"),
        best_for="large models on several GPUs without LoRA",
        cannot="train LoRA adapters; train in fp32; use an optimizer other than ColossalAI's own "
        "Adam",
        tensor_parallel=True,
        offload_instead="gemini_auto, which moves what is idle to host memory by itself, or "
        "zero2_cpu",
        padding_free=("cpu",),
        **_GEMINI,
    ),
    "gemini_auto": Plugin(
        shards="as gemini, and moves what is idle to host memory by itself",
        keywords=lambda options: _gemini(options, "auto"),
        best_for="models that do not fit with gemini",
        cannot="train LoRA adapters; train in fp32; accumulate gradients",
        accumulation=False,
        padding_free=(),
        **_GEMINI,
    ),
    HYBRID: Plugin(
        upstream="HybridParallelPlugin",
        shards="weights over tp processes, layers over pp, the sequence over sp; zero_stage 1-2 as "
        "zero2 does",
        keywords=_hybrid,
        precisions=PRECISIONS,
        best_for="models from 20B or PPO (tp), many layers on several hosts (pp), sequences from "
        "50K tokens (sp)",
        cannot="train LoRA adapters with pp or sp; combine zero_stage 1-2 with fp32; "
        "zero_stage 2 with pp",
        generation="without pipeline and sequence parallelism",
        packing="without sequence parallelism",
        tensor_parallel=True,
        hybrid=True,
        zero_stages=(1, 2),
        own_attention=True,
        padding_free=(),
    ),
}
