"""The plugins a user can name: what each shards, what it takes, what it cannot do. Imports neither
torch nor ColossalAI."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from coati.parallel.options import PRECISIONS, SP_MODES, ParallelOptions
from coati.parallel.plugin_checks import check_heads, problems

__all__ = [
    "PLUGINS",
    "PRECISIONS",
    "SP_MODES",
    "ParallelOptions",
    "Plugin",
    "check_heads",
    "check_options",
    "resolve_options",
]


@dataclass(frozen=True)
class Plugin:
    """One row of the plugin table.

    ``keywords`` maps the options to the ColossalAI plugin's own keywords; ``upstream`` is the name
    of that class.
    """

    upstream: str
    shards: str
    keywords: Callable[[ParallelOptions], dict[str, Any]]
    precisions: tuple[str, ...]
    best_for: str
    lora: bool = True
    accumulation: bool = True
    parallel: bool = False  # tp, pp, sp
    zero_stages: tuple[int, ...] = ()
    generation: str = "yes"
    packing: str = "yes"
    cannot: str = ""


def _zero2(options: ParallelOptions, offload: bool) -> dict[str, Any]:
    return {
        "stage": 2,
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
        "enable_gradient_accumulation": options.accumulation_steps > 1,
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


PLUGINS: dict[str, Plugin] = {
    "ddp": Plugin(
        upstream="TorchDDPPlugin",
        shards="nothing: every process holds the whole model",
        keywords=lambda o: {},
        precisions=PRECISIONS,
        best_for="one process on a CPU; small models; debugging; the reference the others are compared with",
        cannot="shard anything: weights, gradients and optimizer states are held whole by every process",
    ),
    "zero2": Plugin(
        upstream="LowLevelZeroPlugin",
        shards="gradients and optimizer states over the data-parallel processes",
        keywords=lambda o: _zero2(o, offload=False),
        precisions=PRECISIONS,
        best_for="most runs: one process or many, with or without LoRA",
        cannot="be combined with a pipeline (gradients would be exchanged once per micro-batch)",
    ),
    "zero2_cpu": Plugin(
        upstream="LowLevelZeroPlugin",
        shards="as zero2, and keeps the optimizer states in host memory",
        keywords=lambda o: _zero2(o, offload=True),
        precisions=PRECISIONS,
        best_for="models whose optimizer states do not fit the GPU",
        cannot="be combined with a pipeline",
    ),
    "gemini": Plugin(
        upstream="GeminiPlugin",
        shards="weights, gradients and optimizer states in chunks (ZeRO-3)",
        keywords=lambda o: _gemini(o, "static"),
        precisions=("fp16", "bf16"),
        lora=False,
        zero_stages=(3,),
        best_for="large models on several GPUs without LoRA",
        generation="with the library's own sampling loop",
        cannot="train LoRA adapters; train in fp32; use an optimizer other than ColossalAI's own Adam",
    ),
    "gemini_auto": Plugin(
        upstream="GeminiPlugin",
        shards="as gemini, and moves what is idle to host memory by itself",
        keywords=lambda o: _gemini(o, "auto"),
        precisions=("fp16", "bf16"),
        lora=False,
        accumulation=False,
        best_for="models that do not fit with gemini",
        generation="with the library's own sampling loop",
        cannot="train LoRA adapters; train in fp32; accumulate gradients",
    ),
    "3d": Plugin(
        upstream="HybridParallelPlugin",
        shards="weights over tp processes, layers over pp, the sequence over sp; zero_stage 1-2 as zero2 does",
        keywords=_hybrid,
        precisions=PRECISIONS,
        parallel=True,
        zero_stages=(0, 1, 2),
        best_for="models from 20B or PPO (tp), many layers on several hosts (pp), sequences from 50K tokens (sp)",
        generation="without pipeline and sequence parallelism",
        packing="without sequence parallelism",
        cannot="train LoRA adapters with tp, pp or sp; combine zero_stage 1-2 with fp32; zero_stage 2 with pp",
    ),
}


def resolve_options(options: ParallelOptions) -> tuple[ParallelOptions, list[str]]:
    """What the named combination really runs as, and one sentence for each replacement."""
    notes: list[str] = []
    if options.zero_stage == 3 and options.plugin == "3d":
        notes.append(
            "--zero_stage 3 means Gemini: --plugin 3d became --plugin gemini with --tp "
            f"{options.tp}."
        )
        options = replace(options, plugin="gemini", zero_stage=0)
    elif options.tp > 1 and options.plugin not in ("3d", "gemini"):
        notes.append(
            f"--tp {options.tp} needs tensor parallelism: --plugin {options.plugin} became "
            "--plugin 3d."
        )
        options = replace(options, plugin="3d")
    if options.zero_cpu_offload and options.plugin in ("zero2", "zero2_cpu"):
        if options.plugin == "zero2":
            notes.append(
                "--zero_cpu_offload with --plugin zero2 is what --plugin zero2_cpu does: that was "
                "taken."
            )
        options = replace(options, plugin="zero2_cpu", zero_cpu_offload=False)
    if (
        options.enable_sequence_parallelism
        and options.sp_mode in ("split_gather", "ring")
        and options.sp > 1
    ):
        notes.append(
            f"--sp_mode {options.sp_mode} splits the sequence over the tp processes: --sp "
            f"{options.sp} became 1."
        )
        options = replace(options, sp=1)
    return options, notes


def check_options(plugin: str, *, world_size: int | None = None, **values: Any) -> None:
    """Raise ValueError, naming the flags and what to use instead, for a combination that cannot
    work.

    ``values`` are fields of :class:`ParallelOptions`; ``world_size`` is the number of processes
    when it is known.
    """
    if plugin not in PLUGINS:
        raise ValueError(f"--plugin {plugin}: unknown; choose one of {', '.join(PLUGINS)}")
    options, _ = resolve_options(ParallelOptions(plugin=plugin, **values))
    for problem in problems(options, PLUGINS[options.plugin]):
        raise ValueError(problem)
    if world_size is not None and world_size % options.model_parallel_size:
        raise ValueError(
            f"{world_size} processes cannot be divided by --tp {options.tp} x --pp {options.pp} x "
            f"--sp {options.sp} = "
            f"{options.model_parallel_size}; start a multiple of {options.model_parallel_size} "
            "with --nproc_per_node"
        )
