"""Evaluation of a policy on held-out prompts: reward, length and KL of responses, and pass@k."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import RolloutBatch, without_unscored
from coati.trainer.monitor.rl_reporter import rows_of
from coati.trainer.monitor.sample_table import SampleRow
from coati.utils.distributed import all_gather_object
from coati.utils.logging import get_logger
from coati.utils.meter import AccumulativeMeanMeter
from coati.utils.statistics import bootstrap_interval, pass_at_k

logger = get_logger(__name__)

EVALUATION = 2**32 - 1  # the "episode" whose noise evaluations are sampled with: the same at each


@dataclass(frozen=True)
class PassAt:
    """pass@k for each of ``ks``, estimated from ``generations`` responses to a prompt. ``right``:
    (B,), 1 or True for the responses of a batch that are right; nan where nothing says so, whose
    prompts do not count."""

    ks: tuple[int, ...]
    generations: int
    right: Callable[[RolloutBatch], Tensor]

    def metrics(self, right: Sequence[int]) -> dict[str, float]:
        """``pass_at_K`` of prompts with so many ``right`` responses each, the unbiased estimate
        (arXiv 2107.03374), and the ends of its 95% interval, by a bootstrap over the prompts."""
        found: dict[str, float] = {}
        for k in self.ks if right else ():
            each = [pass_at_k(self.generations, count, k) for count in right]
            found[f"pass_at_{k}"] = sum(each) / len(each)
            if len(each) > 1:
                low, high = bootstrap_interval(each)
                found |= {f"pass_at_{k}_low": low, f"pass_at_{k}_high": high}
        return found


@dataclass
class Evaluated:
    """``metrics`` over all ranks, and this rank's responses to show."""

    metrics: dict[str, float]
    shown: list[SampleRow]

    def summary(self) -> str:
        """The main numbers, for a line."""
        named = ["reward", "approx_kl", "response_length", "stop_rate"]
        named += [name for name in self.metrics if name.startswith("pass_at_")]
        return ", ".join(f"{name} {self.metrics[name]:.4g}" for name in named)


def evaluate_policy(
    maker: NaiveExperienceMaker,
    loader: Any,
    temperature: float,
    pass_at: PassAt | None = None,
    over: Callable[[Any, str, int], Iterator[Any]] | None = None,
) -> Evaluated:
    """One response to each prompt of ``loader``, or those of ``pass_at``, sampled with the same
    noise at every evaluation. Every rank must call it.

    ``loader``: an :class:`~coati.dataset.load.loader.EvaluationLoader`. ``over``: a progress bar's.
    """
    meter = AccumulativeMeanMeter()
    shown: list[SampleRow] = []
    right: dict[int, float] = {}
    count = 1 if pass_at is None else pass_at.generations
    batches: Any = zip(loader.rows(), loader, strict=True)
    for rows, prompts in batches if over is None else over(batches, "evaluating", len(loader)):
        # A rank that has run out of rows repeats one whose numbers are left out.
        indices = rows + [0] * (len(prompts["input_ids"]) - len(rows))
        indices = [row * count + number for row in indices for number in range(count)]
        several = {} if count == 1 else {"num_generations": count}
        batch = maker.rollout_and_score(prompts, indices, EVALUATION, temperature, **several)
        own = len(rows) * count
        meter.add_all(
            {name: [without_unscored(name, values[:own])] for name, values in batch.samples.items()}
        )
        if pass_at is not None:
            each = pass_at.right(batch)[:own].view(-1, count).float().sum(1).tolist()
            right |= dict(zip(rows, each, strict=True))
        shown += rows_of(batch, own)
    metrics = meter.report()
    if pass_at is not None:
        of_all = {row: n for rank in all_gather_object(right) for row, n in rank.items()}
        known = [int(of_all[row]) for row in sorted(of_all) if not math.isnan(of_all[row])]
        if left_out := len(of_all) - len(known):
            logger.warning_once(
                f"--eval_pass_at: of {left_out} of {len(of_all)} evaluation prompts no reward says "
                "which responses are right; they do not count. --eval_right names the reward that "
                "a right one reaches"
            )
        metrics |= pass_at.metrics(known)
    return Evaluated(metrics, shown)
