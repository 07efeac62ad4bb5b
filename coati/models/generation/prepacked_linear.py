"""Prepacked linear weights for decoding on CPUs.

Each step multiplies every weight with one row per active sequence. For so few rows a library spends
much of its time on bringing the weights into its kernel's layout, again at every call
(benchmarks/bench_prepack.py). PyTorch can keep them in that layout: oneDNN's serves every number of
rows, MKL's one number. Which is fastest depends on the processor, and is measured
(:mod:`coati.models.generation.layout_choice`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.generation.layout_choice import fastest
from coati.models.generation.llama_step import LlamaStep, decodes_like_llama
from coati.models.head import Head

LIMIT_BYTES = 2 * 2**30  # of weights: packing takes as much memory again
PAYS_AFTER = 8  # steps that win back the time of packing
MOST_ROWS = 512  # beyond them, as prompts have, a layout no longer matters


@dataclass(frozen=True)
class Layout:
    """One library's layout of weights, for ``rows`` rows of input at a time.

    ``pack``: (weight (out, in), rows) -> packed. ``product``: (input (n, in), packed, weight, bias,
    rows packed for) -> (n, out). ``serves``: (rows packed for, n) -> whether the product is to be
    used.
    """

    available: Callable[[], bool]
    rows: range
    pack: Callable[[Tensor, int], Tensor]
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
    serves: Callable[[int, int], bool]


def _onednn_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )


def _mkl_available() -> bool:
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def pack_onednn(weight: Tensor, rows: int = 16) -> Tensor:
    """``weight`` (out, in) fp32 in oneDNN's layout."""
    # Packed for 1 row it is slow for others; for all other numbers the layout is the same.
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)


def _onednn(rows: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, count: int):
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def _pack_mkl(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)


def _mkl(rows: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
    held = len(rows)
    if held < count:
        rows = F.pad(rows, (0, 0, 0, count - held))
    return torch.ops.mkl._mkl_linear(rows, packed, weight, bias, count)[:held]


LAYOUTS = {
    "onednn": Layout(
        _onednn_available,
        range(1, MOST_ROWS + 1),
        pack_onednn,
        _onednn,
        lambda packed, rows: rows <= MOST_ROWS,
    ),
    # MKL packs nothing for fewer than 3 rows. Fewer than packed for are filled up; for half of them
    # or fewer that does not pay.
    "mkl": Layout(
        _mkl_available,
        range(3, 129),
        _pack_mkl,
        _mkl,
        lambda packed, rows: packed // 2 < rows <= packed,
    ),
}


class Prepacked:
    """The plain fp32 linear layers of ``model``, packed between :meth:`use` and :meth:`end` where
    that is faster; their outputs stay the same up to rounding.

    Layers of other kinds (sharded, quantized, adapted, of other precision) and inputs of more rows,
    as prompts have, are not affected. The weights must not change before :meth:`end`.

    ``step``: decodes one token of each row of a Llama-like model by joint weights; None for others.

    Args:
        patience: calls of :meth:`use` with a number of rows not packed for before they are.
    """

    def __init__(self, model: nn.Module, patience: int = 0) -> None:
        self.model = model
        self.patience = patience
        self.rows = 0
        self.step: LlamaStep | None = None
        self._waited = 0
        self._layers_only = False
        self._answers: dict[int, str | None] = {}  # of numbers of rows up to a power of two
        self._layout: Layout | None = None
        available = any(layout.available() for layout in LAYOUTS.values())
        self._layers: list[Any] = (
            [each for each in model.modules() if _suits(each)] if available else []
        )
        if sum(4 * layer.weight.numel() for layer in self._layers) > LIMIT_BYTES:
            self._layers = []
        self._replaced: list[tuple[Any, Callable[..., Any] | None]] = []

    def use(self, rows: int) -> None:
        """Announce a forward of one token of each of ``rows`` rows."""
        if not self._layers or (self._layout and self._layout.serves(self.rows, rows)):
            self._waited = 0
            return
        self._waited += 1
        if self._waited > self.patience:
            self._waited = 0
            kind = (rows - 1).bit_length()
            if kind not in self._answers:
                self._answers[kind] = self._fastest(rows)
            name = self._answers[kind]
            self.end()
            if name is not None:
                self._pack(LAYOUTS[name], rows)

    @torch.no_grad()
    def _fastest(self, rows: int) -> str | None:
        """The name of the layout to pack for ``rows`` rows in; None: the layers as they are."""
        names = [name for name, each in LAYOUTS.items() if each.available() and rows in each.rows]
        return fastest(self._layers, rows, {name: LAYOUTS[name] for name in names})

    @torch.no_grad()
    def _pack(self, layout: Layout, rows: int) -> None:
        self.rows = rows
        self._layout = layout
        stepwise = layout is LAYOUTS["onednn"] and not self._layers_only
        if stepwise and decodes_like_llama(self.model, self._layers):
            self.step = LlamaStep(self.model, pack_onednn)
        inside = set() if self.step is None else self.step.covered
        for layer in self._layers:
            if layer not in inside:
                self._replaced.append((layer, layer.__dict__.get("forward")))
                layer.forward = _Product(layer, layout, rows)

    def without_step(self) -> None:
        """Decode by the model's own forward from here on, its layers packed one by one."""
        layout = self._layout
        rows = self.rows
        self.end()
        self._layers_only = True
        if layout is not None:
            self._pack(layout, rows)

    def end(self) -> None:
        """Give the layers their own forward back."""
        for layer, original in self._replaced:
            if original is None:
                layer.__dict__.pop("forward", None)  # there is none if memory ran out while packing
            else:
                layer.forward = original
        self._replaced = []
        self._layout = self.step = None
        self.rows = 0

    def __enter__(self) -> "Prepacked":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.end()


class _Product:
    """The forward of ``layer``, by weights packed for ``rows`` rows where they serve."""

    def __init__(self, layer: nn.Linear, layout: Layout, rows: int) -> None:
        self.rows = rows
        self.layout = layout
        self.weight = layer.weight
        self.bias = layer.bias
        self.fallback = layer.forward
        self.packed = layout.pack(layer.weight, rows)

    def __call__(self, hidden: Tensor) -> Tensor:
        count = hidden.shape[:-1].numel()
        if not (count and self.layout.serves(self.rows, count) and _is_plain(hidden)):
            return self.fallback(hidden)
        rows = hidden.reshape(count, -1)
        made = self.layout.product(rows, self.packed, self.weight, self.bias, self.rows)
        return made.view(*hidden.shape[:-1], -1)


def _is_plain(hidden: Tensor) -> bool:
    inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return inference and hidden.dtype == torch.float32


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
