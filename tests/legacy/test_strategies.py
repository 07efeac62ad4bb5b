import ast
import copy
import importlib.util
from pathlib import Path

import pytest

from coati.legacy.strategies import (
    GEMINI,
    ZERO,
    ColossalAIStrategy,
    DDPStrategy,
    GeminiStrategy,
    LowLevelZeroStrategy,
    NaiveStrategy,
)
from coati.utils.logging import forget_warnings


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    forget_warnings()


@pytest.mark.parametrize(
    "made, plugin, plugin_args, flags",
    [
        (lambda: NaiveStrategy(), "ddp", {}, []),
        (lambda: DDPStrategy(seed=3), "ddp", {}, ["--seed", "3"]),
        (
            lambda: LowLevelZeroStrategy(precision="bf16"),
            "zero2",
            {},
            ["--mixed_precision", "bf16"],
        ),
        (
            lambda: ColossalAIStrategy(stage=2, placement_policy="cpu"),
            "zero2_cpu",
            {},
            ["--mixed_precision", "fp16"],
        ),
        (
            lambda: ColossalAIStrategy(stage=1, reduce_bucket_size=12 * 1024**2, max_norm=1.0),
            "3d",
            {"reduce_bucket_size_in_m": 12},
            ["--zero_stage", "1", "--mixed_precision", "fp16", "--grad_clip", "1.0"],
        ),
        (
            lambda: ColossalAIStrategy(
                stage=3, search_range_mb=64, min_chunk_size_mb=16, shard_init=False
            ),
            "gemini",
            {"search_range_m": 64, "min_chunk_size_m": 16},
            ["--mixed_precision", "fp16"],
        ),
        (
            lambda: GeminiStrategy(placement_policy="auto"),
            "gemini_auto",
            {},
            ["--mixed_precision", "fp16"],
        ),
        (
            lambda: ColossalAIStrategy(placement_policy="cpu"),
            "gemini",
            {"offload_optim_frac": 1.0, "offload_param_frac": 1.0},
            ["--mixed_precision", "fp16"],
        ),
    ],
)
def test_an_old_strategy_knows_what_it_became(made, plugin, plugin_args, flags, capsys):
    strategy = made()
    assert (strategy.plugin, strategy.plugin_args, strategy.flags) == (plugin, plugin_args, flags)
    assert f"is now --plugin {plugin}" in capsys.readouterr().err
    assert copy.deepcopy(strategy).flags == flags


def plugin_keywords(name: str) -> set[str]:
    """The constructor's keywords of a ColossalAI plugin, read from its source: importing it takes
    ten seconds."""
    root = Path(importlib.util.find_spec("colossalai").submodule_search_locations[0])
    tree = ast.parse((root / "booster" / "plugin" / f"{name}.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    makers = [
        node for made in classes for node in made.body if getattr(node, "name", "") == "__init__"
    ]
    return {argument.arg for made in makers for argument in made.args.args}


def test_the_keywords_are_keywords_of_todays_plugins():
    offloading = {key for _, keys, _ in GeminiStrategy.placements.values() for key in keys}
    assert set(GEMINI.values()) | offloading <= plugin_keywords("gemini_plugin")
    assert set(ZERO.values()) <= plugin_keywords("low_level_zero_plugin")


@pytest.mark.parametrize(
    "made, error, said",
    [
        (lambda: ColossalAIStrategy(stage=3, precision="fp32"), ValueError, "no fp32"),
        (lambda: ColossalAIStrategy(stage=4), ValueError, "expected 1 or 2"),
        (
            lambda: LowLevelZeroStrategy(placement_policy="disk"),
            ValueError,
            "expected one of: cuda, cpu",
        ),
        (
            lambda: GeminiStrategy(overlap_communication=True),
            TypeError,
            "has no keyword 'overlap_communication'",
        ),
        (lambda: DDPStrategy().prepare, AttributeError, "SFTTrainer"),
    ],
)
def test_what_cannot_be_mapped_says_so(made, error, said):
    with pytest.raises(error, match=said):
        made()
