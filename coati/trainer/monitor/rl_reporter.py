"""What an online run leaves behind and shows: metrics, sample tables, words of warning,
evaluations, checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coati.experience_maker.rollout_batch import RolloutBatch
from coati.parallel.checkpoint import clean, save_models
from coati.parallel.objective import Step
from coati.trainer.best_checkpoint import is_better, save_best, value_of
from coati.trainer.monitor.sample_table import SampleRow, distinct_2, sample_rows, sample_table
from coati.trainer.progress import ProgressBar
from coati.utils.distributed import all_gather_object
from coati.utils.logging import get_logger
from coati.utils.memory import describe_memory, peak_memory_of_ranks
from coati.utils.meter import AccumulativeMeanMeter
from coati.utils.tracking import NullTracker, make_tracker

logger = get_logger(__name__)

if TYPE_CHECKING:
    from coati.trainer.online import OLTrainer

SAMPLES = 3  # rows of a sample table
EVALUATION = 2**32 - 1  # the "episode" whose noise evaluations are sampled with: the same at each


class RLReporter:
    """Belongs to one :class:`~coati.trainer.online.OLTrainer`."""

    def __init__(self, trainer: "OLTrainer", checks: Any = None) -> None:
        self.trainer, self.checks, self.tracker = trainer, checks, NullTracker()
        self.meter = AccumulativeMeanMeter()
        stored = trainer.state.trainer
        self.meter.load(stored.get("meter", []))
        evaluated = stored.get("evaluated", {})
        self.first_evaluation: dict[str, float] = evaluated.get("first", {})
        self.last_evaluation: dict[str, float] = evaluated.get("last", {})
        self.best: dict[str, float] = stored.get("best", {})
        self._counts: dict[str, float] = {
            "tokens": 0.0,
            "responses": 0.0,
            "rollout": 0.0,
            "seconds": 0.0,
            "ratio": 0.0,
        }
        self._counts |= stored.get("counts", {})
        if checks is not None and "signs" in stored:
            checks.load_state_dict(stored["signs"])

    def open(self, log_dir: str | None, use_wandb: bool) -> None:
        trainer, plan = self.trainer, self.trainer.schedule
        if plan.save_dir is None and log_dir is None and not use_wandb:
            return
        file = Path(plan.save_dir) / "metrics.jsonl" if plan.save_dir else None
        log_dir = None if log_dir is None else str(Path(log_dir) / trainer.name)
        project = f"Coati-{trainer.name}"
        self.tracker = make_tracker(
            file, log_dir, use_wandb, project=project, keep_to=trainer.episode
        )
        if (
            trainer.episode == 0 and self.first_evaluation
        ):  # of a run stopped in its first episode, whose file is new
            self.tracker.log(self.first_evaluation, 0)

    def close(self) -> None:
        self.tracker.close()

    def memory(self) -> None:
        peaks = peak_memory_of_ranks()
        logged = {f"memory/rank_{rank}_peak_mb": peak for rank, peak in enumerate(peaks)}
        self.tracker.log(logged, self.trainer.episode)
        logger.info(describe_memory(peaks))

    def collected(
        self, collected: list[RolloutBatch], figures: dict[str, float], bar: ProgressBar
    ) -> None:
        """A collect phase is done. Every rank must call it."""
        reports = self.trainer.engine.mesh.is_loss_rank
        for each in collected:
            self.meter.add_all({name: [values] for name, values in each.samples.items()})
        answers = [answer for each in collected for answer in _answers(each)] if reports else []
        everyone = [answer for rank in all_gather_object(answers) for answer in rank]
        seconds = {
            name: sum(each.seconds[name] for each in collected) for name in ("rollout", "scoring")
        }
        figures = figures | {
            "distinct_2": distinct_2(everyone),
            "kl_coef": self.trainer.maker.kl.kl_coef,
        }
        for name, value in (
            figures | {f"seconds_{name}": value for name, value in seconds.items()}
        ).items():
            self.meter.add(name, value)
        self._counts["tokens"] += sum(map(len, everyone))
        self._counts["responses"] += len(everyone)
        self._counts["rollout"] += seconds["rollout"]
        self._counts["seconds"] += sum(seconds.values())
        interval = self.trainer.episodes.sample_interval
        if interval and self.trainer.episode % interval == 0:
            rows = _rows(collected[-1])
            bar.write(f"episode {self.trainer.episode + 1}: samples\n{sample_table(rows)}")
            self.tracker.table(*sample_rows(rows), self.trainer.episode + 1)

    def step(self, step: Step, values: Step | None, seconds: float) -> None:
        """An optimizer step is done."""
        metrics = dict(step.metrics)
        ratios = [float(value.max()) for value in metrics.pop("ratio_max", []) if len(value)]
        self._counts["ratio"] = max([self._counts["ratio"], *ratios])
        self.meter.add_all(metrics)
        named = {"policy_loss": step.loss, "grad_norm": step.grad_norm}
        if step.aux_losses:
            named["ptx_loss"] = step.aux_losses[0]
        if values is not None:
            self.meter.add_all(values.metrics)
            named |= {"value_loss": values.loss, "critic_grad_norm": values.grad_norm}
        for name, value in named.items():
            if value is not None:
                self.meter.add(name, value)
        self._counts["seconds"] += seconds
        self.meter.add("_seconds_update", seconds)

    def episode(self, bar: ProgressBar) -> None:
        """An episode is done. Every rank must call it."""
        trainer = self.trainer
        if not trainer.episode % max(trainer.schedule.log_interval, 1) == 0:
            bar.step()
            return
        metrics = self.metrics()
        self.tracker.log(
            {f"train/{name}": value for name, value in metrics.items()}, trainer.episode
        )
        shown = {
            "reward": "reward",
            "KL": "approx_kl",
            "length": "response_length",
            "tokens/s": "tokens_per_second",
        }
        bar.step(**{name: metrics[key] for name, key in shown.items()})
        for line in self.checks.look(metrics, trainer.episode) if self.checks is not None else []:
            bar.write(line)

    def metrics(self) -> dict[str, float]:
        """Means since this was last called, over all ranks, each of which must call it."""
        trainer, counts = self.trainer, self._counts
        episodes = trainer.episodes
        metrics = self.meter.report()
        metrics["seconds_update"] = (
            metrics.pop("_seconds_update") * episodes.num_update_steps * episodes.steps_per_pass
        )
        metrics["ratio_max"] = max(all_gather_object(counts["ratio"]))
        metrics["tokens_per_second"] = counts["tokens"] / max(counts["rollout"], 1e-9)
        metrics["samples_per_second"] = counts["responses"] / max(counts["seconds"], 1e-9)
        metrics["optimizer_steps"] = trainer.state.step
        for name, engine in trainer.models.items():
            if engine.lr_scheduler is not None:
                metrics[f"lr_{name}"] = engine.lr_scheduler.get_last_lr()[0]
        for name in counts:
            counts[name] = 0.0
        return metrics

    def evaluate(self, evaluation: Any, bar: ProgressBar) -> None:
        """Reward, length and KL of one response to each prompt of ``evaluation``, sampled with the
        same noise at every evaluation. Every rank must call it."""
        if evaluation is None:
            return
        bar.phase("evaluation")
        trainer, meter = self.trainer, AccumulativeMeanMeter()
        temperature = trainer.episodes.temperature(trainer.episode)
        shown: list[SampleRow] = []
        for rows, batch in zip(evaluation.rows(), evaluation, strict=True):
            # A rank that has run out of rows repeats one whose numbers are left out.
            numbers = rows + [0] * (len(batch["input_ids"]) - len(rows))
            judged = trainer.maker.rollout_and_score(batch, numbers, EVALUATION, temperature)
            meter.add_all({name: [values[: len(rows)]] for name, values in judged.samples.items()})
            shown += _rows(judged, len(rows))
        metrics = meter.report()
        self.last_evaluation = {f"eval/{name}": value for name, value in metrics.items()}
        self.first_evaluation = self.first_evaluation or self.last_evaluation
        self.tracker.log(self.last_evaluation, trainer.episode)
        named = ("reward", "approx_kl", "response_length", "stop_rate")
        told = ", ".join(f"{name} {metrics[name]:.4g}" for name in named)
        bar.write(f"episode {trainer.episode}: on prompts of --eval_prompt_dataset {told}")
        bar.write(sample_table(shown[:SAMPLES]))
        self._keep_best(bar)

    def _keep_best(self, bar: ProgressBar) -> None:
        trainer, metric = self.trainer, self.trainer.schedule.metric_for_best
        if metric is None:
            return
        value = value_of(metric, self.last_evaluation)
        better = is_better(metric, value, self.best.get("value"))
        if trainer.episode == 0 or trainer.schedule.save_dir is None or not better:
            return
        self.best = {"value": value, "step": trainer.state.step}
        found = {"metric": metric, "episode": trainer.episode, **self.best}
        folder = save_best(trainer.schedule.save_dir, trainer.engine, trainer.assets, found)
        bar.write(
            f"episode {trainer.episode}: the best {metric} so far, {value:.4g}; this model is in "
            f"{folder}"
        )

    def save(self, held: dict[str, Any] | None = None) -> Path | None:
        """Write a checkpoint of where the run stands now; None without ``save_dir``. Every rank
        must call it."""
        trainer = self.trainer
        if trainer.schedule.save_dir is None:
            return None
        trainer.state.trainer = trainer.state_dict() | {
            "meter": self.meter.state_of_ranks(),
            "counts": self._counts | {"ratio": max(all_gather_object(self._counts["ratio"]))},
            "evaluated": {"first": self.first_evaluation, "last": self.last_evaluation},
            "best": self.best,
        }
        if self.checks is not None:
            trainer.state.trainer["signs"] = self.checks.state_dict()
        models = {
            name: (engine, trainer.model_assets[name]) for name, engine in trainer.models.items()
        }
        path = save_models(trainer.schedule.save_dir, models, trainer.state, held)
        clean(trainer.schedule.save_dir, trainer.schedule.keep_last_k)
        return path


def _answers(collected: RolloutBatch) -> list[list[int]]:
    """The token ids of each response, stop sequence included."""
    experience = collected.experience
    ids = experience.sequences[:, experience.prompt_width :].tolist()
    return [
        row[:length]
        for row, length in zip(ids, experience.response_lengths().tolist(), strict=True)
    ]


def _rows(collected: RolloutBatch, count: int = SAMPLES) -> list[SampleRow]:
    responses, samples = collected.responses, collected.samples
    return [
        SampleRow(
            responses.prompts[row],
            responses.responses[row],
            float(samples["reward"][row]),
            {name: float(values[row]) for name, values in collected.reward_parts.items()},
            float(samples["approx_kl"][row]),
        )
        for row in range(min(count, len(responses)))
    ]
