"""What a plugin, or a model's shape, cannot do, in sentences. Imports neither torch nor
ColossalAI."""

from dataclasses import replace
from typing import Any

from coati.parallel.options import SP_MODES, ParallelOptions
from coati.parallel.plugins import HYBRID, PLUGINS, ZERO_3, Plugin
from coati.utils.transformers_compat import text_config, transformers_major


def resolve_options(options: ParallelOptions) -> tuple[ParallelOptions, list[str]]:
    """What the named combination really runs as, and one sentence for each replacement."""
    notes: list[str] = []
    row = PLUGINS[options.plugin]
    if options.zero_stage == 3 and row.hybrid:
        notes.append(
            f"--zero_stage 3 means Gemini: --plugin {options.plugin} became --plugin {ZERO_3} with "
            f"--tp {options.tp}."
        )
        options = replace(options, plugin=ZERO_3, zero_stage=0)
    elif options.tp > 1 and not row.tensor_parallel:
        notes.append(
            f"--tp {options.tp} needs tensor parallelism: --plugin {options.plugin} became "
            f"--plugin {HYBRID}."
        )
        options = replace(options, plugin=HYBRID)
    offload_plugin = PLUGINS[options.plugin].offload_plugin
    if options.zero_cpu_offload and offload_plugin:
        if options.plugin != offload_plugin:
            notes.append(
                f"--zero_cpu_offload with --plugin {options.plugin} is what --plugin "
                f"{offload_plugin} does: that was taken."
            )
        options = replace(options, plugin=offload_plugin, zero_cpu_offload=False)
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
    for problem in problems(options):
        raise ValueError(problem)
    if world_size is not None and world_size % options.model_parallel_size:
        raise ValueError(
            f"{world_size} processes cannot be divided by --tp {options.tp} x --pp {options.pp} x "
            f"--sp {options.sp} = {options.model_parallel_size}; start a multiple of "
            f"{options.model_parallel_size} with --nproc_per_node"
        )


# Whether a rule is broken, and the sentence that says so: the flag, and what to use instead
Rule = tuple[bool, str]


def problems(options: ParallelOptions) -> list[str]:
    """Each reason why the plugin of ``options`` (resolved) cannot do what they ask, one sentence
    with the flag and what to use instead."""
    name = options.plugin
    plugin = PLUGINS[name]
    rules = [
        (
            options.precision is not None and options.precision not in plugin.precisions,
            f"--plugin {name} has no {options.precision}: use --mixed_precision "
            f"{' or '.join(plugin.precisions)}, or --plugin zero2, which has all three",
        ),
        (
            options.lora and not plugin.lora,
            f"--plugin {name} cannot train LoRA adapters; drop --lora_rank/--lora_config or "
            "use --plugin zero2",
        ),
        (
            options.accumulation_steps > 1 and not plugin.accumulation,
            f"--plugin {name} cannot accumulate gradients; use --accumulation_steps 1 or "
            "--plugin gemini",
        ),
        (
            options.tokens_per_batch is not None and not plugin.accumulation,
            f"--tokens_per_batch makes several micro-batches of a step, and --plugin {name} cannot "
            "accumulate gradients; leave it out, or use --plugin gemini",
        ),
        (
            options.tokens_per_batch is not None and options.pp > 1,
            f"--tokens_per_batch: a pipeline (--pp {options.pp}) cuts its micro-batches by "
            "--microbatch_size; leave one of the two out",
        ),
        (
            options.offload_activations and not options.grad_checkpoint,
            "--offload_activations moves the inputs of layers that are computed again: it needs "
            "--grad_checkpoint",
        ),
        *_adapter_rules(options, plugin),
        *_packing_rules(options, plugin),
        *(_hybrid_rules(options) if plugin.hybrid else _other_rules(options, plugin)),
    ]
    return [text for broken, text in rules if broken]


def cannot_generate(options: ParallelOptions) -> str | None:
    """Why a model split as ``options`` say (resolved) cannot be sampled from; None where it can."""
    if options.pp > 1:
        return (
            f"--pp {options.pp}: a model split into pipeline stages cannot generate; split "
            "it by --tp instead"
        )
    if options.enable_sequence_parallelism:
        return (
            "--enable_sequence_parallelism, --sp: a model split along the sequence cannot "
            "generate; split it by --tp instead"
        )
    if options.use_flash_attn and PLUGINS[options.plugin].own_attention:
        return (
            f"--use_flash_attn with --plugin {options.plugin}: ColossalAI's attention reads no "
            "key-value cache, so the model cannot generate; drop --use_flash_attn, or use --plugin "
            "zero2"
        )
    return None


def scalar_head_problem(
    plugin: str | None, tp: int, zero_stage: int, whose: str = "the gradients of a scalar head"
) -> str | None:
    """Why a model with a scalar head (reward model, critic) cannot be split by ``tp``; None where
    it can. ``plugin`` may not be chosen yet; ``whose``: what is wrong, as the user knows it."""
    asked = ParallelOptions(plugin=plugin or HYBRID, tp=tp, zero_stage=zero_stage)
    options, _ = resolve_options(asked)
    if tp == 1 or PLUGINS[options.plugin].scalar_head_tp:
        return None
    return (
        f"--tp {tp} under {options.plugin}: {whose} come out wrong there; use --plugin {HYBRID} "
        f"--tp {tp} with --zero_stage 0 to 2, or {options.plugin} without --tp"
    )


def _adapter_rules(options: ParallelOptions, plugin: Plugin) -> list[Rule]:
    kind = options.quantize_base
    split = options.model_parallel_size > 1 or options.enable_sequence_parallelism
    flags = {"--tp": options.tp, "--pp": options.pp, "--sp": options.sp}
    named = ", ".join(f"{flag} {size}" for flag, size in flags.items() if size > 1)
    return [
        (
            bool(kind) and not options.lora,
            f"--quantize_base {kind} needs LoRA: weights of few bits cannot be trained themselves; "
            "set --lora_rank (20 to 64), or drop --quantize_base",
        ),
        (
            bool(kind) and split,
            f"--quantize_base {kind} with {named or '--enable_sequence_parallelism'}: a quantized "
            "base cannot be split over processes; use --plugin zero2 without it",
        ),
        (
            options.use_dora and split,
            f"--use_dora with {named or '--enable_sequence_parallelism'}: the norms of split "
            "weights are not known to one process; use --plugin zero2 without it, or drop "
            "--use_dora",
        ),
    ]


def _packing_rules(options: ParallelOptions, plugin: Plugin) -> list[Rule]:
    return [
        (
            options.packing and options.enable_sequence_parallelism,
            "--packing cannot be combined with --enable_sequence_parallelism: ColossalAI's "
            "attention over a split sequence takes padding masks only, and would let the rows of a "
            "pack see each other; use --tp or --pp, or drop --packing",
        ),
        (
            options.packing and options.use_flash_attn and plugin.own_attention,
            "--packing with --use_flash_attn needs a plugin that leaves the model's attention "
            f"alone, --plugin {options.plugin} puts ColossalAI's in its place; use --plugin zero2, "
            "or drop --use_flash_attn",
        ),
    ]


def _other_rules(options: ParallelOptions, plugin: Plugin) -> list[Rule]:
    return [
        *(
            (
                size > 1,
                f"{flag} {size} needs --plugin 3d; --plugin {options.plugin} does not split "
                "layers or sequences",
            )
            for flag, size in (("--pp", options.pp), ("--sp", options.sp))
        ),
        (
            options.enable_sequence_parallelism,
            f"--enable_sequence_parallelism needs --plugin 3d, not {options.plugin}",
        ),
        (
            options.zero_cpu_offload,
            f"--zero_cpu_offload belongs to --plugin 3d and zero2; --plugin {options.plugin} does "
            f"not take it: drop it or use --plugin {plugin.offload_instead}",
        ),
        (
            options.zero_stage not in (0, *plugin.zero_stages),
            f"--zero_stage {options.zero_stage} belongs to --plugin 3d; --plugin "
            f"{options.plugin} fixes its own stage",
        ),
    ]


def _hybrid_rules(options: ParallelOptions) -> list[Rule]:
    stage = options.zero_stage
    return [
        (
            options.lora and options.model_parallel_size > 1 and not _splits_lora(options),
            f"--plugin 3d trains LoRA adapters only with {_LORA_WITH}; use --plugin zero2, or drop "
            "--lora_rank/--lora_config",
        ),
        (
            bool(stage) and options.precision == "fp32",
            f"--zero_stage {stage} of --plugin 3d has no fp32; use --mixed_precision bf16 "
            "or --zero_stage 0",
        ),
        (
            stage == 2 and options.pp > 1,
            "--zero_stage 2 cannot be combined with --pp: gradients are split per step; "
            "use --zero_stage 1",
        ),
        (
            options.zero_cpu_offload and not stage,
            "--zero_cpu_offload moves ZeRO's optimizer states: set --zero_stage 1 or 2, or "
            "use --plugin zero2_cpu",
        ),
        *_pipeline_rules(options),
        *_sequence_rules(options),
    ]


_LORA_WITH = "--pp 1 and whole sequences" if transformers_major() >= 5 else "--tp 1 --pp 1 --sp 1"


def _splits_lora(options: ParallelOptions) -> bool:
    """Whether the adapters are split as the layers are."""
    split_otherwise = options.enable_sequence_parallelism or options.pp > 1 or options.sp > 1
    return transformers_major() >= 5 and not split_otherwise


def _pipeline_rules(options: ParallelOptions) -> list[Rule]:
    if options.pp == 1 or options.batch_size is None:
        return []
    size = options.microbatch_size
    rows = options.batch_size * options.accumulation_steps
    return [
        (
            rows % size > 0,
            f"--microbatch_size {size} does not divide the rows of one step, --batch_size "
            f"{options.batch_size} x --accumulation_steps {options.accumulation_steps} = {rows}",
        ),
        (
            rows // size < options.pp,
            f"--pp {options.pp} needs at least {options.pp} micro-batches per step, found {rows} "
            f"rows / --microbatch_size {size} = {rows // size}; raise --batch_size or "
            "--accumulation_steps, or lower --microbatch_size",
        ),
    ]


def _sequence_rules(options: ParallelOptions) -> list[Rule]:
    mode = options.sp_mode
    if not options.enable_sequence_parallelism:
        return [
            (
                options.sp > 1,
                f"--sp {options.sp} needs --enable_sequence_parallelism (and usually "
                "--sp_mode all_to_all)",
            )
        ]
    return [
        (
            mode not in SP_MODES,
            f"--sp_mode {mode}: unknown; choose one of {', '.join(SP_MODES)}",
        ),
        (
            mode == "ring_attn",
            "--sp_mode ring_attn: ColossalAI 0.5.0's ring attention keeps sequence and loss split "
            "in zigzag order and needs flash-attn on a GPU; this library does not offer it. Use "
            "--sp_mode all_to_all",
        ),
        (
            mode in ("split_gather", "ring") and options.tp == 1,
            f"--sp_mode {mode} splits the sequence over the tensor-parallel processes: set --tp 2 "
            "or more",
        ),
        (
            mode == "all_to_all" and options.sp == 1,
            "--sp_mode all_to_all needs --sp 2 or more",
        ),
        (
            options.pp > 1,
            "--enable_sequence_parallelism cannot be combined with --pp; use --tp and "
            "--sp, or --pp alone",
        ),
    ]


def check_heads(config: Any, options: ParallelOptions) -> None:
    """Raise ValueError when attention heads cannot be divided over ``--tp``, or over ``--tp`` x
    ``--sp`` of all_to_all (ColossalAI 0.5.0, shardformer/policies/llama.py:102)."""
    flag = f"--tp {options.tp}"
    ways = options.tp
    if options.sp_mode == "all_to_all" and options.sp > 1:
        flag, ways = (
            f"{flag} x --sp {options.sp}" if ways > 1 else f"--sp {options.sp}",
            ways * options.sp,
        )
    config = text_config(config)
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
                f"values: {', '.join(map(str, divisors))}, or --plugin zero2 without it"
            )
