"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from coati.models.ilql_heads import heads_of

MOMENTUM = 0.95


class MuonWithAdamW(Optimizer):
    """torch's Muon (arXiv 2502.16982) over the groups with ``muon`` True, its AdamW over the
    others, which come first.

    Muon's step is Nesterov momentum, orthogonalized by five steps of Newton and Schulz and scaled
    by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of AdamW's: one learning
    rate and weight decay serve both.

    Args:
        groups: parameter groups, each with ``muon``, and perhaps an ``lr`` of its own.
        keywords: of AdamW, besides ``lr`` and ``weight_decay``.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float, **keywords: Any
    ) -> None:
        rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        matrices = [group for group in groups if group["muon"]]
        others = [group for group in groups if not group["muon"]]
        self._inner: dict[bool, Optimizer] = {}
        if others:
            self._inner[False] = AdamW(others, **rates, **keywords)
        if matrices:
            self._inner[True] = torch.optim.Muon(
                matrices,
                momentum=MOMENTUM,
                nesterov=True,
                adjust_lr_fn="match_rms_adamw",
                **rates,
            )
        super().__init__([g for inner in self._inner.values() for g in inner.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, inner in self._inner.items():
            # ColossalAI puts master weights in the groups' place, and new groups for a pipeline's
            # stage; states of a checkpoint are loaded into this optimizer's.
            inner.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            inner.state = self.state
            inner.step()
        return loss


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the trained matrices between embedding and head. Experts that are held as one tensor
    of three dimensions are none."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends += [getattr(model, "score", None)]
    ends += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends += [] if (heads := heads_of(model)) is None else [heads]
    apart = {id(p) for module in ends if module is not None for p in module.parameters()}
    return {id(p) for p in model.parameters() if p.requires_grad and p.ndim == 2} - apart
