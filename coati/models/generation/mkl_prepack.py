"""The weights of linear layers, arranged once for the few rows that are sampled at a time on a CPU.

Each token that is sampled multiplies every weight with one row for each living answer. For so few
rows MKL spends much of its time on arranging the weights for its kernel, at every call anew
(benchmarks/bench_prepack.py); PyTorch can keep the arrangement, which is made for one number of
rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.head import Head

ROWS = range(
    3, 129
)  # with one or two rows nothing is arranged; with more than these it no longer matters
LIMIT_BYTES = 2 * 2**30  # of weights: the arrangement takes as much memory again
PAYS_AFTER = 8  # steps after which the time of arranging has been won back


def available() -> bool:
    """Whether this PyTorch has MKL, whose operators these are."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


class MklPrepacked:
    """The plain fp32 linear layers of ``model``, arranged for few rows between :meth:`use` and
    :meth:`end`.

    Their products are then those of the layers themselves, up to rounding. Layers of other kinds
    (split, quantized, adapted, of other precision) and whatever has more rows, as a prompt has,
    stay as they are. The weights must not change before :meth:`end`.

    Args: patience: calls of :meth:`use` that are to come with a number of rows before weights are
        arranged for it.
    """

    def __init__(self, model: nn.Module, patience: int = 0) -> None:
        self.patience, self.rows, self._waited = patience, 0, 0
        self._layers = [each for each in model.modules() if _suits(each)] if available() else []
        if sum(4 * layer.weight.numel() for layer in self._layers) > LIMIT_BYTES:
            self._layers = []
        self._original: list[Callable[..., Any] | None] = []

    def use(self, rows: int) -> None:
        """The next forward has a token of each of ``rows`` rows."""
        if not self._layers or _serves(self.rows, rows):
            self._waited = 0
            return
        self._waited += 1
        if rows in ROWS and self._waited > self.patience:
            self.end()
            self._arrange(rows)

    @torch.no_grad()
    def _arrange(self, rows: int) -> None:
        self.rows, self._waited = rows, 0
        self._original = [layer.__dict__.get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.forward = _Product(layer, rows)

    def end(self) -> None:
        """The layers as they were."""
        for layer, original in zip(self._layers, self._original, strict=False):
            if original is None:
                layer.__dict__.pop(
                    "forward", None
                )  # it has none where memory ran out while arranging
            else:
                layer.forward = original
        self._original, self.rows = [], 0

    def __enter__(self) -> "MklPrepacked":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.end()


class _Product:
    """The forward of ``layer``, by weights arranged for ``rows`` rows where they serve."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.rows, self.weight, self.bias, self.otherwise = (
            rows,
            layer.weight,
            layer.bias,
            layer.forward,
        )
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), rows)

    def __call__(self, hidden: Tensor) -> Tensor:
        count = hidden.shape[:-1].numel()
        if not (_serves(self.rows, count) and self._is_plain(hidden)):
            return self.otherwise(hidden)
        rows = hidden.reshape(count, -1)
        if count < self.rows:
            rows = F.pad(rows, (0, 0, 0, self.rows - count))
        made = torch.ops.mkl._mkl_linear(rows, self.packed, self.weight, self.bias, self.rows)
        return made[:count].view(*hidden.shape[:-1], -1)

    @staticmethod
    def _is_plain(hidden: Tensor) -> bool:
        inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return inference and hidden.dtype == torch.float32


def _serves(arranged: int, rows: int) -> bool:
    # The product is always one of as many rows as it is arranged for: for half of them or fewer it
    # is no bargain.
    return arranged // 2 < rows <= arranged


def _suits(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer and nothing else, or the vocabulary's, which a
    :class:`Head` answers for."""
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
