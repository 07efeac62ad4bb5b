"""Real engines around plain models, without a plugin: what they compute, and the gradients of a
step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from coati.models.padding_free import PaddingFree
from coati.parallel.engine import Engine


class Gradients:
    """In an optimizer's place: keeps the gradients of the last step and changes nothing."""

    def __init__(self, model) -> None:
        self.model = model
        self.found: torch.Tensor | None = None

    def step(self) -> None:
        self.found = gradients(self.model)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def get_grad_norm(self) -> float:
        return float(self.found.norm())


class Plain:
    """In a booster's place."""

    plugin = None

    def backward(self, loss, optimizer) -> None:
        loss.backward()


def gradients(model) -> torch.Tensor:
    """All of them, in one row; 0 where there is none."""
    of = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten().clone() for gradient in of])


def engine_of(model, packed: bool = False) -> Engine:
    """``packed``: rows are laid end to end."""
    with patch("coati.parallel.engine.inner_module", lambda model: model):  # nothing is wrapped
        engine = Engine(
            Plain(), model, Gradients(model), padding_free=PaddingFree.of(model) if packed else None
        )
    assert (engine.padding_free is not None) == packed
    engine._no_sync = nullcontext
    return engine


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """A process group of this process alone: an engine adds up over all ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
