"""Which part of a step an operator belongs to, by its name, its shapes and what called it; and the
time that each operator took itself, from an event tree of torch.profiler.

The library's own moments that no operator names are marked by ranges (:func:`marked`): the
optimizer's update with its clipping, and the sampling of a token from its logits.
"""

import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

PRODUCTS = "matrix products"
HEAD = "vocabulary head"
ATTENTION = "attention"
ELEMENTWISE = "elementwise"
COPIES = "copies"
EMBEDDING = "embedding"
SAMPLING = "sampling"
OPTIMIZER = "optimizer"
WAITING = "waiting"
DISPATCH = "dispatch"
OTHER = "other operators"
PYTHON = "Python"
# part -> what it is, for the table
PARTS = {
    PRODUCTS: "linear layers of the transformer blocks, forward and backward",
    HEAD: "products with the vocabulary's weights, and what is done to logits",
    ATTENTION: "scores, softmax and weighted values, forward and backward",
    ELEMENTWISE: "norms, activations, rotary positions, residuals, losses, reductions",
    EMBEDDING: "rows of the embedding read, and their gradients added",
    COPIES: "copies, concatenations, gathers, scatters",
    SAMPLING: "from logits to the next token and its log-prob",
    OPTIMIZER: "clipping, AdamW, setting gradients back",
    WAITING: "collectives: the other ranks",
    DISPATCH: "views, allocation, autograd's bookkeeping: no arithmetic",
    OTHER: "operators that this table knows no part for",
    PYTHON: "the interpreter, between operators",
}
# (module, class, method) -> the part that all of it belongs to
MARKED = {
    ("coati.parallel.engine", "Engine", "_update"): OPTIMIZER,
    ("coati.models.generation.decoder", "Decoder", "_sample"): SAMPLING,
}
_MARK = "part: "

_PRODUCT_NAMES = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "addmv", "mv", "dot", "_scaled_mm"}
_CALLERS_OF_PRODUCTS = {"linear", "matmul", "linear_backward", "einsum"}
_ATTENTION_WORDS = ("scaled_dot_product", "flash_attention", "flex_attention")
_EMBEDDING_NAMES = {"embedding", "embedding_dense_backward", "embedding_backward"}
_COPY_NAMES = set(
    """
    copy_ clone contiguous cat stack index_select gather scatter scatter_ scatter_add_ index
    index_put_ _index_put_impl_ index_copy_ index_add_ repeat repeat_interleave
    masked_select masked_scatter masked_scatter_ masked_fill masked_fill_ fill_ zero_ flip
    roll take constant_pad_nd pad _to_copy to tolist item _local_scalar_dense nonzero sort
    argsort unique_dim scatter_add slice_backward select_backward unique_consecutive full
    ones zeros zeros_like ones_like full_like arange new_full new_zeros new_ones
    masked_scatter_backward tril triu equal
    """.split()
)
_ELEMENTWISE_NAMES = set(
    """
    add sub rsub mul div neg pow sqrt rsqrt exp log log2 log1p sin cos sigmoid silu gelu
    relu tanh softplus log_sigmoid log_sigmoid_forward log_softmax softmax _softmax
    _log_softmax sum mean amax amin max min maximum minimum clamp clamp_min clamp_max abs
    sign where eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or
    bitwise_not bitwise_xor any all cumsum argmax argmin topk logsumexp std var var_mean
    norm linalg_vector_norm native_layer_norm layer_norm rms_norm _fused_rms_norm dropout
    native_dropout isfinite isnan isinf reciprocal square threshold addcmul addcdiv lerp erf
    floor round nan_to_num remainder floor_divide bernoulli rand random uniform multinomial
    searchsorted bucketize diff count_nonzero prod binary_cross_entropy_with_logits mse_loss
    huber_loss smooth_l1_loss nll_loss sgn hardtanh expm1 logaddexp _fused_dropout __and__
    __or__ cumprod true_divide random_from
    """.split()
)
_DISPATCH_NAMES = set(
    """
    view reshape _unsafe_view transpose t permute expand expand_as slice select narrow
    unsqueeze squeeze as_strided alias detach detach_ empty empty_like empty_strided
    new_empty new_empty_strided split split_with_sizes chunk unbind flatten unflatten
    resize_ set_ _reshape_alias is_nonzero result_type lift_fresh numpy_T movedim swapaxes
    unsafe_split resolve_conj resolve_neg view_as expand_backward unsafe_chunk
    broadcast_tensors is_same_size requires_grad_
    """.split()
)
_WAITING_WORDS = ("c10d::", "gloo:", "nccl:", "record_param_comms", "DataLoader")


class Product(NamedTuple):
    """A matrix product (batch, rows, inner) x (inner, columns)."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> float:
        return 2.0 * prod(self)

    def __str__(self) -> str:
        one = f"{self.rows} x {self.inner} x {self.columns}"
        return one if self.batch == 1 else f"{self.batch} of {one}"


@contextmanager
def marked() -> Iterator[None]:
    """Ranges around the methods of :data:`MARKED`. Raises AttributeError where one was renamed."""
    from torch.profiler import record_function

    kept = []
    try:
        for (module, owner, method), part in MARKED.items():
            kind = getattr(importlib.import_module(module), owner)
            original = kind.__dict__.get(method)
            if original is None:
                raise AttributeError(f"{module}.{owner} has no {method} any more; see MARKED")
            kept.append((kind, method, original))
            setattr(kind, method, record_function(_MARK + part)(original))
        yield
    finally:
        for kind, method, original in kept:
            setattr(kind, method, original)


def _dims(shape: Any) -> Iterator[int]:
    """All sizes in an input's shapes, which are nested for lists of tensors."""
    for each in shape or ():
        if isinstance(each, int):
            yield each
        else:
            yield from _dims(each)


def product_of(name: str, shapes: list) -> Product | None:
    """The sizes of a matrix product; None for what is none, or has shapes of another kind."""
    bare = name.rpartition("::")[2].removesuffix("_")
    tensors = [s for s in shapes if isinstance(s, list | tuple) and len(s) and _flat(s)]
    if bare in ("addmm", "baddbmm"):
        tensors = tensors[1:]
    if len(tensors) < 2:
        return None
    left, right = tensors[:2]
    if bare in ("mm", "addmm", "_int_mm") and len(left) == len(right) == 2:
        return Product(1, left[0], left[1], right[1])
    if bare in ("bmm", "baddbmm") and len(left) == len(right) == 3:
        return Product(left[0], left[1], left[2], right[2])
    if "linear" in bare:  # (..., inner) with a weight (columns, inner), what is added before it
        inner = left[-1]
        for weight in reversed(tensors[1:]):
            if len(weight) == 2 and weight[1] == inner:
                return Product(1, prod(left[:-1]), inner, weight[0])
    return None


def _flat(shape: Any) -> bool:
    return all(isinstance(each, int) for each in shape)


def own_part(name: str, shapes: list, vocabulary: int, calls_product: bool = False) -> str:
    """The part of an operator by itself, whatever called it. ``calls_product``: a product is among
    the operators that it called."""
    if any(word in name for word in _WAITING_WORDS):
        return WAITING
    if name.startswith("Optimizer."):
        return OPTIMIZER
    if "Compiled" in name or "cpp_fused" in name:
        return ELEMENTWISE
    if "autograd::" in name or name.endswith(("Backward0", "Backward1")):
        return DISPATCH
    if "::" not in name:  # a range, or a torch.autograd.Function of Python
        return PYTHON
    bare = name.rpartition("::")[2]
    if any(word in name for word in _ATTENTION_WORDS):
        return ATTENTION
    if bare in _EMBEDDING_NAMES:
        return EMBEDDING
    product = bare.removesuffix("_") in _PRODUCT_NAMES or "linear" in bare
    product = product or bare in _CALLERS_OF_PRODUCTS
    if product and calls_product:
        return DISPATCH
    of_vocabulary = vocabulary in _dims(shapes)
    if product:
        return HEAD if of_vocabulary else PRODUCTS
    if bare in _DISPATCH_NAMES:
        return DISPATCH
    if bare.startswith(("_fused_adam", "_foreach_", "_amp_")):
        return OPTIMIZER
    simple = bare.removesuffix("_").removesuffix("_backward").removesuffix("_data")
    simple = simple.removesuffix("_backward")
    known = COPIES if bare in _COPY_NAMES or simple in _COPY_NAMES else None
    if simple in _ELEMENTWISE_NAMES:
        known = ELEMENTWISE
    if known is None:
        return OTHER
    return HEAD if of_vocabulary else known


def inherited(name: str) -> str | None:
    """The part that everything which ``name`` calls belongs to, or None."""
    if name.startswith(_MARK):
        return name.removeprefix(_MARK)
    if any(word in name for word in _ATTENTION_WORDS):
        return ATTENTION
    if name.rpartition("::")[2] in _EMBEDDING_NAMES:
        return EMBEDDING
    return None


class Found:
    """What one profiled stretch took: seconds by part, by product, and by operator within a
    part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.products: dict[Product, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.operators: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.events = 0

    def add(self, part: str, name: str, seconds: float) -> None:
        self.parts[part] += seconds
        entry = self.operators[part, name]
        entry[0] += seconds
        entry[1] += 1


def attribute(events: Iterable[Any], vocabulary: int, thread: int | None = None) -> Found:
    """Of the ``events`` (torch.autograd.profiler_util.FunctionEvent) of one thread; by default the
    one with the most of them, which on a CPU runs forward, backward and optimizer alike."""
    events = [event for event in events if event.time_range is not None]
    if thread is None:
        counts: dict[int, int] = defaultdict(int)
        for event in events:
            counts[event.thread] += 1
        thread = max(counts, key=lambda each: counts[each], default=0)
    found = Found()
    for event in events:
        if event.cpu_parent is None and event.thread == thread:
            _walk(event, None, vocabulary, found)
    return found


def _walk(event: Any, above: str | None, vocabulary: int, found: Found) -> bool:
    """Add the tree of ``event``; whether a matrix product is in it."""
    below = above or inherited(event.name)
    inside = [_walk(child, below, vocabulary, found) for child in event.cpu_children]
    seconds = event.self_cpu_time_total / 1e6
    shapes = event.input_shapes or []
    part = above or own_part(event.name, shapes, vocabulary, any(inside))
    product = product_of(event.name, shapes) if part in (PRODUCTS, HEAD) else None
    found.events += 1
    found.add(part, event.name, seconds)
    if product is not None:
        entry = found.products[product]
        entry[0] += seconds
        entry[1] += 1
    return product is not None or any(inside)
