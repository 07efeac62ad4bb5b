"""The only training loop for fixed data: a trainer adds ``prepare``, ``model_keys``, ``num_terms`` and
``loss``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coati.parallel.checkpoint import RunningState, clean, save_checkpoint
from coati.parallel.engine import Batch, Engine, NonFiniteLoss, Step
from coati.parallel.weights import ModelAssets
from coati.trainer.best_checkpoint import is_better, save_best, value_of
from coati.trainer.global_batches import as_windows, total_steps
from coati.trainer.progress import ProgressBar
from coati.trainer.stop import GracefulStop
from coati.utils.logging import get_logger
from coati.utils.memory import describe_memory, peak_memory_of_ranks
from coati.utils.meter import AccumulativeMeanMeter
from coati.utils.tracking import NullTracker, Tracker, make_tracker

logger = get_logger(__name__)


@dataclass
class RunSchedule:
    """When a run logs, evaluates, saves and ends; all in optimizer steps, 0 or None: never
    (``eval_interval`` None: at the end of each epoch). ``metric_for_best``: the evaluation metric
    whose best model is kept."""

    save_dir: str | None = None
    save_interval: int = 0
    keep_last_k: int | None = None
    eval_interval: int | None = None
    log_interval: int = 1
    max_steps: int | None = None
    metric_for_best: str | None = None


class SLTrainer:
    """Loop over epochs and windows; evaluation, logging, checkpoints and a polite end.

    Args: engine: the boosted model. max_epochs: epochs in all; ``state`` says how many of them a
        resumed run has behind it. assets: what is saved beside the weights. samples: called at each
        evaluation on every rank; returns a table of sample answers to show, or "".
    """

    name = "sl"
    unit_name = "supervised tokens"  # what ``num_terms`` counts, for people
    model_keys: tuple[str, ...] = ("input_ids", "attention_mask")

    def __init__(
        self,
        engine: Engine,
        max_epochs: int,
        *,
        accumulation_steps: int = 1,
        plan: RunSchedule | None = None,
        state: RunningState | None = None,
        assets: ModelAssets | None = None,
        samples: Callable[[Engine], str] | None = None,
    ) -> None:
        self.engine, self.max_epochs, self.accumulation_steps = (
            engine,
            max_epochs,
            accumulation_steps,
        )
        self.plan, self.state = plan or RunSchedule(), state or RunningState()
        self.assets = assets or ModelAssets.of(engine.module)
        self.samples = samples
        self.meter = AccumulativeMeanMeter()
        self.meter.load(self.state.trainer.get("meter", []))
        self.stopped_early = False
        evaluated = self.state.trainer.get("evaluated", {})
        self.first_evaluation: dict[str, float] = evaluated.get("first", {})
        self.last_evaluation: dict[str, float] = evaluated.get("last", {})
        self._evaluated_at: int | None = evaluated.get("at")
        self.best: dict[str, float] = self.state.trainer.get("best", {})  # {"value", "step"}
        self._interval = {"loss": 0.0, "units": 0.0, "tokens": 0.0, "seconds": 0.0}
        self._interval |= self.state.trainer.get("interval", {})

    def prepare(self, batch: Batch) -> Batch:
        """Work without gradient before the forward: by default none."""
        return batch

    def num_terms(self, batch: Batch) -> Tensor:
        """Terms that :meth:`loss` adds up: by default the supervised tokens of ``labels``."""
        return (batch["labels"][:, 1:] != -100).sum()

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError(f"{type(self).__name__} must say what its loss is")

    def observe(self, step: Step) -> list[str]:
        """After each optimizer step, on every rank: lines to show now."""
        return []

    def before_evaluation(self, eval_dataloader: Any) -> None:
        """On every rank, before the batches are evaluated one by one."""

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """``metrics`` as they are logged, with what follows from several of them."""
        return metrics

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        """What is logged under eval/ besides the means of the hooks' own metrics, whose samples
        ``step`` holds."""
        return {"loss": step.loss}

    def fit(
        self,
        train_dataloader,
        eval_dataloader=None,
        log_dir: str | None = None,
        use_wandb: bool = False,
    ) -> None:
        """Train. Metrics go to ``<save_dir>/metrics.jsonl``, and to TensorBoard and wandb when
        asked for.

        Raises:
            NonFiniteLoss: naming the step and its rows; the last checkpoint stays as it was.
        """
        loader = as_windows(train_dataloader, self.accumulation_steps)
        total = total_steps(
            self.state, loader.count, loader.window_rows, self.max_epochs, self.plan.max_steps
        )
        tracker = self._tracker(log_dir, use_wandb)
        bar = ProgressBar(total, self.state.step, self.name)
        try:
            with GracefulStop() as stop:
                if self.state.step == 0:
                    if loader.figures:
                        tracker.log(loader.figures, 0)
                    self._evaluate(eval_dataloader, tracker, bar)
                self._run(loader, eval_dataloader, tracker, bar, total, stop)
                if not self.stopped_early and self._evaluated_at != self.state.step:
                    self._evaluate(eval_dataloader, tracker, bar)
            self._log_memory(tracker, bar)
        finally:
            bar.close()
            tracker.close()

    def _run(
        self,
        loader,
        eval_dataloader,
        tracker: Tracker,
        bar: ProgressBar,
        total: int,
        stop: GracefulStop,
    ) -> None:
        state = self.state
        while state.epoch < self.max_epochs and state.step < total:
            for window in loader.windows(state.epoch, state.sample_start_index):
                step = self._step(window, loader, stop, bar, tracker)
                last_of_epoch = state.sample_start_index + loader.window_rows > loader.count(
                    state.epoch
                )
                # At the end too, and before its checkpoint: what is logged after one is logged
                # again by a resumed run.
                due = (
                    last_of_epoch
                    if self.plan.eval_interval is None
                    else self._due(self.plan.eval_interval)
                )
                if due or state.step >= total:
                    self._evaluate(eval_dataloader, tracker, bar)
                if self._due(self.plan.save_interval) or step.stop:
                    self.save()
                if step.stop:
                    self.stopped_early = True
                    return
                if state.step >= total:
                    return
            state.epoch, state.sample_start_index = state.epoch + 1, 0

    def _step(
        self, window: list[Batch], loader, stop: GracefulStop, bar: ProgressBar, tracker: Tracker
    ) -> Step:
        started = time.perf_counter()
        lr = (
            self.engine.lr_scheduler.get_last_lr()[0]
            if self.engine.lr_scheduler is not None
            else 0.0
        )
        try:
            step = self.engine.train_step(window, self, stop.requested)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(self._describe(error, loader)) from error
        self.state.step += 1
        self.state.sample_start_index += loader.window_rows
        self.meter.add_all(_public(step.metrics))
        seconds = time.perf_counter() - started
        for name, value in zip(
            self._interval,
            (step.loss * step.num_terms, step.num_terms, step.tokens, seconds),
            strict=True,
        ):
            self._interval[name] += value
        bar.step(loss=step.loss, lr=lr, tokens_per_second=step.tokens / seconds)
        for line in self.observe(step):
            bar.write(line)
        if self._due(self.plan.log_interval):
            self._log(tracker, lr, step)
        return step

    def _log(self, tracker: Tracker, lr: float, step: Step) -> None:
        window = self._interval
        metrics = {
            "train/loss": window["loss"] / max(window["units"], 1),
            "train/lr": lr,
            "train/supervised_tokens": window["units"],
            "train/tokens_per_second": window["tokens"] / max(window["seconds"], 1e-9),
        }
        if step.grad_norm is not None:
            metrics["train/grad_norm"] = step.grad_norm
        metrics |= {
            f"train/{name}": value for name, value in self.derived(self.meter.report()).items()
        }
        tracker.log(metrics | {"epoch": self.state.epoch}, self.state.step)
        for name in window:
            window[name] = 0.0

    def _evaluate(self, eval_dataloader, tracker: Tracker, bar: ProgressBar) -> None:
        if eval_dataloader is None:
            return
        self.before_evaluation(eval_dataloader)
        step = self.engine.evaluate(eval_dataloader, self)
        means = {
            name: float(torch.cat(values).double().mean())
            for name, values in _public(step.metrics).items()
        }
        metrics = self.evaluation_metrics(step) | self.derived(means)
        self.last_evaluation = {f"eval/{name}": value for name, value in metrics.items()}
        self.first_evaluation = self.first_evaluation or self.last_evaluation
        self._evaluated_at = self.state.step
        tracker.log(self.last_evaluation, self.state.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        bar.write(f"step {self.state.step}: evaluation {shown} ({step.units} {self.unit_name})")
        self._keep_best(bar)
        if self.samples is not None and (table := self.samples(self.engine)):
            bar.write(table)

    def _keep_best(self, bar: ProgressBar) -> None:
        metric = self.plan.metric_for_best
        if metric is None:
            return
        value = value_of(metric, self.last_evaluation)
        # Before the first step there is only the model that the run started from.
        if (
            self.state.step == 0
            or self.plan.save_dir is None
            or not is_better(metric, value, self.best.get("value"))
        ):
            return
        self.best = {"value": value, "step": self.state.step}
        folder = save_best(
            self.plan.save_dir, self.engine, self.assets, {"metric": metric, **self.best}
        )
        bar.write(
            f"step {self.state.step}: the best {metric} so far, {value:.4f}; this model is in "
            f"{folder}"
        )

    def save(self) -> Path | None:
        """Write a checkpoint of where the run stands now; None without ``save_dir``."""
        if self.plan.save_dir is None:
            return None
        self.state.trainer["interval"] = dict(self._interval)
        self.state.trainer["meter"] = self.meter.state_of_ranks()
        evaluated = {
            "at": self._evaluated_at,
            "first": self.first_evaluation,
            "last": self.last_evaluation,
        }
        self.state.trainer["evaluated"] = evaluated
        self.state.trainer["best"] = self.best
        path = save_checkpoint(self.plan.save_dir, self.engine, self.assets, self.state)
        clean(self.plan.save_dir, self.plan.keep_last_k)
        return path

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.state.step % interval == 0

    def _tracker(self, log_dir: str | None, use_wandb: bool) -> Tracker:
        if self.plan.save_dir is None and log_dir is None and not use_wandb:
            return NullTracker()
        metrics_file = Path(self.plan.save_dir) / "metrics.jsonl" if self.plan.save_dir else None
        log_dir = None if log_dir is None else str(Path(log_dir) / self.name)
        return make_tracker(
            metrics_file, log_dir, use_wandb, project=f"Coati-{self.name}", keep_to=self.state.step
        )

    def _log_memory(self, tracker: Tracker, bar: ProgressBar) -> None:
        peaks = peak_memory_of_ranks()
        tracker.log(
            {f"memory/rank_{rank}_peak_mb": peak for rank, peak in enumerate(peaks)},
            self.state.step,
        )
        logger.info(describe_memory(peaks))

    def _describe(self, error: NonFiniteLoss, loader) -> str:
        rows = loader.rows_at(self.state.epoch, self.state.sample_start_index)
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        kept = (
            f"the last checkpoint in {self.plan.save_dir} is untouched"
            if self.plan.save_dir
            else "nothing was saved"
        )
        return (
            f"{error} (step {self.state.step + 1}, epoch {self.state.epoch}, rows {shown} of "
            f"--dataset); {kept}. "
            "Look at "
            "these rows; lower --lr or --grad_clip, or use --mixed_precision bf16 or fp32 instead "
            "of fp16"
        )


def _public(metrics: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Those that are logged: names beginning with "_" are for the trainer itself."""
    return {name: values for name, values in metrics.items() if not name.startswith("_")}
