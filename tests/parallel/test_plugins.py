"""What each plugin is built with, and that what its "cannot" column says is refused with something
else to do."""

import pytest

from coati.parallel.plugin_checks import check_options, resolve_options
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.utils.transformers_compat import transformers_major

FLAGS = {"precision": "bf16"}
LORA_WITH = "--pp 1 and whole sequences" if transformers_major() >= 5 else "--tp 1 --pp 1 --sp 1"

# (plugin, options, what is refused, what to use instead)
REFUSED = [
    ("gemini", {"lora": True}, "--plugin gemini cannot train LoRA adapters", "--plugin zero2"),
    (
        "gemini",
        {"precision": "fp32"},
        "--plugin gemini has no fp32",
        "--mixed_precision fp16 or bf16",
    ),
    (
        "gemini_auto",
        {"lora": True},
        "--plugin gemini_auto cannot train LoRA adapters",
        "--plugin zero2",
    ),
    ("gemini_auto", {"precision": "fp32"}, "--plugin gemini_auto has no fp32", "--plugin zero2"),
    ("gemini_auto", {"accumulation_steps": 2}, "cannot accumulate gradients", "--plugin gemini"),
    ("zero2", {"pp": 2}, "--pp 2 needs --plugin 3d", "3d"),
    ("zero2_cpu", {"pp": 2}, "--pp 2 needs --plugin 3d", "3d"),
    ("ddp", {"sp": 2}, "--sp 2 needs --plugin 3d", "3d"),
    (
        "ddp",
        {"enable_sequence_parallelism": True},
        "--enable_sequence_parallelism needs --plugin 3d",
        "3d",
    ),
    ("gemini", {"pp": 2}, "--pp 2 needs --plugin 3d", "3d"),
    ("ddp", {"zero_stage": 3}, "--zero_stage 3 belongs to --plugin 3d", "fixes its own stage"),
    ("zero2", {"zero_stage": 1}, "--zero_stage 1 belongs to --plugin 3d", "fixes its own stage"),
    *(
        (
            "3d",
            {flag: 2, "lora": True},
            f"--plugin 3d trains LoRA adapters only with {LORA_WITH}",
            "--plugin zero2",
        )
        for flag in (("pp",) if transformers_major() >= 5 else ("tp", "pp"))
    ),
    (
        "3d",
        {
            "tp": 2,
            "lora": True,
            "enable_sequence_parallelism": True,
            "sp_mode": "split_gather",
        },
        f"--plugin 3d trains LoRA adapters only with {LORA_WITH}",
        "--plugin zero2",
    ),
    (
        "3d",
        {"zero_stage": 1, "precision": "fp32"},
        "--zero_stage 1 of --plugin 3d has no fp32",
        "bf16",
    ),
    (
        "3d",
        {"zero_stage": 2, "pp": 2},
        "--zero_stage 2 cannot be combined with --pp",
        "--zero_stage 1",
    ),
    (
        "3d",
        {"zero_cpu_offload": True},
        "--zero_cpu_offload moves ZeRO's optimizer states",
        "--plugin zero2_cpu",
    ),
    (
        "gemini",
        {"zero_cpu_offload": True},
        "--plugin gemini does not take it",
        "--plugin gemini_auto",
    ),
    (
        "gemini_auto",
        {"zero_cpu_offload": True},
        "--plugin gemini_auto does not take it",
        "--plugin zero2_cpu",
    ),
    (
        "ddp",
        {"zero_cpu_offload": True},
        "--zero_cpu_offload belongs to --plugin 3d",
        "--plugin zero2_cpu",
    ),
    (
        "3d",
        {"pp": 2, "batch_size": 3, "microbatch_size": 2},
        "--microbatch_size 2 does not divide",
        "= 3",
    ),
    (
        "3d",
        {"pp": 4, "batch_size": 2},
        "--pp 4 needs at least 4 micro-batches",
        "raise --batch_size",
    ),
    ("3d", {"sp": 2}, "--sp 2 needs --enable_sequence_parallelism", "all_to_all"),
    (
        "3d",
        {"enable_sequence_parallelism": True},
        "--sp_mode split_gather splits the sequence over",
        "--tp 2",
    ),
    (
        "3d",
        {"enable_sequence_parallelism": True, "tp": 2, "pp": 2},
        "cannot be combined with --pp",
        "--pp alone",
    ),
    (
        "3d",
        {"enable_sequence_parallelism": True, "sp_mode": "all_to_all"},
        "all_to_all needs --sp 2",
        "--sp 2",
    ),
    (
        "3d",
        {"enable_sequence_parallelism": True, "sp": 2, "sp_mode": "ring_attn"},
        "ring_attn",
        "--sp_mode all_to_all",
    ),
    ("zero3", {}, "--plugin zero3: unknown", "ddp, zero2"),
]


@pytest.mark.parametrize("plugin, options, refused, instead", REFUSED)
def test_what_cannot_work_is_refused_with_what_can(plugin, options, refused, instead):
    with pytest.raises(ValueError) as error:
        check_options(plugin, **{**FLAGS, **options})
    assert refused in str(error.value) and instead in str(error.value)


def test_every_row_that_says_cannot_is_refused_somewhere():
    """ddp shards nothing, which is no option that could be asked for."""
    assert {name for name, row in PLUGINS.items() if row.cannot} - {"ddp"} <= {
        plugin for plugin, *_ in REFUSED
    }


@pytest.mark.parametrize("name", PLUGINS)
def test_what_the_columns_say_passes(name):
    row = PLUGINS[name]
    for precision in row.precisions:
        check_options(name, world_size=2, precision=precision, lora=row.lora, batch_size=4)
    check_options(name, precision="bf16", accumulation_steps=8 if row.accumulation else 1)


@pytest.mark.parametrize("world_size, ok", [(4, True), (8, True), (6, False), (2, False)])
def test_processes_are_a_multiple_of_tp_pp_sp(world_size, ok):
    options = {"tp": 2, "pp": 2, "batch_size": 4, "precision": "fp32"}
    if ok:
        return check_options("3d", world_size=world_size, **options)
    with pytest.raises(
        ValueError,
        match=rf"{world_size} processes cannot be divided by --tp 2 x --pp 2 x --sp 1 = 4",
    ):
        check_options("3d", world_size=world_size, **options)


@pytest.mark.parametrize(
    "options, became, said",
    [
        (
            {"plugin": "3d", "zero_stage": 3, "tp": 2},
            {"plugin": "gemini", "zero_stage": 0, "tp": 2},
            "--zero_stage 3",
        ),
        (
            {"plugin": "zero2", "tp": 2},
            {"plugin": "3d", "tp": 2},
            "--plugin zero2 became --plugin 3d",
        ),
        (
            {"plugin": "zero2", "zero_cpu_offload": True},
            {"plugin": "zero2_cpu", "zero_cpu_offload": False},
            "--zero_cpu_offload with --plugin zero2 is what --plugin zero2_cpu does",
        ),
        (
            {
                "plugin": "3d",
                "enable_sequence_parallelism": True,
                "sp_mode": "ring",
                "tp": 2,
                "sp": 2,
            },
            {"plugin": "3d", "sp": 1},
            "--sp 2 became 1",
        ),
    ],
)
def test_what_stands_for_something_else_is_said(options, became, said):
    resolved, notes = resolve_options(ParallelOptions(**options))
    assert {name: getattr(resolved, name) for name in became} == became
    assert len(notes) == 1 and said in notes[0]


def test_plain_options_are_left_alone():
    for options in (
        ParallelOptions(),
        ParallelOptions(plugin="gemini", tp=2),
        ParallelOptions(plugin="3d", pp=2),
    ):
        assert resolve_options(options) == (options, [])


@pytest.mark.parametrize(
    "options, multiple",
    [
        ({"tp": 4}, 1),
        ({"tp": 4, "enable_sequence_parallelism": True}, 4),
        ({"sp": 2, "sp_mode": "all_to_all", "enable_sequence_parallelism": True}, 2),
    ],
)
def test_padded_lengths_fit_a_split_sequence(options, multiple):
    assert ParallelOptions(plugin="3d", **options).sequence_multiple == multiple


@pytest.mark.parametrize("clip, norm", [(0.5, 0.5), (0.0, 1e30)])
def test_no_clipping_is_a_limit_that_never_binds(clip, norm):
    assert ParallelOptions(grad_clip=clip).max_norm == norm
