"""The training loop over a fixed data set, shared by the supervised and preference trainers."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from coati.models.generation.response_table import format_samples
from coati.parallel.checkpoint import RunningState, clean, save_checkpoint
from coati.parallel.engine import Batch, Engine, NonFiniteLoss, Step
from coati.parallel.objective import Objective
from coati.parallel.weights import ModelAssets
from coati.trainer.callbacks import Callback, CallbackList
from coati.trainer.global_batches import as_global_batches, total_steps
from coati.trainer.progress import ProgressBar
from coati.trainer.run_log import RunLog
from coati.trainer.schedule import RunSchedule
from coati.trainer.stop import GracefulStop
from coati.trainer.throughput import MFU, TOKENS, Throughput
from coati.utils.errors import RunFailed
from coati.utils.liveness import at_forced_end, note
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)


class SLTrainer:
    """Epochs of optimizer steps, with evaluation, logging, checkpoints and graceful shutdown.

    Args:
        engine: the boosted model.
        objective: the loss and what it needs.
        max_epochs: total epochs, those of a resumed run included.
        accumulation_steps: micro-batches per optimizer step, for a plain DataLoader.
        schedule: when to log, evaluate and save; ``save_dir`` and ``save_interval`` are shorthands
            for its fields.
        state: the position of a resumed run; ``start_epoch`` is a shorthand for its ``epoch``.
        assets: what is saved beside the weights.
        samples: called at each evaluation on every rank; returns prompts and sample responses.
        settings: the run's settings, for wandb and TensorBoard.
        callbacks: told what happens, on every rank.
    """

    name = "sl"
    unit_name = "supervised tokens"  # what ``num_terms`` of the objective counts

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        max_epochs: int,
        *,
        accumulation_steps: int = 1,
        schedule: RunSchedule | None = None,
        state: RunningState | None = None,
        assets: ModelAssets | None = None,
        samples: Callable[[Engine], list[tuple[str, str]]] | None = None,
        settings: dict[str, Any] | None = None,
        callbacks: Iterable[Callback] = (),
        start_epoch: int = 0,
        save_interval: int | None = None,
        save_dir: str | None = None,
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.max_epochs = max_epochs
        self.accumulation_steps = accumulation_steps
        self.schedule = schedule or RunSchedule(save_dir, save_interval or 0)
        self.state = state or RunningState()
        self.state.epoch = max(self.state.epoch, start_epoch)
        self.assets = assets or ModelAssets.of(engine.module)
        self.samples = samples
        self.callbacks = CallbackList(callbacks)
        self.stopped_early = False
        self._stepped = False
        self._mfu: float | None = None  # as it was logged last
        self._waited = 0.0  # for the rows of this step
        self._loader: Any = None
        self.log = RunLog(self.name, self.schedule, self.state.trainer, settings)
        self.throughput = Throughput(engine, objective.engines())
        self._interval = {"loss": 0.0, "units": 0.0, "tokens": 0.0, "seconds": 0.0}
        self._interval |= self.state.trainer.get("interval", {})

    @property
    def first_evaluation(self) -> dict[str, float]:
        """Metrics of the first evaluation, by name under ``eval/``; empty without one."""
        return self.log.first_evaluation

    @property
    def last_evaluation(self) -> dict[str, float]:
        """Likewise of the last evaluation."""
        return self.log.last_evaluation

    @property
    def best(self) -> dict[str, float]:
        """``{"value", "step"}`` of the best model so far; empty before there is one."""
        return self.log.best

    def training_batches(self, micro_batches: list[Batch]) -> list[Batch]:
        """What an optimizer step is taken on, from the rows that the loader gives for the position
        of :attr:`state`; on every rank."""
        return micro_batches

    def diagnose(self, step: Step) -> list[str]:
        """After each optimizer step, on every rank: lines to show now."""
        return []

    def before_evaluation(self, eval_dataloader: Any) -> None:
        """On every rank, before the batches are evaluated one by one."""

    def report(self) -> list[str]:
        """After the run: lines about its last evaluation."""
        return []

    def derive_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """``metrics`` as they are logged, with what follows from several of them."""
        return metrics

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        """What is logged under eval/ besides the means of the objective's own metrics, whose
        samples ``step`` holds."""
        return {"loss": step.loss}

    def fit(
        self,
        train_dataloader,
        eval_dataloader=None,
        log_dir: str | None = None,
        use_wandb: bool = False,
        report_to: Sequence[str] = (),
    ) -> None:
        """Train. Metrics go to ``<save_dir>/metrics.jsonl``, and to the trackers that are asked
        for: TensorBoard by ``log_dir``, wandb, and those of ``report_to``.

        Raises:
            NonFiniteLoss: naming the step and its rows; the last checkpoint stays as it was.
        """
        loader = as_global_batches(train_dataloader, self.accumulation_steps)
        self._loader = loader
        total = total_steps(
            self.state, loader.count, loader.rows_per_step, self.max_epochs, self.schedule.max_steps
        )
        self.log.open(self.state.step, log_dir, use_wandb, total, report_to=report_to)
        bar = ProgressBar(total, self.state.step, self.name)
        try:
            note(phase="training", step=self.state.step, saved=self.state.step or None)
            with GracefulStop() as stop, at_forced_end(self._fail):
                self.callbacks.call("on_train_begin", self)
                if self.state.step == 0:
                    if loader.figures:
                        self.log.tracker.log(loader.figures, 0)
                    self._evaluate(eval_dataloader, bar)
                self.throughput.prepare()
                self._train(loader, eval_dataloader, bar, total, stop)
                if not self.stopped_early and self.log.evaluated_at != self.state.step:
                    self._evaluate(eval_dataloader, bar)
                self.callbacks.call("on_train_end", self)
            self.log.log_memory(self.state.step, self.throughput.summary())
            self.log.finish(self.state.step, self.stopped_early, self.report())
        except BaseException as error:
            self.log.fail(error, self.state.step)
            raise
        finally:
            bar.close()
            self.log.close()

    def _fail(self, message: str) -> None:
        self.log.fail(RunFailed(message), self.state.step)

    def _train(
        self, loader, eval_dataloader, bar: ProgressBar, total: int, stop: GracefulStop
    ) -> None:
        state = self.state
        if self.log.stop_early("step", state.step):  # the checkpoint is of such a run
            return
        while state.epoch < self.max_epochs and state.step < total:
            batches = loader.global_batches(state.epoch, state.sample_start_index)
            for micro_batches in self._waited_for(batches):
                epoch = state.epoch
                step = self._step(micro_batches, loader, stop, bar)
                end = state.sample_start_index + loader.rows_per_step
                # A stream goes on with the next epoch inside a global batch.
                last_of_epoch = state.epoch > epoch or end > loader.count(state.epoch)
                interval = self.schedule.eval_interval
                due = last_of_epoch if interval is None else self._due(interval)
                # At the end too, and before its checkpoint: what is logged after one is logged
                # again by a resumed run.
                if due or state.step >= total:
                    self._evaluate(eval_dataloader, bar)
                stops = step.stop or self.callbacks.stop_agreed()
                if self._due(self.schedule.save_interval) or stops:
                    with bar.paused("saving a checkpoint"):
                        self.save()
                ends = due and state.step < total and self.log.stop_early("step", state.step)
                self.stopped_early = stops and state.step < total and not ends
                if stops or ends or state.step >= total:
                    return
            state.epoch += 1
            state.sample_start_index = 0

    def _waited_for(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """``batches``, the time until each is there counted as that of the data."""
        found = iter(batches)
        while True:
            began = time.perf_counter()
            micro_batches = next(found, None)
            if micro_batches is None:
                return
            self._waited = time.perf_counter() - began
            self._count("data", self._waited)
            yield micro_batches

    def _count(self, phase: str, seconds: float, steps: int = 0) -> None:
        """Time of training, and to which ``phase`` of it the report adds it."""
        self._interval["seconds"] += seconds
        self.throughput.count(seconds, steps)
        self.log.record.add_seconds(phase, seconds)
        if not steps:
            self.throughput.clock.add(phase, seconds)

    def _step(
        self, micro_batches: list[Batch], loader, stop: GracefulStop, bar: ProgressBar
    ) -> Step:
        started = time.perf_counter()
        scheduler = self.engine.lr_scheduler
        lr = scheduler.get_last_lr()[0] if scheduler is not None else 0.0
        try:
            with self._first_step():
                micro_batches = self.training_batches(micro_batches)
                step = self.engine.train_step(micro_batches, self.objective, stop.requested)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(self._describe(error, loader)) from error
        self.state.step += 1
        note(step=self.state.step)
        state = self.state
        state.epoch, state.sample_start_index = loader.position_after(
            state.epoch, state.sample_start_index
        )
        self.log.meter.add_all(_public(step.metrics))
        seconds = time.perf_counter() - started
        self._interval["loss"] += step.loss * step.num_terms
        self._interval["units"] += step.num_terms
        self._interval["tokens"] += step.tokens
        self._count("training", seconds, steps=1)
        found = self.diagnose(step)
        self.callbacks.call("on_step", self, _of_step(step, lr))
        if self._due(self.schedule.log_interval):
            self._log(lr, step)  # before the bar, which shows the MFU of it
        bar.step(
            loss=step.loss,
            lr=lr,
            tokens_per_second=step.tokens / (self._waited + seconds),
            **({} if self._mfu is None else {MFU: self._mfu}),
        )
        for line in found:
            logger.info(line)  # no warning to the logger: the record takes it with its step
            self.log.record.note(line, self.state.step)
        return step

    def _log(self, lr: float, step: Step) -> None:
        sums = self._interval
        seconds = max(sums["seconds"], 1e-9)
        unit = self.unit_name.replace(" ", "_")
        metrics = {
            "train/loss": sums["loss"] / (sums["units"] or 1),
            "train/lr": lr,
            f"train/{unit}": sums["units"],
            f"train/{TOKENS}": sums["tokens"] / seconds,
            f"train/{unit}_per_second": sums["units"] / seconds,
        }
        if step.grad_norm is not None:
            metrics["train/grad_norm"] = step.grad_norm
        self.throughput.add_to(self.log.meter)
        means = self.derive_metrics(self.log.meter.report())
        means = self.throughput.metrics(means)
        metrics |= {f"train/{name}": value for name, value in means.items()}
        metrics["epoch"] = self.state.epoch
        self._mfu = means.get(MFU)
        speed = sums["tokens"] / seconds
        self.throughput.logged(means | {TOKENS: speed}, seconds)
        self.log.tracker.log(metrics, self.state.step)
        self.callbacks.call("on_log", self, dict(metrics))
        self._interval = dict.fromkeys(sums, 0.0)

    def _evaluate(self, eval_dataloader, bar: ProgressBar) -> None:
        if eval_dataloader is None:
            return
        with (
            self.log.record.timed("evaluation"),
            bar.paused("evaluating"),
            self.throughput.paused(),
        ):
            self._run_evaluation(eval_dataloader, bar)
        self.log.record.update(self.state.step)

    def _first_step(self) -> AbstractContextManager[Any]:
        """What may compile kernels and allocate for the first time is said where it takes long."""
        if self._stepped:
            return nullcontext()
        self._stepped = True
        return phase("taking the first step")

    def _run_evaluation(self, eval_dataloader: Any, bar: ProgressBar) -> None:
        self.before_evaluation(eval_dataloader)
        batches = bar.over(eval_dataloader, "evaluating")
        step = self.engine.evaluate(batches, self.objective)
        means = {
            name: float(torch.cat(values).double().mean())
            for name, values in _public(step.metrics).items()
        }
        metrics = self.evaluation_metrics(step) | self.derive_metrics(means)
        self.log.evaluated(metrics, self.state.step)
        # The count is said at the end of the line.
        said = [(name, value) for name, value in metrics.items() if name != "count"]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in said)
        prefix = f"step {self.state.step}: "
        bar.write(f"{prefix}evaluation {shown} ({_count(step.num_terms)} {self.unit_name})")
        if best := self.log.keep_best(self.engine, self.assets, self.state.step):
            bar.write(prefix + best)
        if self.samples is not None and (samples := self.samples(self.engine)):
            bar.write(format_samples(samples))
            rows = [list(sample) for sample in samples]
            self.log.tracker.table(["prompt", "response"], rows, self.state.step)
        self.callbacks.call("on_evaluate", self, dict(self.last_evaluation))

    def save(self) -> Path | None:
        """Write a checkpoint of where the run stands now; None without ``save_dir``. Every rank
        must call it."""
        save_dir = self.schedule.save_dir
        if save_dir is None:
            return None
        with self.log.record.timed("checkpoints"):
            self.throughput.add_to(self.log.meter)
            self.state.trainer["interval"] = dict(self._interval)
            self.state.trainer |= self.log.state_dict()
            if hasattr(self._loader, "state_dict"):
                self.state.trainer["stream"] = self._loader.state_dict()
            path = save_checkpoint(save_dir, self.engine, self.assets, self.state)
            clean(save_dir, self.schedule.keep_last_k)
        note(saved=self.state.step)
        self.log.record.update(self.state.step)
        self.callbacks.call("on_save", self, path)
        return path

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.state.step % interval == 0

    def _describe(self, error: NonFiniteLoss, loader) -> str:
        rows = loader.rows_at(self.state.epoch, self.state.sample_start_index)
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        return (
            f"{error} (step {self.state.step + 1}, epoch {self.state.epoch}, rows {shown} of "
            f"--dataset); {self.log.what_is_kept()}. Look at these rows; lower --lr or "
            "--grad_clip, or use --mixed_precision bf16 or fp32 instead of fp16"
        )


def _count(terms: float) -> str:
    """Terms, or the sum of their weights, for people to read."""
    return str(terms) if isinstance(terms, int) else f"{terms:.1f}"


def _of_step(step: Step, lr: float) -> dict[str, float]:
    """What callbacks are told of an optimizer step."""
    metrics = {"train/loss": step.loss, "train/lr": lr, "train/tokens": float(step.tokens)}
    return metrics if step.grad_norm is None else metrics | {"train/grad_norm": step.grad_norm}


def _public(metrics: dict[str, list]) -> dict[str, list]:
    """Those that are logged: names beginning with "_" are for the trainer itself."""
    return {name: values for name, values in metrics.items() if not name.startswith("_")}
