"""Implicit language Q-learning (ILQL, arXiv 2206.11871): offline reinforcement learning from scored
conversations. Heads for the values of actions and states are learned beside the policy, which
imitates the rows, and decoding leans to the actions that the heads prefer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coati.dataset.load.collator import supervise_all
from coati.models.generation.value_guidance import guided
from coati.models.head_outputs import HeadRequest
from coati.models.ilql_heads import ActionValues, ILQLHeads, heads_of
from coati.models.ilql_loss import ILQLLoss, ilql_losses, last_of_rows, total
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch, Metrics, Objective, Step
from coati.trainer.base import SLTrainer
from coati.trainer.preference import supervised, with_labels

SYNC_EVERY = 5  # optimizer steps between updates of the targets
ALPHA = 0.001  # share of the Q heads in the targets at each

Samples = Callable[[Engine], list[tuple[str, str]]]


class ILQLObjective(Objective):
    """L_Q + L_V + c_cql L_CQL + c_awac L_AWAC over the actions, which are the supervised tokens.

    Batches hold ``input_ids, attention_mask, loss_mask`` (B, S) and ``reward`` (B,), which is given
    for the last action of a row, all others get 0.

    Args:
        settings: coefficients of the losses.
        mean, std: of the rewards of all training rows, by which they are standardized.
        apply_loss_mask: False makes every token an action that the attention mask shows.
    """

    def __init__(
        self,
        settings: ILQLLoss | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        apply_loss_mask: bool = True,
    ) -> None:
        self.settings = settings or ILQLLoss()
        self.mean = mean
        self.std = std
        self.apply_loss_mask = apply_loss_mask

    def prepare(self, batch: Batch) -> Batch:
        """Adds ``labels``; the rewards are standardized."""
        if not self.apply_loss_mask:
            batch = supervise_all(batch)
        rows = with_labels(batch["input_ids"], batch["attention_mask"], batch["loss_mask"])
        return rows | {"reward": (batch["reward"].float() - self.mean) / self.std}

    def head_request(self, batch: Batch) -> HeadRequest:
        return HeadRequest(action_values=True)

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over actions, of the :class:`~coati.models.head_outputs.HeadOutputs` of n actions."""
        values: ActionValues = outputs.action_values
        rows = supervised(batch).nonzero()[:, 0]
        last = last_of_rows(rows)
        rewards = batch["reward"][rows].masked_fill(~last, 0.0)
        parts = ilql_losses(values, outputs.logps, rewards, last, self.settings)
        metrics: Metrics = {f"{name}_loss": part for name, part in parts.items()}
        metrics |= {
            "q_value": torch.minimum(values.q1, values.q2),
            "target_q_value": values.target,
            "state_value": values.v,
            "value_advantage": values.target - values.v,
            "q_gap": (values.q1 - values.q2).abs(),
            # Of the state before the last action, with the reward that follows it.
            "_last_value": values.target[last],
            "_last_reward": rewards[last],
        }
        return total(parts, self.settings).sum(), metrics


class ILQLTrainer(SLTrainer):
    """Takes what ``booster.boost`` returned, or an :class:`~coati.parallel.engine.Engine`, of a
    language model to which :func:`~coati.models.ilql_heads.attach` gave its heads::

        attach(model)
        ILQLTrainer(*booster.boost(model, optim)[:2], ...)

    Args:
        loss: coefficients of the losses.
        mean, std, apply_loss_mask: of :class:`ILQLObjective`.
        alpha: share of the Q heads in the targets at each update of them.
        sync_every: optimizer steps between these.
        keywords: of :class:`~coati.trainer.base.SLTrainer`; ``samples`` are decoded by the heads.

    Raises:
        ValueError: of a model without heads, or that changes its logits after its output embedding.
    """

    name = "ilql"
    unit_name = "actions"
    objective: ILQLObjective

    def __init__(
        self,
        actor: torch.nn.Module | None = None,
        booster: Any = None,
        actor_optim: Any = None,
        actor_lr_scheduler: Any = None,
        max_epochs: int = 1,
        loss: ILQLLoss | None = None,
        *,
        engine: Engine | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        alpha: float = ALPHA,
        sync_every: int = SYNC_EVERY,
        apply_loss_mask: bool = True,
        samples: Samples | None = None,
        **keywords: Any,
    ) -> None:
        engine = engine or Engine(booster, actor, actor_optim, actor_lr_scheduler)
        found = heads_of(engine.module)
        if found is None:
            raise ValueError("ILQL needs its heads: coati.models.ilql_heads.attach(model)")
        if engine.head is None:
            raise ValueError(
                f"{engine.module.config.model_type} changes its logits after its output embedding, "
                "on whose hidden states ILQL's heads stand"
            )
        self.heads: ILQLHeads = found
        self.alpha = alpha
        self.sync_every = sync_every
        if samples is not None:
            keywords["samples"] = self._guided(samples)
        objective = ILQLObjective(loss, mean, std, apply_loss_mask)
        super().__init__(engine, objective, max_epochs, **keywords)

    def _guided(self, samples: Samples) -> Samples:
        def sampled(engine: Engine) -> list[tuple[str, str]]:
            with guided(engine.module, self.heads):
                return samples(engine)

        return sampled

    def diagnose(self, step: Step) -> list[str]:
        """The targets follow, before anything of this step is saved."""
        if self.state.step % self.sync_every == 0:
            if hasattr(self.engine.model, "_force_wait_all_gather"):
                self.engine.model._force_wait_all_gather()
            self.heads.sync(self.alpha)
        return super().diagnose(step)

    def evaluation_metrics(self, step: Step) -> dict[str, float]:
        """The loss, and the correlation of the last actions' values with their rewards."""
        metrics = {"loss": step.loss}
        if step.metrics.get("_last_reward"):
            both = [torch.cat(step.metrics[name]) for name in ("_last_value", "_last_reward")]
            if len(both[0]) > 1 and all(float(each.std()) > 0 for each in both):
                metrics["value_correlation"] = float(torch.corrcoef(torch.stack(both))[0, 1])
        return metrics
