"""What the recipes on fixed data share: SFT, reward model, DPO, ORPO, KTO and ILQL."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coati.cli.settings import SLSettings
from coati.dataset.load.epoch_order import EpochOrder
from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
from coati.dataset.load.packing import PackCollator
from coati.dataset.stream.row_stream import RowStream
from coati.dataset.stream.stream_loader import StreamLoader
from coati.parallel.agreement import agree
from coati.parallel.checkpoint import RunningState
from coati.parallel.engine import Engine
from coati.recipes import build, data, dry_run, eval_samples, finish, streaming
from coati.recipes.build import Trained
from coati.recipes.data_checks import check_positions
from coati.recipes.resume import running_state
from coati.recipes.run import PreparedRows, Run
from coati.recipes.same_run import SAME_ROWS, rows_facts
from coati.recipes.streaming import EndlessOrder
from coati.trainer import SLTrainer
from coati.utils.phases import phase


@dataclass(frozen=True)
class TrainingData:
    """The rows of a run, and where in them it starts. ``stream``: what gives them with
    ``--streaming``; ``train`` are then the first of them."""

    train: PreparedRows
    evaluation: PreparedRows | None
    order: EpochOrder | EndlessOrder
    state: RunningState
    stream: RowStream | None = None


@phase("reading the rows")
def load_data(run: Run[SLSettings], type: str) -> TrainingData:
    """The rows of ``type``, the same on every rank. Raises ValueError for what is wrong with them,
    RanksDiffer for ranks that read others, before a model is loaded."""
    return agree(_facts, lambda: _load_data(run, type), remedy=SAME_ROWS)


def _facts(rows: TrainingData) -> dict[str, Any]:
    evaluation = rows.evaluation and rows.evaluation.rows
    facts = rows_facts(**{"--dataset": rows.train.rows, "--eval_dataset": evaluation})
    facts |= streaming.commits(rows.stream) if rows.stream is not None else {}
    return facts | {"rows in the order of training": rows.order.count(0), "step": rows.state.step}


def _load_data(run: Run[SLSettings], type: str) -> TrainingData:
    if run.settings.data.stream.streaming:
        evaluation = data.evaluation_rows(run, type)
        check_positions(run, evaluation, "eval_dataset", kl_rows=type == "kto")
        stream, train, endless, state = streaming.open_stream(run, type)
        return TrainingData(train, evaluation, endless, state, stream)
    train, evaluation = data.training_and_evaluation_rows(run, type)
    check_positions(run, train, kl_rows=type == "kto")
    check_positions(run, evaluation, "eval_dataset", kl_rows=type == "kto")
    state = running_state(run.resume, run.settings, train.rows)
    # Documents are often read once: what does not fill the last step is not left out of them.
    order = data.epoch_order(run, train, data.rows_of_a_step(run) if type == "text" else 1)
    data.check_order(run, order)
    return TrainingData(train, evaluation, order, state)


def boosted(run: Run[SLSettings], rows: TrainingData, model: Any) -> Trained:
    """``model`` boosted, restored from the checkpoint where there is one."""
    assets = build.assets(run, model)  # before boosting
    return Trained(build.sl_engine(run, model, rows.order), assets)


def trainer_keywords(
    run: Run[SLSettings], rows: TrainingData, model: Trained, samples: bool = True
) -> dict[str, Any]:
    """What every trainer takes. ``samples``: whether the model can write sample responses."""
    batches = run.settings.batches
    keywords = {
        "engine": model.engine,
        "max_epochs": streaming.epochs(run.settings),
        "accumulation_steps": batches.accumulation_steps,
        "schedule": run.settings.schedule,
        "state": rows.state,
        "assets": model.assets,
        "settings": run.flags,
        "callbacks": run.extras.callbacks,
    }
    sampler = eval_samples.sampler_of(run, rows.evaluation) if samples else None
    return keywords | ({"samples": sampler} if samples else {})


def fit(
    run: Run[SLSettings],
    trainer: SLTrainer,
    rows: TrainingData,
    collate: Any,
    *,
    partners: bool = False,
    load: Callable[..., Any] | None = None,
    use: str = finish.CHAT,
) -> bool:
    """Train and save the final model, or only try to (``--dry_run``); True after training.

    ``partners``: rows come with the response of another row, for KTO. ``load`` reads the trained
    model, by default a language model; ``use``: what it can be used for.
    """
    train, evaluation = _loaders(run, trainer.engine, rows, collate, partners)
    finish.rehearse(run, {"modeling": (trainer.engine, trainer.assets)})
    if run.settings.output.dry_run:
        dry_run.dry_run(run, trainer, train, load)
        if rows.stream is not None:
            rows.stream.close()
        return False
    output = run.settings.output
    try:
        trainer.fit(train, evaluation, **output.trackers)
    except BaseException:
        if rows.stream is not None:
            rows.stream.close()
        raise
    if rows.stream is not None:
        rows.stream.finish()
    finish.save_final(run, trainer, use)
    return True


def _loaders(
    run: Run[SLSettings], engine: Engine, rows: TrainingData, collate: Any, partners: bool
) -> tuple[Any, Any]:
    """The global batches and evaluation batches of this rank; evaluation rows are never packed."""
    batches = run.settings.batches
    share = build.dp_share(engine)
    packed = PackCollator(collate) if rows.order.pack_length is not None else collate
    steps: dict[str, Any] = {
        "batch_size": batches.batch_size,
        "accumulation_steps": batches.accumulation_steps,
        "partners": partners,
        **share,
    }
    train: GlobalBatchLoader | StreamLoader
    if rows.stream is not None:
        train = StreamLoader(rows.stream, packed, **steps)
    else:
        assert isinstance(rows.order, EpochOrder)
        train = GlobalBatchLoader(rows.train.rows, packed, epoch_order=rows.order, **steps)
    if rows.evaluation is None:
        return train, None
    evaluation = EvaluationLoader(
        rows.evaluation.rows, collate, batch_size=batches.evaluation, partners=partners, **share
    )
    return train, evaluation
