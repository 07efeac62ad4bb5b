"""The strategy classes of the first generation, as what they became: a plugin's name and its
keywords.

``ColossalAIStrategy(stage=2, placement_policy="cpu")`` no longer runs anything: it knows that it is
plugin
``zero2_cpu`` and with which flags and ``--plugin_args`` a script takes the same settings.
"""

from typing import Any

from coati.utils.logging import get_logger

logger = get_logger(__name__)

# Old keyword -> keyword of the ColossalAI plugin of today.
SCALER = {
    "initial_scale": "initial_scale",
    "growth_factor": "growth_factor",
    "backoff_factor": "backoff_factor",
    "growth_interval": "growth_interval",
    "hysteresis": "hysteresis",
    "min_scale": "min_scale",
    "max_scale": "max_scale",
    "norm_type": "norm_type",
}
GEMINI = SCALER | {
    "pin_memory": "pin_memory",
    "force_outputs_fp32": "force_outputs_fp32",
    "search_range_mb": "search_range_m",
    "hidden_dim": "hidden_dim",
    "min_chunk_size_mb": "min_chunk_size_m",
    "gpu_margin_mem_ratio": "gpu_margin_mem_ratio",
}
ZERO = SCALER | {
    "reduce_bucket_size": "reduce_bucket_size_in_m",
    "overlap_communication": "overlap_communication",
}
# Old keyword -> flag of the training scripts.
FLAGS = {"seed": "--seed", "precision": "--mixed_precision", "max_norm": "--grad_clip"}
DROPPED = {"shard_init": "Gemini shards the weights when it wraps the model"}


class Strategy:
    """What an old strategy became.

    Attributes:
        plugin: the name for ``--plugin``.
        plugin_args: keywords for ``--plugin_args`` (a JSON file).
        flags: further words for the command line.
    """

    plugin = "ddp"
    keywords: dict[str, str] = {}
    placements: dict[str, tuple[str, dict[str, Any], list[str]]] = {}

    def __init__(self, placement_policy: str | None = None, **old: Any):
        self.plugin_args: dict[str, Any] = {}
        self.flags: list[str] = []
        if placement_policy is not None:
            self._place(placement_policy)
        for name, value in old.items():
            self._take(name, value)
        logger.warning_once(f"{type(self).__name__} is now {self}")

    def _place(self, policy: str) -> None:
        if policy not in self.placements:
            expected = ", ".join(self.placements) or "none"
            raise ValueError(
                f"{type(self).__name__}: placement_policy {policy!r}; expected one of: {expected}"
            )
        self.plugin, extra, flags = self.placements[policy]
        self.plugin_args |= extra
        self.flags += flags

    def _take(self, name: str, value: Any) -> None:
        if name in FLAGS:
            self.flags += [FLAGS[name], str(value)]
        elif name in DROPPED:
            logger.warning_once(
                f"{type(self).__name__}({name}={value!r}) has no effect: {DROPPED[name]}"
            )
        elif name in self.keywords:
            # The bucket was given in elements and is now given in units of 2**20 of them.
            value = max(1, value // 2**20) if name == "reduce_bucket_size" else value
            self.plugin_args[self.keywords[name]] = value
        else:
            known = ", ".join(sorted({*self.keywords, *FLAGS, *DROPPED}))
            raise TypeError(f"{type(self).__name__} has no keyword {name!r}; it knows {known}")

    def __str__(self) -> str:
        words = [f"--plugin {self.plugin}", *self.flags]
        return " ".join(words) + (
            f" with --plugin_args {self.plugin_args}" if self.plugin_args else ""
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask before the attributes are there
            raise AttributeError(name)
        raise AttributeError(
            f"{type(self).__name__} only names what it became ({self}) and has no {name!r}; "
            "train with coati.trainer.SFTTrainer or examples/training_scripts/train_sft.py"
        )


class NaiveStrategy(Strategy):
    """One process, nothing sharded: plugin ddp."""


class DDPStrategy(Strategy):
    """Every process holds the whole model: plugin ddp."""


class LowLevelZeroStrategy(Strategy):
    """ZeRO stage 2 (plugin zero2, with ``placement_policy="cpu"`` zero2_cpu) or 1 (plugin 3d,
    ``--zero_stage 1``)."""

    plugin = "zero2"
    keywords = ZERO
    placements = {"cuda": ("zero2", {}, []), "cpu": ("zero2_cpu", {}, [])}
    stage_1 = {
        "cuda": ("3d", {}, ["--zero_stage", "1"]),
        "cpu": ("3d", {}, ["--zero_stage", "1", "--zero_cpu_offload"]),
    }

    def __init__(
        self, stage: int = 2, precision: str = "fp16", placement_policy: str = "cuda", **old: Any
    ):
        if stage not in (1, 2):
            raise ValueError(
                f"LowLevelZeroStrategy: stage {stage}; expected 1 or 2 (stage 3 is GeminiStrategy)"
            )
        if stage == 1:
            self.placements = self.stage_1
        super().__init__(placement_policy, precision=precision, **old)


class GeminiStrategy(Strategy):
    """ZeRO stage 3 in chunks: plugin gemini, with ``placement_policy="auto"`` gemini_auto."""

    plugin = "gemini"
    keywords = GEMINI
    placements = {
        "cuda": ("gemini", {}, []),
        "static": ("gemini", {}, []),
        "cpu": ("gemini", {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}, []),
        "auto": ("gemini_auto", {}, []),
    }

    def __init__(self, placement_policy: str = "cuda", precision: str = "fp16", **old: Any):
        if precision == "fp32":
            raise ValueError("stage 3 has no fp32: use precision 'bf16' or 'fp16', or stage 2")
        super().__init__(placement_policy, precision=precision, **old)


class ColossalAIStrategy(Strategy):
    """Stage 3 is :class:`GeminiStrategy`, stages 1 and 2 are :class:`LowLevelZeroStrategy`."""

    def __new__(cls, stage: int = 3, **old: Any) -> Any:
        return GeminiStrategy(**old) if stage == 3 else LowLevelZeroStrategy(stage=stage, **old)
