"""How many positions a model has, by its configuration, and what follows for rows and responses.
Imports nothing heavy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.models.loading import base_below, check_directory, load_configuration
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import text_config

logger = get_logger(__name__)

# Families whose positions are rows of a table, learned or computed once: a longer row is an index
# error, on a GPU a device-side assert.
TABLES = frozenset(
    {
        "bert-generation",
        "biogpt",
        "codegen",
        "ctrl",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "mpt",  # ALiBi, but of max_seq_len biases
        "openai-gpt",
        "opt",  # its table has two rows more, by which it shifts every position
    }
)
# The old BLOOM's seq_length is what it was trained on; ALiBi goes on beyond.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNLIMITED = frozenset({"bloom"})
UNKNOWN_LENGTH = 2048  # tokens of prompt and response together, of a model that sets no limit


@dataclass(frozen=True)
class Positions:
    """``count`` positions of a model of ``family``. ``hard``: it cannot run beyond them; else
    (rotary embeddings) it runs, on distances that its base has not seen."""

    family: str
    count: int
    hard: bool


def positions_of(config: Any) -> Positions | None:
    """The positions of a model's configuration; None where nothing limits them (ALiBi, recurrent
    models). Sliding windows and chunks limit what is looked at, not positions.

    Scaled rotary embeddings reach as far as they were scaled; counted as vLLM does
    (``_get_and_verify_max_len``).
    """
    config = text_config(config)
    family = str(getattr(config, "model_type", ""))
    if family in UNLIMITED or getattr(config, "alibi", False) is True:
        return None
    counts = (getattr(config, name, None) for name in NAMES)
    count = next((count for count in counts if isinstance(count, int) and count > 0), None)
    if count is None:
        return None
    hard = family in TABLES
    return Positions(family, count if hard else _scaled(config, family, count), hard)


def _scaled(config: Any, family: str, count: int) -> int:
    """``count`` rotary positions after scaling."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(rope, dict) and any(isinstance(part, dict) for part in rope.values()):
        rope = rope.get("full_attention")  # by kind of layer
    if not isinstance(rope, dict) or not isinstance(rope.get("factor"), int | float):
        return count
    original = rope.get("original_max_position_embeddings")
    if isinstance(original, int):
        return max(count, int(rope["factor"] * original))
    # Gemma 3 writes the positions after scaling.
    kind = rope.get("rope_type", rope.get("type"))
    scales = kind in ("linear", "dynamic", "yarn") and not family.startswith("gemma3")
    return int(rope["factor"] * count) if scales else count


def positions_in(path: str | os.PathLike, trust_remote_code: bool = False) -> Positions | None:
    """The positions of the model of ``path``, of an adapter's base. Raises ValueError as
    :func:`~coati.models.loading.load_configuration`."""
    path = base_below(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        check_directory(path, "model")  # says what is there instead
    return positions_of(load_configuration(path, trust_remote_code))


def check_tokens(positions: Positions | None, tokens: int, what: str, remedy: str) -> None:
    """Whether a model can be trained on ``what``, a sequence of ``tokens`` tokens.

    Raises ValueError, with the ``remedy``, beyond the end of a table; warns beyond what rotary
    embeddings were trained on.
    """
    if positions is None or tokens <= positions.count:
        return
    if positions.hard:
        raise ValueError(
            f"{what} has {tokens} tokens, this {positions.family} model has {positions.count} "
            f"positions; {remedy}"
        )
    logger.warning_once(
        f"warning: {what} has {tokens} tokens, this {positions.family} model {positions.count} "
        f"positions: it will be trained beyond what its base has seen; {remedy} to stay within"
    )


def within_positions(config: Any, asked: int | None, hard_only: bool = False) -> int:
    """``asked`` tokens (None: all), at most as many as the model of ``config`` has positions; with
    ``hard_only`` rotary embeddings limit nothing."""
    positions = positions_of(config)
    if asked is None:
        return UNKNOWN_LENGTH if positions is None else positions.count
    if positions is None or (hard_only and not positions.hard):
        return asked
    return min(asked, positions.count)
