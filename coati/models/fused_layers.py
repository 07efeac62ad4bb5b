"""RMSNorm, rotary embedding and SwiGLU on a CPU, each as one function with a backward pass of its
own: fewer passes over memory and fewer tensors kept than autograd makes of transformers' code.

The model's classes keep their names and parameters. A layer is changed only where a probe of it
shows that it computes this; what is not plain fp32 on a CPU goes through the original code.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE_WIDTH = 8
CLAMPED = 1e3  # times a usual input: beyond what families cut their gates off at
EPS = ("variance_epsilon", "eps")  # what families call it
SILU = ("SiLU", "SiLUActivation")
MARK = "_coati_fused"  # on a layer whose probe agreed; of a norm its offset
# Class or module -> its own code.
_originals: dict[Any, Callable[..., Any]] = {}
_off = False


class FusedRMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        factor = weight + offset if offset else weight
        ctx.save_for_backward(normed, factor, scale)
        return normed * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, factor, scale = ctx.saved_tensors
        (gradient,) = gradients
        products = (gradient * normed).flatten(0, -2)
        of_weight = products.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        mean = torch.mv(products, factor).div_(normed.shape[-1]).view_as(scale)
        of_x = (gradient * factor).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x, of_weight, None, None


class FusedRotary(torch.autograd.Function):
    """(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) of query and key (arXiv 2104.09864), x1 and x2 being
    the halves of the last dimension; ``cos``, ``sin`` broadcast."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _rotated(query, cos, -first, second), _rotated(key, cos, -first, second)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return (*(_rotated(g, cos, second, -first) for g in gradients), None, None)


def _rotated(x: Tensor, cos: Tensor, into_first: Tensor, into_second: Tensor) -> Tensor:
    """x cos, with x2 ``into_first`` added to its first half and x1 ``into_second`` to the other."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], into_first)
    out[..., half:].addcmul_(x[..., :half], into_second)
    return out


class FusedSwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        of_up = F.silu(gate).mul_(gradient) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_up
        return torch.ops.aten.silu_backward(gradient * up, gate), of_up


def fuse_layers(model: nn.Module) -> list[str]:
    """Change ``model``'s norms and feed-forward blocks, and the rotary embeddings of all models of
    the family; returns what of them is fused now."""
    switch(True)
    layers = list(model.modules())
    attentions = {type(each) for each in layers if type(each).__name__.endswith("Attention")}
    found = {
        "RMSNorm": [_fuse_norm(each) for each in layers if _is_norm(type(each))],
        "rotary embedding": [_fuse_rotary(sys.modules[kind.__module__]) for kind in attentions],
        "SwiGLU": [_fuse_swiglu(each) for each in layers if _is_gated(each)],
    }
    return [name for name, fused in found.items() if any(fused)]


def switch(on: bool) -> None:
    """Whether what was changed is in use, in every model of the process."""
    global _off
    _off = not on


@contextmanager
def original_layers() -> Iterator[None]:
    """The families' own code meanwhile, in every model."""
    before = not _off
    switch(False)
    try:
        yield
    finally:
        switch(before)


def _plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary fp32 tensors on a CPU, outside autocast."""
    if _off or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"
        for x in tensors
    )


def _is_norm(kind: type) -> bool:
    return kind.__name__.endswith("RMSNorm")


def _fuse_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    name = next((name for name in EPS if hasattr(module, name)), None)
    alone = set(module._parameters) == {"weight"}
    if name is None or not alone or not isinstance(weight, Tensor) or not _plain(weight):
        return False
    eps = getattr(module, name)
    if eps is None:  # PyTorch's own norm takes that of the precision
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator)
    # A fresh norm's weights are all alike, which would hide where they are multiplied.
    weight = nn.Parameter(torch.randn(len(weight), generator=generator))
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": weight}
    with torch.no_grad(), original_layers():
        try:
            own = probe(x)
        except Exception:  # a norm that takes more than this
            return False
        offset = next(
            (o for o in (0.0, 1.0) if _same(own, FusedRMSNorm.apply(x, weight, eps, o))), None
        )
    if offset is None:
        return False
    kind = type(module)
    module.__dict__[MARK] = offset
    if kind in _originals:
        return True
    original = kind.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        offset = self.__dict__.get(MARK)  # one without it may have no weight
        if offset is None or args or kwargs or not _plain(hidden_states, self.weight):
            return original(self, hidden_states, *args, **kwargs)
        return FusedRMSNorm.apply(hidden_states, self.weight, getattr(self, name), offset)

    _replace(kind, "forward", forward)
    return True


def _fuse_rotary(module: Any) -> bool:
    name = "apply_rotary_pos_emb"
    if module in _originals:
        return True
    original = getattr(module, name, None)
    if original is None:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 3, PROBE_WIDTH, generator=generator) for n in (4, 2))
    angles = torch.randn(1, 3, PROBE_WIDTH // 2, generator=generator).repeat(1, 1, 2)
    try:
        own = original(query, key, angles.cos(), angles.sin())
        cos, sin = (x.unsqueeze(1) for x in (angles.cos(), angles.sin()))
        same = all(map(_same, own, FusedRotary.apply(query, key, cos, sin)))
    except Exception:  # a function of another form, of which any error says the same
        return False
    if not same:
        return False

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        if whole and _plain(q, k, cos, sin):
            return FusedRotary.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
        return original(q, k, cos, sin, *args, **kwargs)

    _replace(module, name, rotary)
    return True


def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _fuse_swiglu(module: nn.Module) -> bool:
    if type(getattr(module, "act_fn", None)).__name__ not in SILU or module._parameters:
        return False
    kind = type(module)
    own = _originals.get(kind, kind.forward)
    probe = copy.copy(module)
    with torch.random.fork_rng(devices=[]):
        up, gate = (nn.Linear(PROBE_WIDTH, 2 * PROBE_WIDTH) for _ in range(2))
        down = nn.Linear(2 * PROBE_WIDTH, PROBE_WIDTH)
    layers = {"up_proj": up, "gate_proj": gate, "down_proj": down, "act_fn": module.act_fn}
    probe.__dict__["_modules"] = layers
    x = torch.randn(2, 3, PROBE_WIDTH, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, CLAMPED * x])
    try:
        with torch.no_grad():
            same = _same(own(probe, x), down(FusedSwiGLU.apply(gate(x), up(x))))
    except Exception:  # a block that holds more than these
        return False
    if not same:
        return False
    module.__dict__[MARK] = True
    if kind in _originals:
        return True

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused = MARK in self.__dict__ and type(self.act_fn).__name__ in SILU
        if args or kwargs or not (fused and _plain(x)):
            return own(self, x, *args, **kwargs)
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        if not _plain(gate, up):
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(FusedSwiGLU.apply(gate, up))

    _replace(kind, "forward", forward)
    return True


def _same(own: Any, fused: Tensor) -> bool:
    return isinstance(own, Tensor) and torch.allclose(own, fused, rtol=1e-5, atol=1e-6)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    _originals[owner] = getattr(owner, name)
    function.__wrapped__ = _originals[owner]  # type: ignore[attr-defined]
    setattr(owner, name, function)
