"""The reference model of a run: the policy without its adapters, a frozen copy, or log-probs stored
beside the data."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coati.cli.settings import DPOSettings
from coati.dataset.data_types import TOKEN_COLUMNS
from coati.dataset.load.loader import EvaluationLoader
from coati.models.added_tokens import grow_embeddings
from coati.models.loading import load_causal_lm
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.recipes import build
from coati.recipes.run import PreparedRows, Run
from coati.trainer.dpo import DPOTrainer
from coati.trainer.precompute_reference import reference_of_rows, with_columns
from coati.utils.distributed import all_gather_object, barrier, is_rank_0
from coati.utils.file_samples import sampled_blocks
from coati.utils.logging import get_logger
from coati.utils.user_cache import cache_root, hold

logger = get_logger(__name__)


def reference(
    run: Run, policy: Engine, ref_tp: int | None = None, offload: bool = False
) -> InferenceModel:
    """The reference of ``--pretrain``: the policy's own base under LoRA, else a frozen copy under
    the same plugin, split over ``ref_tp`` processes instead of ``--tp``, with ``offload`` in host
    memory while idle.

    Raises ValueError for a copy of another vocabulary than the policy's.
    """
    if run.options.lora:
        biases = build.lora_config(run.settings.lora).lora_train_bias != "none"
        whole = getattr(policy.module.get_base_model(), "trained_whole", ())
        if not biases and not whole:
            return InferenceModel(policy, adapters_off=True)
        what = ", ".join(whole) if whole else "biases"
        logger.info(
            f"LoRA trains {what} of the base model too, so the reference is a copy of it, not the "
            "base itself."
        )
    options = replace(run.options, tp=ref_tp) if ref_tp else run.options
    return build.frozen(options, lambda: _copy(run, policy.module.config.vocab_size), offload)


def _copy(run: Run, vocab_size: int) -> Any:
    """The model of ``--pretrain``. Raises ValueError where its vocabulary is not ``vocab_size``."""
    pretrain = run.settings.model.pretrain
    model = load_causal_lm(pretrain, **build.loading(run) | {"dtype": "auto"})
    grow_embeddings(model, run.tokenizer, run.added_tokens)
    found = model.config.vocab_size
    if found != vocab_size:
        raise ValueError(
            f"--pretrain {pretrain}: the reference has a vocabulary of {found}, the policy of "
            f"{vocab_size}; log-probs of two vocabularies cannot be compared. Name the model that "
            "the policy was trained from"
        )
    return model


def precomputed(
    run: Run[DPOSettings], trainer: DPOTrainer, collate: Any, rows: PreparedRows
) -> PreparedRows:
    """``rows`` with the reference's log-probs as columns: read from beside the data, or computed
    now and stored there.

    Without a stored file the policy itself computes them where it still is the reference; else a
    copy is loaded, once.
    """
    about = _about(run, trainer, rows.rows)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = _folder(rows)
    file = folder / f"{key}.npy"
    if folder.is_relative_to(cache_root()):
        hold(file)
        hold(file.with_suffix(".json"))
    if all(all_gather_object(file.exists())):
        values = _read(file, len(rows))
        logger.info(
            f"reference log-probs of {len(rows)} pairs read from {file}; no reference model is "
            "loaded"
        )
        return replace(rows, rows=with_columns(rows.rows, values))
    _log_differences(folder, about)
    if run.resume.weights is None:
        source = InferenceModel(trainer.engine, adapters_off=run.options.lora)
    else:
        source = reference(run, trainer.engine, run.settings.reference.ref_tp)
    batches = EvaluationLoader(
        rows.rows,
        collate,
        batch_size=run.settings.batches.evaluation,
        **build.dp_share(trainer.engine),
    )
    values = reference_of_rows(trainer.objective, source, batches)
    if is_rank_0():
        _store(file, values, about)
    barrier()
    logger.info(f"reference log-probs of {len(rows)} pairs stored in {file}")
    return replace(rows, rows=with_columns(rows.rows, values))


def _about(run: Run[DPOSettings], trainer: DPOTrainer, rows: Any) -> dict[str, Any]:
    """What the stored numbers depend on."""
    return {
        "rows": rows_fingerprint(rows),
        "model": model_fingerprint(run.settings.model.pretrain),
        "precision": run.options.precision,
        "averaged": False,  # sums; older releases stored averages for losses of averages
        "ld_alpha": trainer.objective.row_logps.ld_alpha,
        "disable_loss_mask": run.settings.data.disable_loss_mask,
        # Only where there are any, so that what earlier releases stored is found again.
        **({"add_tokens": list(run.added_tokens)} if run.added_tokens else {}),
    }


def rows_fingerprint(rows: Any) -> str:
    """Of every token and mask of ``rows``."""
    names = [
        name for name in rows.column_names if name in TOKEN_COLUMNS or name.endswith("_loss_mask")
    ]
    digest = hashlib.sha256()
    tables = rows.select_columns(names).with_format("arrow")
    for start in range(0, len(rows), 1000):
        part = tables[start : start + 1000]
        for name in names:
            column = part.column(name).combine_chunks()
            lengths = np.ascontiguousarray(column.value_lengths().to_numpy(zero_copy_only=False))
            digest.update(lengths.tobytes())
            digest.update(
                np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False)).tobytes()
            )
    return digest.hexdigest()[:16]


def model_fingerprint(path: str) -> str:
    """Of a model directory: its configuration, and size and samples of the bytes of its weights; of
    a hub name: it."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(
        f
        for f in folder.iterdir()
        if (f.suffix in (".safetensors", ".bin") or f.name == "config.json") and f.is_file()
    ):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        for block in sampled_blocks(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def _folder(rows: PreparedRows) -> Path:
    """``reference`` beside the prepared parts; a user's cache where that cannot be written."""
    beside = rows.beside("reference")
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    instead = cache_root() / "reference"
    logger.info(f"{beside.parent} cannot be written: reference log-probs are kept in {instead}")
    return instead


def _read(file: Path, rows: int) -> np.ndarray:
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{file}: not readable as stored log-probs ({error}); remove it, it is made anew"
        ) from error
    if values.shape != (rows, 2) or not np.isfinite(values).all():
        raise ValueError(
            f"{file}: holds log-probs of shape {values.shape}, the data have {rows} pairs; it no "
            "longer fits them. Remove it, it is made anew"
        )
    return values


def _store(file: Path, values: np.ndarray, about: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    with open(partial, "wb") as stream:
        np.save(stream, values, allow_pickle=False)
    file.with_suffix(".json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    os.replace(partial, file)


def _log_differences(folder: Path, about: dict[str, Any]) -> None:
    """Why the log-probs stored in ``folder`` are not those of this run."""
    for other in sorted(folder.glob("*.json")):
        stored = json.loads(other.read_text(encoding="utf-8"))
        if differing := [name for name, value in about.items() if stored.get(name) != value]:
            logger.info(
                f"{other.with_suffix('.npy')} does not fit: other {', '.join(differing)}. "
                "Log-probs are computed anew"
            )
