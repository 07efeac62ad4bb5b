"""What transformers reports of the weights that it loaded: missing, without a use, of other
shapes."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coati.models.directory_files import check_layers
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import text_config

logger = get_logger(__name__)


def check_report(
    path: str | os.PathLike,
    model: Any,
    report: dict[str, Any],
    heads: tuple[str, ...],
    strict: bool,
) -> None:
    """Raise ValueError for weights that are missing or belong to layers that are not there; others
    without a use are told, or refused where ``strict``."""
    if unexpected := sorted(
        key for key in report["unexpected_keys"] if not key.startswith(heads or "\0")
    ):
        check_layers(path, unexpected, _layers(model.config))
        told = (
            f"{path}: {type(model).__name__} has no use for {len(unexpected)} weights "
            f"({', '.join(unexpected[:3])})"
        )
        if strict:
            raise ValueError(
                f"{told}; is this a model of another kind, a reward model or critic perhaps? A "
                "reward model is used as it is: coati score MODEL, coati ppo --rm_pretrain MODEL, "
                "or transformers' AutoModelForSequenceClassification; a language model is the "
                "directory of coati sft, dpo, grpo and their like, of ppo that of the actor"
            )
        logger.warning_once(told)
    if report["missing_keys"]:
        shown = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(
            f"{path}: {len(report['missing_keys'])} weights of {type(model).__name__} are not in "
            f"the files ({shown}); they would start at random. Is this a model of another kind, or "
            "an incomplete copy?"
        )


def _layers(config: Any) -> int | None:
    """Layers that a model's files may hold: those that predict further tokens stand behind the
    others, and are left out by transformers."""
    config = text_config(config)
    layers = getattr(config, "num_hidden_layers", None)
    further = getattr(config, "num_nextn_predict_layers", None)
    return layers + (further or 0) if isinstance(layers, int) else None


def mismatched(read: Any, config: Any, options: dict[str, Any]) -> tuple[str, Any] | None:
    """The model's class, and what loading reports of weights of other shapes, (name, shape in the
    file or None, shape of the model); None where shapes are not what ended it."""
    try:
        with without_report():
            model, report = read(options | {"ignore_mismatched_sizes": True})
    except Exception:  # the first error says it
        return None
    keys = report.get("mismatched_keys")
    if not keys:
        return None
    if isinstance(next(iter(keys)), str):
        # transformers 4 names them alone
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        keys = [(name, None, shapes.get(name)) for name in keys]
    return type(model).__name__, list(keys)


@contextmanager
def without_report() -> Iterator[None]:
    """Without transformers' own table of missing and unexpected weights: the caller says what of it
    matters, and a head that is loaded elsewhere is in it."""
    log = logging.getLogger("transformers.modeling_utils")

    def told_here(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(told_here)
    try:
        yield
    finally:
        log.removeFilter(told_here)
