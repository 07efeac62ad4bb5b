"""Training on packs is training on their rows: losses and gradient norms of every plugin, and what
is refused."""

from types import SimpleNamespace

import pytest
from torch.testing import assert_close

from coati.parallel.families import check_family
from coati.parallel.plugin_checks import check_options
from coati.parallel.plugins import ParallelOptions
from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run

GEMINI = {"precision": "bf16"}
PLUGINS = {
    "ddp": (2, {"plugin": "ddp"}),
    "zero2": (2, {"plugin": "zero2", "accumulation_steps": 2}),
    "zero2_cpu": (2, {"plugin": "zero2_cpu"}),
    "gemini": (2, {"plugin": "gemini", "accumulation_steps": 2, **GEMINI}),
    "gemini_auto": (2, {"plugin": "gemini_auto", **GEMINI}),
    "gemini_tp": (2, {"plugin": "gemini", "tp": 2, **GEMINI}),
    "3d_dp": (2, {"plugin": "3d", "accumulation_steps": 2}),
    "3d_tp": (2, {"plugin": "3d", "tp": 2}),
    "3d_pp": (2, {"plugin": "3d", "pp": 2}),
    "3d_zero1": (2, {"plugin": "3d", "zero_stage": 1, **GEMINI}),
}
FAST = ("zero2", "3d_tp")


def marked(name: str):
    return name if name in FAST else pytest.param(name, marks=pytest.mark.matrix)


@pytest.mark.parametrize("name", [marked(name) for name in PLUGINS])
def test_steps_on_packs_are_those_on_rows(name):
    """Three steps, so that every update counts; in bf16 the two differ by its rounding."""
    nproc, options = PLUGINS[name]
    ways = run(nproc, "tests.parallel.packing_cases:train_all_ways", "llama", options, timeout=200)[
        0
    ]
    exact = options.get("precision", "fp32") == "fp32"
    for way in ("packed", "packed, masked"):
        assert_close(
            ways[way],
            ways["one_by_one"],
            rtol=1e-5 if exact else 2e-2,
            atol=0.0,
            msg=f"{name}: {way}",
        )
    weighted = ways["weighted one by one"]
    assert weighted != ways["one_by_one"]
    assert_close(ways["weighted"], weighted, rtol=1e-5 if exact else 2e-2, atol=0.0, msg=name)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["tp", "pp"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral", "gptj", "opt", "falcon"])
def test_families_that_can_be_split(family, layout):
    options = {"plugin": "3d", layout: 2}
    if transformers_major() >= 5:
        if family in ("opt", "falcon"):  # whose masks are of the padding
            said = run(2, "tests.parallel.packing_cases:refusal", family, options)[0]
            assert said.startswith(f"--packing: this {family} model")
            return
    else:
        config = SimpleNamespace(model_type=family)
        try:
            check_family(config, ParallelOptions(packing=True, **options))
        except ValueError as error:
            assert (
                layout == "pp"
                and family in ("mixtral", "opt", "falcon")
                and "see each other" in str(error)
            )
            return
    ways = run(2, "tests.parallel.packing_cases:train_all_ways", family, options, timeout=200)[0]
    assert_close(ways["packed"], ways["one_by_one"], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "plugin, options, refused, instead",
    [
        (
            "3d",
            {"enable_sequence_parallelism": True, "tp": 2},
            "--packing cannot be combined with",
            "use --tp or --pp",
        ),
        (
            "3d",
            {"enable_sequence_parallelism": True, "sp": 2, "sp_mode": "all_to_all"},
            "--packing cannot be combined with --enable_seq",
            "drop --packing",
        ),
        ("3d", {"use_flash_attn": True}, "--packing with --use_flash_attn", "--plugin zero2"),
        (
            "gemini",
            {"use_flash_attn": True},
            "--packing with --use_flash_attn",
            "drop --use_flash_attn",
        ),
    ],
)
def test_what_cannot_pack_is_refused_with_what_can(plugin, options, refused, instead):
    with pytest.raises(ValueError) as error:
        check_options(plugin, precision="bf16", packing=True, **options)
    assert refused in str(error.value) and instead in str(error.value)
    check_options(plugin, precision="bf16", **options)


if transformers_major() < 5:  # ColossalAI's policies

    @pytest.mark.parametrize("family", ["opt", "falcon"])
    def test_gemini_with_tp_has_no_positions_for_these(family):
        options = {"plugin": "gemini", "tp": 2, "precision": "bf16"}
        said = "--packing with --plugin gemini --tp is not possible with " + family
        with pytest.raises(ValueError, match=said):
            check_family(
                SimpleNamespace(model_type=family), ParallelOptions(packing=True, **options)
            )
        check_family(SimpleNamespace(model_type=family), ParallelOptions(**options))


def test_a_model_that_mixes_the_rows_of_a_pack_is_refused_by_name():
    said = run(1, "tests.parallel.packing_cases:refusal", "bloom")[0]
    assert said.startswith("--packing: this bloom model") and "drop --packing" in said
