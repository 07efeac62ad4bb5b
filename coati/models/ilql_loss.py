"""The losses of implicit language Q-learning (ILQL, arXiv 2206.11871) as pure functions: one value
per action out, the caller reduces.

Actions are the supervised tokens of a batch, those of a row one after the other; the state after an
action is the one before the row's next action, whatever the user or a tool wrote between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from coati.models.ilql_heads import ActionValues


@dataclass(frozen=True)
class ILQLLoss:
    """``tau``: expectile of V; ``gamma``: discount of an action; ``cql_coef``, ``awac_coef``: c of
    the conservative loss and of the policy's; ``awac_beta``: beta of the policy's weights, 0: each
    weighs 1, which is behavior cloning."""

    tau: float = 0.7
    gamma: float = 0.99
    cql_coef: float = 0.1
    awac_coef: float = 1.0
    awac_beta: float = 0.0


def last_of_rows(rows: Tensor) -> Tensor:
    """(n,) bool: whether an action is its row's last; ``rows`` (n,) ascending, the row of each."""
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    return last


def bellman_targets(rewards: Tensor, v: Tensor, last: Tensor, gamma: float) -> Tensor:
    """r_t + gamma V(s_{t+1}), (n,) without gradient; V is 0 after the last action of a row."""
    following = torch.zeros_like(v)
    following[:-1] = v[1:]
    return rewards + gamma * following.masked_fill(last, 0.0).detach()


def expectile_loss(target: Tensor, v: Tensor, tau: float) -> Tensor:
    """|tau - 1[target < V]| (target - V)^2, (n,): at tau above 1/2 V leans to the better
    actions."""
    difference = target.detach() - v
    weight = torch.where(difference < 0, 1 - tau, tau)
    return weight * difference.square()


def ilql_losses(
    values: ActionValues, logps: Tensor, rewards: Tensor, last: Tensor, settings: ILQLLoss
) -> dict[str, Tensor]:
    """The four parts by name, each (n,) and without its coefficient: ``q``, ``v``, ``cql``,
    ``awac``. ``logps`` (n,): of the actions under the policy; ``rewards`` (n,): after each."""
    wanted = bellman_targets(rewards, values.v, last, settings.gamma)
    advantage = (values.target - values.v).detach()
    weights = torch.exp(settings.awac_beta * advantage)
    return {
        "q": (values.q1 - wanted).square() + (values.q2 - wanted).square(),
        "v": expectile_loss(values.target, values.v, settings.tau),
        "cql": -(values.q1_logps + values.q2_logps),
        "awac": -weights * logps,
    }


def total(parts: dict[str, Tensor], settings: ILQLLoss) -> Tensor:
    """L = L_Q + L_V + c_cql L_CQL + c_awac L_AWAC, (n,)."""
    return (
        parts["q"]
        + parts["v"]
        + settings.cql_coef * parts["cql"]
        + settings.awac_coef * parts["awac"]
    )
