"""What differs between a run and the checkpoint that it goes on from: every flag is either applied,
and said, or refused by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coati.cli.checks import named_template
from coati.cli.resume_flags import FILES, LOSS_MEASURE, MEASURE, REWARDS, Change, changes, refusal
from coati.parallel.checkpoint import RunningState
from coati.utils.distributed import broadcast_object, is_rank_0
from coati.utils.json_io import load_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

WHOLE = 2**26  # bytes of a file that is read for its digest; of larger ones only the size counts
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Of a config.json: what says by whom and where it was written.
UNIMPORTANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def as_json(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` as a checkpoint holds them."""
    return json.loads(json.dumps(dict(flags)))


def digests(flags: Mapping[str, Any]) -> dict[str, str]:
    """What is in the files and directories that ``flags`` name, by flag; of those that are there.
    Every rank must call it."""
    return broadcast_object(_digests(flags) if is_rank_0() else None)


def _digests(flags: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in FILES:
        given = flags.get(name)
        if name == "conversation_template_config":
            given = named_template(given)
        elif name == "tokenizer_dir":
            given = given or flags.get("pretrain")
        paths = [Path(path) for path in (given if isinstance(given, list) else [given]) if path]
        if paths and all(path.exists() for path in paths):
            found[name] = _hash(part for path in paths for part in _contents(path, name))
    return found


def _contents(path: Path, flag: str) -> Iterable[str]:
    """What counts of ``path``, as text."""
    if path.is_file():
        yield _content(path)
    elif flag == "tokenizer_dir":
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
            if (path / name).is_file():
                yield f"{name} {_content(path / name)}"
    elif (path / "config.json").is_file():
        config = load_json(path / "config.json")
        kept = {name: value for name, value in config.items() if name not in UNIMPORTANT}
        yield json.dumps(kept, sort_keys=True)
        # Loading says what is wrong with others, as links that lead nowhere.
        weights = [file for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file()]
        yield from sorted(f"{file.name} {file.stat().st_size}" for file in weights)
    else:
        rows = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".json"]
        yield from sorted(f"{file.relative_to(path)} {file.stat().st_size}" for file in rows)


def _content(file: Path) -> str:
    size = file.stat().st_size
    return str(size) if size > WHOLE else hashlib.sha256(file.read_bytes()).hexdigest()


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def flags_of_run(folder: Path) -> dict[str, Any]:
    """``arguments.json`` beside the checkpoint ``folder``, for those that do not hold their
    flags."""
    file = folder.parent / "arguments.json"
    return load_json(file) if file.is_file() else {}


def apply_changes(
    folder: Path, state: RunningState, flags: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """Compare ``flags`` with those that ``state`` was saved with, say what takes effect, and make
    ``state`` one of a run with ``flags``. Every rank must call it.

    Raises ValueError naming the first flag that must be the same.
    """
    before = state.flags or broadcast_object(flags_of_run(folder) if is_rank_0() else None)
    found = list(changes(before, as_json(flags), state.inputs, inputs))
    if refused := next(filter(None, map(refusal, found)), None):
        raise ValueError(f"--checkpoint_path {folder}: {refused}")
    if found:
        what = ", ".join(map(str, found))
        logger.info(f"flags that differ from {folder}: {what}, from step {state.step + 1} on")
    _let_go(state, found, MEASURE if "num_episodes" in flags else (*MEASURE, *LOSS_MEASURE))


def _let_go(state: RunningState, found: list[Change], measure: tuple[str, ...]) -> None:
    """Drop what ``state`` carries of the former values of flags; those of ``measure`` decide what
    evaluations say."""
    changed = {change.flag: change for change in found}
    if not changed.keys().isdisjoint(measure):
        best = state.trainer.pop("best", None)
        watched = state.trainer.pop("early_stopping", {})
        if best or watched.get("best") is not None:
            logger.info("evaluations are measured otherwise now: the best one so far starts anew")
    maker = state.trainer.get("maker", {})
    scores = maker.get("normalization")
    if scores and scores["count"] and not changed.keys().isdisjoint(REWARDS):
        maker["normalization"] = dict.fromkeys(scores, 0.0)
        logger.info("rewards are others now: their running mean and deviation start anew")
    if "kl_coef" in changed and maker:
        maker["kl"]["kl_coef"] = changed["kl_coef"].now
