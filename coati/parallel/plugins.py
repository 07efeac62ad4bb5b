"""The plugins a user can name: what each shards, what it takes, what it cannot do. Imports neither torch nor
ColossalAI."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

PRECISIONS = ("fp32", "fp16", "bf16")
SP_MODES = ("split_gather", "ring", "all_to_all", "ring_attn")
# ColossalAI clips, and knows the gradient norm, only with a positive limit: this one never binds.
NO_CLIPPING = 1e30


@dataclass(frozen=True)
class ParallelOptions:
    """Named values of the parallel flags (``--plugin``, ``--tp``, ...), independent of any parser."""

    plugin: str = "zero2"
    precision: str | None = "fp32"  # None: follows the machine, decided later
    tp: int = 1
    pp: int = 1
    sp: int = 1
    sp_mode: str = "split_gather"
    enable_sequence_parallelism: bool = False
    zero_stage: int = 0
    zero_cpu_offload: bool = False
    grad_clip: float = 1.0
    accumulation_steps: int = 1
    batch_size: int | None = None
    microbatch_size: int = 1
    grad_checkpoint: bool = False
    use_flash_attn: bool = False
    lora: bool = False
    plugin_args: dict[str, Any] = field(default_factory=dict)

    @property
    def max_norm(self) -> float:
        return self.grad_clip if self.grad_clip and self.grad_clip > 0 else NO_CLIPPING

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one copy of the data: tp x pp x sp."""
        return self.tp * self.pp * self.sp

    @property
    def sequence_multiple(self) -> int:
        """What every padded length must be a multiple of."""
        if not self.enable_sequence_parallelism:
            return 1
        return self.tp if self.sp_mode in ("split_gather", "ring") else self.sp


@dataclass(frozen=True)
class Plugin:
    """One row of the plugin table.

    ``keywords`` maps the options to the ColossalAI plugin's own keywords; ``upstream`` is the name of that class.
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
        # The vocabulary head gathers its own output: generation and the chunked log-probs both need whole rows.
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
            # With SDPA and no padding ColossalAI's sequence-parallel attention loses its causal mask.
            "enable_flash_attention": True,
        }
    return keywords


PLUGINS: dict[str, Plugin] = {
    "ddp": Plugin(
        upstream="TorchDDPPlugin",
        shards="nothing: every process holds the whole model",
        keywords=lambda o: {},
        precisions=PRECISIONS,
        best_for="debugging; small models; the reference the others are compared with",
        cannot="shard anything: weights, gradients and optimiser states are held whole by every process",
    ),
    "zero2": Plugin(
        upstream="LowLevelZeroPlugin",
        shards="gradients and optimiser states over the data-parallel processes",
        keywords=lambda o: _zero2(o, offload=False),
        precisions=PRECISIONS,
        best_for="the default: one process or many, with or without LoRA",
        cannot="be combined with a pipeline (gradients would be exchanged once per micro-batch)",
    ),
    "zero2_cpu": Plugin(
        upstream="LowLevelZeroPlugin",
        shards="as zero2, and keeps the optimiser states in host memory",
        keywords=lambda o: _zero2(o, offload=True),
        precisions=PRECISIONS,
        best_for="models whose optimiser states do not fit the GPU",
        cannot="be combined with a pipeline",
    ),
    "gemini": Plugin(
        upstream="GeminiPlugin",
        shards="weights, gradients and optimiser states in chunks (ZeRO-3)",
        keywords=lambda o: _gemini(o, "static"),
        precisions=("fp16", "bf16"),
        lora=False,
        zero_stages=(3,),
        best_for="large models on several GPUs without LoRA",
        generation="with the library's own sampling loop",
        cannot="train LoRA adapters; train in fp32; use an optimiser other than ColossalAI's own Adam",
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
        cannot="train LoRA adapters with tp, pp or sp; combine zero_stage 1-2 with fp32; zero_stage 2 with pp",
    ),
}


def resolve_options(options: ParallelOptions) -> tuple[ParallelOptions, list[str]]:
    """What the named combination really runs as, and one sentence for each replacement."""
    notes: list[str] = []
    if options.zero_stage == 3 and options.plugin == "3d":
        notes.append(f"--zero_stage 3 means Gemini: --plugin 3d became --plugin gemini with --tp {options.tp}.")
        options = replace(options, plugin="gemini", zero_stage=0)
    elif options.tp > 1 and options.plugin not in ("3d", "gemini"):
        notes.append(f"--tp {options.tp} needs tensor parallelism: --plugin {options.plugin} became --plugin 3d.")
        options = replace(options, plugin="3d")
    if options.enable_sequence_parallelism and options.sp_mode in ("split_gather", "ring") and options.sp > 1:
        notes.append(
            f"--sp_mode {options.sp_mode} splits the sequence over the tp processes: --sp {options.sp} became 1."
        )
        options = replace(options, sp=1)
    return options, notes


def check_options(plugin: str, *, world_size: int | None = None, **values: Any) -> None:
    """Raise ValueError, naming the flags and what to use instead, for a combination that cannot work.

    ``values`` are fields of :class:`ParallelOptions`; ``world_size`` is the number of processes when it is known.
    """
    if plugin not in PLUGINS:
        raise ValueError(f"--plugin {plugin}: unknown; choose one of {', '.join(PLUGINS)}")
    options, _ = resolve_options(ParallelOptions(plugin=plugin, **values))
    for problem in _problems(options, PLUGINS[options.plugin]):
        raise ValueError(problem)
    if world_size is not None and world_size % options.model_parallel_size:
        raise ValueError(
            f"{world_size} processes cannot be divided by --tp {options.tp} x --pp {options.pp} x --sp {options.sp} = "
            f"{options.model_parallel_size}; start a multiple of {options.model_parallel_size} with --nproc_per_node"
        )


def _problems(options: ParallelOptions, plugin: Plugin):
    name = options.plugin
    if options.precision is not None and options.precision not in plugin.precisions:
        yield (
            f"--plugin {name} has no {options.precision}: use --mixed_precision {' or '.join(plugin.precisions)}, "
            "or --plugin zero2, which has all three"
        )
    if options.lora and not plugin.lora:
        yield f"--plugin {name} cannot train LoRA adapters; drop --lora_rank/--lora_config or use --plugin zero2"
    if options.accumulation_steps > 1 and not plugin.accumulation:
        yield f"--plugin {name} cannot accumulate gradients; use --accumulation_steps 1 or --plugin gemini"
    if not plugin.parallel:
        yield from _not_hybrid_problems(options)
    else:
        yield from _hybrid_problems(options)


def _not_hybrid_problems(options: ParallelOptions):
    for flag, size in (("--pp", options.pp), ("--sp", options.sp)):
        if size > 1:
            yield f"{flag} {size} needs --plugin 3d; --plugin {options.plugin} does not split layers or sequences"
    if options.enable_sequence_parallelism:
        yield f"--enable_sequence_parallelism needs --plugin 3d, not {options.plugin}"
    if options.zero_stage not in (0, 2 if options.plugin.startswith("zero2") else 3):
        yield f"--zero_stage {options.zero_stage} belongs to --plugin 3d; --plugin {options.plugin} fixes its own stage"


def _hybrid_problems(options: ParallelOptions):
    split = options.tp > 1 or options.pp > 1 or options.sp > 1
    if options.lora and split:
        yield (
            "--plugin 3d trains LoRA adapters only with --tp 1 --pp 1 --sp 1; "
            "use --plugin zero2, or drop --lora_rank/--lora_config"
        )
    if options.zero_stage and options.precision == "fp32":
        stage = options.zero_stage
        yield f"--zero_stage {stage} of --plugin 3d has no fp32; use --mixed_precision bf16 or --zero_stage 0"
    if options.zero_stage == 2 and options.pp > 1:
        yield "--zero_stage 2 cannot be combined with --pp: gradients are split per step; use --zero_stage 1"
    if options.zero_cpu_offload and not options.zero_stage:
        yield "--zero_cpu_offload moves ZeRO's optimiser states: set --zero_stage 1 or 2, or use --plugin zero2_cpu"
    yield from _pipeline_problems(options)
    yield from _sequence_problems(options)


def _pipeline_problems(options: ParallelOptions):
    if options.pp == 1 or options.batch_size is None:
        return
    rows = options.batch_size * options.accumulation_steps
    if rows % options.microbatch_size:
        yield (
            f"--microbatch_size {options.microbatch_size} does not divide the rows of one step, --batch_size "
            f"{options.batch_size} x --accumulation_steps {options.accumulation_steps} = {rows}"
        )
    elif rows // options.microbatch_size < options.pp:
        yield (
            f"--pp {options.pp} needs at least {options.pp} micro-batches per step, found {rows} rows / "
            f"--microbatch_size {options.microbatch_size} = {rows // options.microbatch_size}; raise --batch_size or "
            "--accumulation_steps, or lower --microbatch_size"
        )


def _sequence_problems(options: ParallelOptions):
    if not options.enable_sequence_parallelism:
        if options.sp > 1:
            yield f"--sp {options.sp} needs --enable_sequence_parallelism (and usually --sp_mode all_to_all)"
        return
    if options.sp_mode not in SP_MODES:
        yield f"--sp_mode {options.sp_mode}: unknown; choose one of {', '.join(SP_MODES)}"
    if options.sp_mode == "ring_attn":
        yield (
            "--sp_mode ring_attn: ColossalAI 0.5.0's ring attention keeps sequence and loss split in zigzag order and "
            "needs flash-attn on a GPU; this library does not offer it. Use --sp_mode all_to_all"
        )
    if options.sp_mode in ("split_gather", "ring") and options.tp == 1:
        yield f"--sp_mode {options.sp_mode} splits the sequence over the tensor-parallel processes: set --tp 2 or more"
    if options.sp_mode == "all_to_all" and options.sp == 1:
        yield "--sp_mode all_to_all needs --sp 2 or more"
    if options.pp > 1:
        yield "--enable_sequence_parallelism cannot be combined with --pp; use --tp and --sp, or --pp alone"


def check_heads(config: Any, options: ParallelOptions) -> None:
    """Raise ValueError when attention heads cannot be divided over ``--tp`` (or ``--sp`` of all_to_all)."""
    ways = {"--tp": options.tp, "--sp": options.sp if options.sp_mode == "all_to_all" else 1}
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
    for flag, size in ways.items():
        for what, count in (
            ("attention heads", heads),
            ("key/value heads", getattr(config, "num_key_value_heads", None)),
        ):
            if count and size > 1 and count % size:
                divisors = [n for n in range(1, count + 1) if count % n == 0 and (heads or count) % n == 0]
                raise ValueError(
                    f"{flag} {size}: this model's {count} {what} cannot be divided by {size}; "
                    f"possible values: {', '.join(map(str, divisors))}, or --plugin zero2 without {flag}"
                )
