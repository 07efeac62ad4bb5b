"""Metrics of PPO and GRPO episodes: accumulated, logged, shown, and passed to the diagnostics."""

from collections.abc import Sequence
from typing import Any

from coati.experience_maker.rollout_batch import RolloutBatch, without_unscored
from coati.parallel.objective import Step
from coati.trainer.monitor.rl_checks import RLChecks
from coati.trainer.monitor.sample_table import SampleRow, distinct_2, sample_rows, sample_table
from coati.trainer.progress import ProgressBar
from coati.trainer.run_log import RunLog
from coati.trainer.throughput import Throughput
from coati.utils.distributed import all_gather_object
from coati.utils.logging import get_logger
from coati.utils.meter import to_floats

logger = get_logger(__name__)

SAMPLES = 3  # rows of a sample table
SHOWN = {  # on the progress bar
    "reward": "reward",
    "KL": "approx_kl",
    "length": "response_length",
    "tokens/s": "tokens_per_second",
    "MFU": "mfu",
}
RENAMED_METRICS = {"entropy": "sampled_entropy"}  # of earlier releases


class RLReporter:
    """Accumulates metrics until they are logged.

    Args:
        log: the run's.
        checks: the diagnostics; None: none.
        stored: the trainer's state in the checkpoint that is resumed; {} for a new run.
        throughput: what an episode takes, which counts in its seconds.
        ahead: responses are sampled while others are trained with, so that what is waited for them
            is not the time that they take; their tokens per second are then of the whole episode.
    """

    def __init__(
        self,
        log: RunLog,
        checks: RLChecks | None,
        stored: dict[str, Any],
        throughput: Throughput,
        ahead: bool = False,
    ) -> None:
        self.log = log
        self.throughput = throughput
        self.checks = checks
        self._sampled_in = "seconds" if ahead else "rollout"
        names = ("tokens", "trained", "responses", "rollout", "seconds", "ratio", "gap")
        self._counts = dict.fromkeys(names, 0.0) | stored.get("counts", {})
        if checks is not None and "signs" in stored:
            checks.load_state_dict(stored["signs"])

    def add_rollouts(
        self, batches: Sequence[RolloutBatch], metrics: dict[str, float], is_loss_rank: bool
    ) -> None:
        """A collect phase. ``is_loss_rank``: the rank counts for its data-parallel share. Every
        rank must call it."""
        meter = self.log.meter
        counts = self._counts
        for batch in batches:
            samples = batch.samples.items()
            meter.add_all({name: [without_unscored(name, values)] for name, values in samples})
        mine = [ids for batch in batches for ids in _response_ids(batch)] if is_loss_rank else []
        responses = [ids for rank in all_gather_object(mine) for ids in rank]
        rollout = sum(batch.seconds["rollout"] for batch in batches)
        scoring = sum(batch.seconds["scoring"] for batch in batches)
        seconds = {"seconds_rollout": rollout, "seconds_scoring": scoring}
        metrics = dict(metrics)
        counts["gap"] = max(counts["gap"], metrics.pop("rollout_gap_max", 0.0))
        for name, value in (metrics | {"distinct_2": distinct_2(responses)} | seconds).items():
            meter.add(name, value)
        counts["tokens"] += sum(map(len, responses))
        counts["responses"] += len(responses)
        counts["rollout"] += rollout
        # What dynamic sampling adds has its own time.
        self.add_seconds(rollout + scoring + metrics.get("seconds_refill", 0.0))

    def add_seconds(self, seconds: float) -> None:
        """Time of an episode."""
        self._counts["seconds"] += seconds
        self.throughput.count(seconds)

    def add_step(self, step: Step, value_step: Step | None, seconds: float) -> None:
        """An optimizer step of the policy, and of the critic where there is one."""
        meter = self.log.meter
        counts = self._counts
        metrics = dict(step.metrics)
        ratios = to_floats(samples.values.max() for samples in metrics.pop("ratio_max", []))
        counts["ratio"] = max([counts["ratio"], *ratios])
        meter.add_all(metrics)
        named = {"policy_loss": step.loss, "grad_norm": step.grad_norm}
        if step.aux_losses:
            named["ptx_loss"] = step.aux_losses[0]
        if value_step is not None:
            meter.add_all(value_step.metrics)
            named |= {"value_loss": value_step.loss, "critic_grad_norm": value_step.grad_norm}
        for name, value in named.items():
            if value is not None:
                meter.add(name, value)
        counts["trained"] += step.tokens
        self.add_seconds(seconds)
        meter.add("_seconds_update", seconds)

    def take_metrics(self, steps_per_episode: int) -> dict[str, float]:
        """Means over all ranks since this was last called. Every rank must call it."""
        counts = self._counts
        self.throughput.add_to(self.log.meter)
        metrics = self.throughput.metrics(self.log.meter.report())
        metrics["seconds_update"] = metrics.pop("_seconds_update") * steps_per_episode
        if largest := max(all_gather_object(counts["ratio"])):  # 0 where no loss has ratios
            metrics["ratio_max"] = largest
        if counts["gap"]:  # equal on all ranks
            metrics["rollout_gap_max"] = counts["gap"]
        sampled_in = counts[self._sampled_in]
        metrics["tokens_per_second"] = counts["tokens"] / max(sampled_in, 1e-9)
        trained = counts["trained"] / max(counts["seconds"], 1e-9)
        metrics["trained_tokens_per_second"] = trained
        metrics["samples_per_second"] = counts["responses"] / max(counts["seconds"], 1e-9)
        self.throughput.logged(metrics, counts["seconds"], of_tokens=sampled_in)
        self._counts = dict.fromkeys(counts, 0.0)
        return metrics

    def log_episode(self, metrics: dict[str, float], episode: int, bar: ProgressBar) -> None:
        """Log what :meth:`take_metrics` gave, and say what the checks find in it."""
        self.log.tracker.log({f"train/{name}": value for name, value in metrics.items()}, episode)
        bar.step(**{name: metrics[key] for name, key in SHOWN.items() if key in metrics})
        for line in [] if self.checks is None else self.checks.check(metrics, episode):
            logger.info(line)  # no warning to the logger: the record takes it with its episode
            self.log.record.note(line, episode)

    def show_samples(self, batches: Sequence[RolloutBatch], episode: int, bar: ProgressBar) -> None:
        """The first responses of the last of an episode's ``batches``, as a table above the bar
        and in the run's files."""
        rows = rows_of(batches[-1])
        prompts = [prompt for batch in batches for prompt in batch.responses.prompts]
        bar.write(f"episode {episode}: samples\n{sample_table(rows, among=prompts)}")
        self.log.tracker.table(*sample_rows(rows), episode)

    def state_dict(self) -> dict[str, Any]:
        """What is not logged yet, as JSON keeps it. Every rank must call it."""
        state: dict[str, Any] = {
            "counts": self._counts | {"ratio": max(all_gather_object(self._counts["ratio"]))}
        }
        if self.checks is not None:
            state["signs"] = self.checks.state_dict()
        return state


def _response_ids(batch: RolloutBatch) -> list[list[int]]:
    """The token ids that the policy wrote of each response, stop sequence included."""
    experience = batch.experience
    if batch.written is not None:
        tokens = experience.sequences[:, experience.prompt_width :]
        return [row[own].tolist() for row, own in zip(tokens, batch.written.bool(), strict=True)]
    ids = experience.sequences[:, experience.prompt_width :].tolist()
    lengths = experience.response_lengths().tolist()
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def rows_of(batch: RolloutBatch, count: int = SAMPLES) -> list[SampleRow]:
    """The first ``count`` responses of ``batch``, for a sample table."""
    responses = batch.responses
    samples = batch.samples
    return [
        SampleRow(
            responses.prompts[row],
            responses.responses[row],
            float(samples["reward"][row]),
            {
                name: float(values[row])
                for name, values in batch.reward_parts.items()
                if not values[row].isnan()
            },
            float(samples["approx_kl"][row]),
        )
        for row in range(min(count, len(responses)))
    ]


def current_names(trained: dict[str, Any]) -> dict[str, Any]:
    """The trainer's state of a checkpoint, metrics under today's names."""

    def renamed(by_name: dict[str, Any]) -> dict[str, Any]:
        return {RENAMED_METRICS.get(name, name): value for name, value in by_name.items()}

    current = dict(trained)
    if "meter" in trained:
        current["meter"] = [renamed(of_rank) for of_rank in trained["meter"]]
    if "signs" in trained:
        history = dict(trained["signs"]["history"])
        history |= {key: renamed(history[key]) for key in ("first", "recent", "counts")}
        current["signs"] = trained["signs"] | {"history": history}
    return current
