"""A base of 4 or 8 bits below LoRA adapters (QLoRA, arXiv 2305.14314): linear layers that store
their weights quantized and multiply with the dequantized ones, one layer at a time.

The layers are this library's own, over bitsandbytes' quantization: the product takes the type of
its input, so that precision follows the run as it does for any linear layer; int8 weights are not
multiplied by rounded inputs, as LLM.int8() does; and nothing is repacked between training and
sampling. Codes and scales are integers and bytes, which no cast of the model changes.
"""

import ctypes
import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.quantization_registry import BASES, BLOCK, NESTED_BLOCK
from coati.utils.logging import get_logger
from coati.utils.packages import require_bitsandbytes

logger = get_logger(__name__)

MADV_DONTNEED = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class QuantizedLinear(nn.Module):
    """A frozen linear layer (..., in) -> (..., out) whose weight is stored as ``kind``, a key of
    BASES. ``weight``, (out, in), is dequantized when it is asked for.

    ``codes``: uint8, two of 4 bits each, or int8 (out, in). ``scales``: bytes; nf4: the mean of the
    block scales and their own scales in fp32, then the block scales of 8 bits; int8: fp32 by row.
    """

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.dtype = layer.weight.dtype
        on_gpu = torch.cuda.is_available()
        weight = layer.weight.detach()
        given = weight.to("cuda").float() if on_gpu else weight.float()
        codes, scales = (_to_nf4 if kind == "nf4" else _to_int8)(given)
        self.codes = nn.Parameter(codes.to(weight.device), requires_grad=False)
        self.scales = nn.Parameter(scales.to(weight.device), requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """(out, in), in the type of the model's other weights."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        if self.kind == "int8":
            return (self.codes * self.scales.view(torch.float32)[:, None]).to(dtype)
        return _from_nf4(self.codes, self.scales, (self.out_features, self.in_features), dtype)

    def product(self, x: Tensor) -> Tensor:
        """``x`` W^T without the bias."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Product.apply(x, self)

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear."""
        result = self.product(x)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def _apply(self, fn: Any, *args: Any, **keywords: Any) -> "QuantizedLinear":
        super()._apply(fn, *args, **keywords)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T, which keeps nothing for its backward pass but the layer: W is dequantized again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    functional = _bitsandbytes()
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    wide = torch.cat([state.offset.reshape(1), state.state2.absmax]).float()
    return codes.flatten(), torch.cat([wide.view(torch.uint8), state.absmax.flatten()])


def _from_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    blocks = -(-shape[0] * shape[1] // BLOCK)
    wide = scales[:-blocks].view(torch.float32)
    nested = functional.QuantState(
        absmax=wide[1:],
        code=_nested_code(scales.device),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    absmax = functional.dequantize_blockwise(scales[-blocks:], nested) + wide[0]
    state = functional.QuantState(
        absmax=absmax, shape=torch.Size(shape), dtype=dtype, blocksize=BLOCK, quant_type="nf4"
    )
    return functional.dequantize_4bit(codes.reshape(-1, 1), state)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of LLM.int8() (arXiv 2208.07339): by row, 127 for the largest."""
    scales = weight.abs().amax(dim=1) / 127
    codes = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
    return codes.to(torch.int8), scales.view(torch.uint8)


@cache
def _nested_code(device: torch.device) -> Tensor:
    """The 256 values that a block's scale of 8 bits stands for."""
    return _bitsandbytes().create_dynamic_map().to(device)


@cache
def _bitsandbytes() -> Any:
    import logging

    require_bitsandbytes("--quantize_base nf4")
    # It says at each import on a CPU that a package for faster sampling is not there.
    noise = logging.getLogger("bitsandbytes")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        noise.setLevel(level)
    return functional


def named_otherwise(module: nn.Module) -> bool:
    """Whether a layer is linear by inheritance alone: Llama 4's router, DeepSeek V4's grouped
    projection."""
    return any(part in type(module).__name__ for part in ("Router", "Grouped"))


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of ``model`` that a quantized base stores in few bits: all but vocabulary
    and scalar heads and the routers of experts."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    whole = getattr(model, "trained_whole", ())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not named_otherwise(module)
        and module is not head
        and name.rpartition(".")[2] not in ("gate", "router")
        and not any(f"{name}.".startswith(f"{each}.") for each in whole)
    }


def quantize_base(model: nn.Module, kind: str, dtype: str = "auto") -> nn.Module:
    """Store the linear layers of ``model`` as ``kind``, a key of BASES, in place and one after the
    other; the rest becomes ``dtype``, a key of DTYPES or "auto" (as it is).

    Raises ValueError for a model without such layers, and where bitsandbytes is missing.
    """
    layers = _found(model, kind)
    # Pages of a mapped file would stay resident until all of its tensors are gone.
    files = _mapped_files()
    owners = Counter(parameter.data_ptr() for parameter in model.parameters())
    error = _Error()
    for name, layer in layers.items():
        stored = QuantizedLinear(layer, kind)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, stored)
        error.add(layer.weight.detach(), stored.dequantized(torch.float32))
        if owners[layer.weight.data_ptr()] == 1:
            _forget_pages(layer.weight, files)
    if dtype != "auto":
        model.to(DTYPES[dtype])
    _give_back()
    logger.info(
        f"the base is quantized to {kind}: {len(layers)} linear layers; their weights differ from "
        f"the original's by {error}."
    )
    return model


@torch.no_grad()
def round_base(model: nn.Module, kind: str) -> str:
    """Give the linear layers of ``model`` the values that they have in a base quantized to
    ``kind``, in their own type, for an adapter that was trained on such a base. Returns by how much
    they differ, as text; errors as :func:`quantize_base`."""
    error = _Error()
    for layer in _found(model, kind).values():
        rounded = QuantizedLinear(layer, kind).dequantized(torch.float32)
        before = layer.weight.clone()
        layer.weight.copy_(rounded)
        error.add(before, rounded)
    return str(error)


def _found(model: nn.Module, kind: str) -> dict[str, nn.Linear]:
    if kind not in BASES:
        raise ValueError(f"quantize_base must be one of {', '.join(BASES)}, not {kind!r}")
    layers = quantizable_layers(model)
    if not layers:
        raise ValueError(
            f"--quantize_base {kind}: {type(model).__name__} has no linear layers that could be "
            "stored so (GPT-2's are convolutions by name); train it without --quantize_base"
        )
    return layers


class _Error:
    """The relative root mean square of differences of weights."""

    def __init__(self) -> None:
        self.squares = [0.0, 0.0]

    def add(self, before: Tensor, after: Tensor) -> None:
        """``after``, in fp32, is used up."""
        before = before.float()
        difference = after.to(before.device).sub_(before)
        for index, tensor in enumerate((difference, before)):
            self.squares[index] += float(tensor.flatten().dot(tensor.flatten()))

    def __str__(self) -> str:
        return f"{(self.squares[0] / (self.squares[1] or 1.0)) ** 0.5:.2%} (root mean square)"


def _mapped_files() -> list[range]:
    """The addresses at which files are mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = []
    for line in maps.read_text().splitlines():
        addresses, _, _, _, inode = line.split()[:5]
        if inode != "0":
            begin, end = (int(part, 16) for part in addresses.split("-"))
            found.append(range(begin, end))
    return found


def _forget_pages(tensor: Tensor, files: list[range]) -> None:
    """Let the kernel drop the pages of a ``tensor`` of one of ``files``, which it can read from
    there again. Other memory would be lost to whoever else holds the tensor."""
    last = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    if not any(tensor.data_ptr() in file and last - 1 in file for file in files):
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = last // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if size > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_DONTNEED)


def _give_back() -> None:
    """Return what lies free between the codes of layers, where glibc keeps it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantized layer of ``model`` by its name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def quantization_of(model: nn.Module) -> str | None:
    """The kind that the base of ``model`` is quantized to; None where it is not."""
    return next((layer.kind for layer in quantized_layers(model).values()), None)


def dequantize(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Put ordinary linear layers of the same values in the place of quantized ones, which are
    returned by their names."""
    found = quantized_layers(model)
    error = _Error()
    for name, layer in found.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight, requires_grad=False)
        plain.bias = layer.bias
        if layer.dtype != torch.float32:
            error.add(layer.dequantized(torch.float32), plain.weight.float())
        _put(model, name, plain)
    if found:
        dtype = next(iter(found.values())).dtype
        rounds = (
            ""
            if dtype == torch.float32
            else f"; rounding those to {str(dtype).removeprefix('torch.')} changes them by {error}"
        )
        logger.info(f"the adapters are merged into the values of the quantized base{rounds}.")
    return found


@contextmanager
def dequantized_base(model: nn.Module) -> Iterator[None]:
    """Inside the block :func:`dequantize` has been called; afterward the quantized layers are back,
    to the bit."""
    found = dequantize(model)
    try:
        yield
    finally:
        for name, layer in found.items():
            _put(model, name, layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
