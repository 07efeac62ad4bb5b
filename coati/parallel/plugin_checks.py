"""What a plugin, or a model's shape, cannot do, in sentences. Imports neither torch nor
ColossalAI."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from coati.parallel.options import SP_MODES, ParallelOptions

if TYPE_CHECKING:
    from coati.parallel.plugins import Plugin


def problems(options: ParallelOptions, plugin: "Plugin") -> Iterator[str]:
    """Each reason why ``plugin`` cannot do what ``options`` ask, one sentence with the flag and
    what to use instead."""
    name = options.plugin
    if options.precision is not None and options.precision not in plugin.precisions:
        yield (
            f"--plugin {name} has no {options.precision}: use --mixed_precision "
            f"{' or '.join(plugin.precisions)}, "
            "or --plugin zero2, which has all three"
        )
    if options.lora and not plugin.lora:
        yield f"--plugin {name} cannot train LoRA adapters; drop --lora_rank/--lora_config or use --plugin zero2"
    if options.accumulation_steps > 1 and not plugin.accumulation:
        yield f"--plugin {name} cannot accumulate gradients; use --accumulation_steps 1 or --plugin gemini"
    if options.packing:
        yield from _packing_problems(options)
    if not plugin.parallel:
        yield from _not_hybrid_problems(options)
    else:
        yield from _hybrid_problems(options)


def cannot_generate(options: ParallelOptions) -> str | None:
    """Why a model split as ``options`` say (resolved) cannot be sampled from; None where it can."""
    if options.pp > 1:
        return f"--pp {options.pp}: a model split into pipeline stages cannot generate; split it by --tp instead"
    if options.enable_sequence_parallelism:
        return (
            "--enable_sequence_parallelism, --sp: a model split along the sequence cannot "
            "generate; split it by --tp "
            "instead"
        )
    if options.use_flash_attn and options.plugin in ("3d", "gemini", "gemini_auto"):
        return (
            f"--use_flash_attn with --plugin {options.plugin}: ColossalAI's attention reads no "
            "key-value cache, so the "
            "model cannot generate; drop --use_flash_attn, or use --plugin zero2"
        )
    return None


def _packing_problems(options: ParallelOptions) -> Iterator[str]:
    if options.enable_sequence_parallelism:
        yield (
            "--packing cannot be combined with --enable_sequence_parallelism: ColossalAI's "
            "attention over a split "
            "sequence takes padding masks only, and would let the rows of a pack see each other; "
            "use --tp or --pp, or "
            "drop --packing"
        )
    if options.use_flash_attn and options.plugin in ("3d", "gemini", "gemini_auto"):
        yield (
            "--packing with --use_flash_attn needs a plugin that leaves the model's attention "
            "alone, --plugin "
            f"{options.plugin} puts ColossalAI's in its place; use --plugin zero2, or drop "
            "--use_flash_attn"
        )


def _not_hybrid_problems(options: ParallelOptions) -> Iterator[str]:
    for flag, size in (("--pp", options.pp), ("--sp", options.sp)):
        if size > 1:
            yield f"{flag} {size} needs --plugin 3d; --plugin {options.plugin} does not split layers or sequences"
    if options.enable_sequence_parallelism:
        yield f"--enable_sequence_parallelism needs --plugin 3d, not {options.plugin}"
    if options.zero_cpu_offload:
        instead = {
            "gemini": "gemini_auto, which moves what is idle to host memory by itself, or zero2_cpu"
        }
        yield (
            f"--zero_cpu_offload belongs to --plugin 3d and zero2; --plugin {options.plugin} does "
            "not take it: drop it "
            f"or use --plugin {instead.get(options.plugin, 'zero2_cpu')}"
        )
    if options.zero_stage not in (0, 2 if options.plugin.startswith("zero2") else 3):
        yield f"--zero_stage {options.zero_stage} belongs to --plugin 3d; --plugin {options.plugin} fixes its own stage"


def _hybrid_problems(options: ParallelOptions) -> Iterator[str]:
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
        yield "--zero_cpu_offload moves ZeRO's optimizer states: set --zero_stage 1 or 2, or use --plugin zero2_cpu"
    yield from _pipeline_problems(options)
    yield from _sequence_problems(options)


def _pipeline_problems(options: ParallelOptions) -> Iterator[str]:
    if options.pp == 1 or options.batch_size is None:
        return
    rows = options.batch_size * options.accumulation_steps
    if rows % options.microbatch_size:
        yield (
            f"--microbatch_size {options.microbatch_size} does not divide the rows of one step, "
            "--batch_size "
            f"{options.batch_size} x --accumulation_steps {options.accumulation_steps} = {rows}"
        )
    elif rows // options.microbatch_size < options.pp:
        yield (
            f"--pp {options.pp} needs at least {options.pp} micro-batches per step, found {rows} "
            "rows / "
            f"--microbatch_size {options.microbatch_size} = {rows // options.microbatch_size}; "
            "raise --batch_size or "
            "--accumulation_steps, or lower --microbatch_size"
        )


def _sequence_problems(options: ParallelOptions) -> Iterator[str]:
    if not options.enable_sequence_parallelism:
        if options.sp > 1:
            yield f"--sp {options.sp} needs --enable_sequence_parallelism (and usually --sp_mode all_to_all)"
        return
    if options.sp_mode not in SP_MODES:
        yield f"--sp_mode {options.sp_mode}: unknown; choose one of {', '.join(SP_MODES)}"
    if options.sp_mode == "ring_attn":
        yield (
            "--sp_mode ring_attn: ColossalAI 0.5.0's ring attention keeps sequence and loss split "
            "in zigzag order and "
            "needs flash-attn on a GPU; this library does not offer it. Use --sp_mode all_to_all"
        )
    if options.sp_mode in ("split_gather", "ring") and options.tp == 1:
        yield f"--sp_mode {options.sp_mode} splits the sequence over the tensor-parallel processes: set --tp 2 or more"
    if options.sp_mode == "all_to_all" and options.sp == 1:
        yield "--sp_mode all_to_all needs --sp 2 or more"
    if options.pp > 1:
        yield "--enable_sequence_parallelism cannot be combined with --pp; use --tp and --sp, or --pp alone"


def check_heads(config: Any, options: ParallelOptions) -> None:
    """Raise ValueError when attention heads cannot be divided over ``--tp``, or over ``--tp`` x
    ``--sp`` of all_to_all (ColossalAI 0.5.0, shardformer/policies/llama.py:102)."""
    flag, ways = f"--tp {options.tp}", options.tp
    if options.sp_mode == "all_to_all" and options.sp > 1:
        flag, ways = (
            f"{flag} x --sp {options.sp}" if ways > 1 else f"--sp {options.sp}",
            ways * options.sp,
        )
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
    for what, count in (
        ("attention heads", heads),
        ("key/value heads", getattr(config, "num_key_value_heads", None)),
    ):
        if count and count % ways:
            divisors = [
                n for n in range(1, count + 1) if count % n == 0 and (heads or count) % n == 0
            ]
            raise ValueError(
                f"{flag}: this model's {count} {what} cannot be divided by {ways}; possible "
                "values: "
                f"{', '.join(map(str, divisors))}, or --plugin zero2 without it"
            )
