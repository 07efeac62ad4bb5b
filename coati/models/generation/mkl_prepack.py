"""MKL-prepacked linear weights for small-batch decoding on CPUs.

Each step multiplies every weight with one row per active sequence. For so few rows MKL spends much
of its time packing the weights for its kernel, again at every call (benchmarks/bench_prepack.py);
PyTorch can keep the packed weights, which serve one number of rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.head import Head

ROWS = range(3, 129)  # MKL packs nothing for fewer rows, and for more it no longer matters
LIMIT_BYTES = 2 * 2**30  # of weights: packing takes as much memory again
PAYS_AFTER = 8  # steps that win back the time of packing


def available() -> bool:
    """Whether this PyTorch has MKL, whose operators these are."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


class MklPrepacked:
    """The plain fp32 linear layers of ``model``, packed for few rows between :meth:`use` and
    :meth:`end`; their outputs stay the same up to rounding.

    Layers of other kinds (sharded, quantized, adapted, of other precision) and inputs of more rows,
    as prompts have, are not affected. The weights must not change before :meth:`end`.

    Args:
        patience: calls of :meth:`use` with a new number of rows before weights are packed for it.
    """

    def __init__(self, model: nn.Module, patience: int = 0) -> None:
        self.patience = patience
        self.rows = 0
        self._waited = 0
        self._layers: list[Any] = (
            [each for each in model.modules() if _suits(each)] if available() else []
        )
        if sum(4 * layer.weight.numel() for layer in self._layers) > LIMIT_BYTES:
            self._layers = []
        self._original: list[Callable[..., Any] | None] = []

    def use(self, rows: int) -> None:
        """Announce a forward of one token of each of ``rows`` rows."""
        if not self._layers or _serves(self.rows, rows):
            self._waited = 0
            return
        self._waited += 1
        if rows in ROWS and self._waited > self.patience:
            self.end()
            self._pack(rows)

    @torch.no_grad()
    def _pack(self, rows: int) -> None:
        self.rows = rows
        self._waited = 0
        self._original = [layer.__dict__.get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.forward = _Product(layer, rows)

    def end(self) -> None:
        """Give the layers their own forward back."""
        for layer, original in zip(self._layers, self._original, strict=False):
            if original is None:
                layer.__dict__.pop("forward", None)  # there is none if memory ran out while packing
            else:
                layer.forward = original
        self._original = []
        self.rows = 0

    def __enter__(self) -> "MklPrepacked":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.end()


class _Product:
    """The forward of ``layer``, by weights packed for ``rows`` rows where they serve."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.rows = rows
        self.weight = layer.weight
        self.bias = layer.bias
        self.fallback = layer.forward
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), rows)

    def __call__(self, hidden: Tensor) -> Tensor:
        count = hidden.shape[:-1].numel()
        if not (_serves(self.rows, count) and self._is_plain(hidden)):
            return self.fallback(hidden)
        rows = hidden.reshape(count, -1)
        if count < self.rows:
            rows = F.pad(rows, (0, 0, 0, self.rows - count))
        made = torch.ops.mkl._mkl_linear(rows, self.packed, self.weight, self.bias, self.rows)
        return made[:count].view(*hidden.shape[:-1], -1)

    @staticmethod
    def _is_plain(hidden: Tensor) -> bool:
        inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return inference and hidden.dtype == torch.float32


def _serves(packed: int, rows: int) -> bool:
    # Fewer rows are filled up to the number packed for; for half of them or fewer it does not pay.
    return packed // 2 < rows <= packed


def _suits(layer: nn.Module) -> bool:
    """Whether ``layer`` is a plain linear layer, or the vocabulary head of a :class:`Head`."""
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__.get("forward")
    return (
        (
            own is None
            or isinstance(getattr(own, "__self__", None), Head)
            and own.__self__.is_plain()
        )
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and all(type(parameter) is nn.Parameter for parameter in layer.parameters())
    )
