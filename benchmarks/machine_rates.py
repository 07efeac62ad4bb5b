"""What this machine can do at most, measured between the steps of the same run: its fp32 matrix
rate, and how fast it reads and copies memory."""

import time
from collections.abc import Callable
from statistics import median

from benchmarks.sft_case import MatmulRate

READ_BYTES = 256 * 2**20  # far beyond any cache
FEW_ROWS = 2  # whose products with large weights take as long as these take to be read


class MachineRates:
    """One sample of each rate at every :meth:`measure`; medians of them."""

    def __init__(self, size: int = 2048, read_bytes: int = READ_BYTES):
        import torch

        self.matmul = MatmulRate(size)
        self.block = torch.zeros(read_bytes // 4)
        self.copy = torch.zeros_like(self.block)
        self.onednn = _onednn_product(size, size, size)
        columns = min(1024, read_bytes // 4)
        self.weights = _onednn_product(FEW_ROWS, columns, read_bytes // 4 // columns)
        self.samples: dict[str, list[float]] = {
            name: [] for name in ("matmul", "onednn", "read", "copied", "weights")
        }

    def measure(self) -> None:
        samples = self.samples
        samples["matmul"].append(self.matmul.measure())
        if self.onednn is not None:
            samples["onednn"].append(2 * self.matmul.size**3 / _seconds(self.onednn))
        size = self.block.numel() * 4
        if self.weights is not None:
            samples["weights"].append(size / _seconds(self.weights))
        samples["read"].append(size / _seconds(self.block.sum))
        # Read once and written once.
        samples["copied"].append(2 * size / _seconds(lambda: self.copy.copy_(self.block)))

    def medians(self) -> dict[str, float]:
        """Flop/s of PyTorch's own and of oneDNN's product; bytes/s of a sum, of copying, and of
        weights that oneDNN multiplies with few rows."""
        return {name: median(values) for name, values in self.samples.items() if values}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _onednn_product(rows: int, inner: int, columns: int) -> Callable[[], object] | None:
    """A product by oneDNN, which PyTorch's ``mm`` does not use for fp32, with weights in its own
    layout; None without it."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(columns, inner), rows)
        left = torch.randn(rows, inner)

        def product() -> object:
            return operator(left, weight, None, "none", [], "")

        product()
        return product
    except (AttributeError, RuntimeError):  # a PyTorch without these operators
        return None


def bandwidth(rates: dict[str, float]) -> float:
    """Bytes per second at which weights can be read: the most that any way showed."""
    return max(rates[way] for way in ("read", "copied", "weights") if way in rates)
