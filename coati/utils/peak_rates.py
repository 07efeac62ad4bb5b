"""The peak rate of a device's matrix products: of GPUs by the makers' tables, of CPUs as measured.

GPUs: dense rates (without structured sparsity) of the data sheets of NVIDIA (B200, H200, H100 and
its variants, H800, H20, GH200, A100, A800, A40, A30, A10, L40S, L40, L4, V100, T4; the whitepapers
of the Ada, Ampere and Blackwell GeForce and RTX series, products accumulated in fp32) and of AMD
(MI300X), and AWS's for the A10G.
"""

import os
import re
import time
from dataclasses import dataclass

import torch

TERA = 1e12
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PeakRates:
    """TFLOP/s of dense matrix products; ``half``: of bf16 and fp16, ``tf32``: of fp32 as TF32; None
    where the device has no such units."""

    half: float | None
    tf32: float | None
    fp32: float


# By a regular expression that the device's name has; the first that fits counts.
GPUS: dict[str, PeakRates] = {
    r"B200": PeakRates(2250.0, 1100.0, 75.0),
    r"H200 NVL": PeakRates(835.0, 417.5, 60.0),
    r"H200": PeakRates(989.4, 494.7, 66.9),
    r"GH200": PeakRates(989.4, 494.7, 66.9),
    r"H100 PCIe": PeakRates(756.0, 378.0, 51.2),
    r"H100 NVL": PeakRates(835.0, 417.5, 60.0),
    r"H100": PeakRates(989.4, 494.7, 66.9),
    r"H800 PCIe": PeakRates(756.0, 378.0, 51.2),
    r"H800": PeakRates(989.4, 494.7, 66.9),
    r"H20": PeakRates(148.0, 74.0, 44.0),
    r"A100": PeakRates(312.0, 156.0, 19.5),
    r"A800": PeakRates(312.0, 156.0, 19.5),
    r"A40": PeakRates(149.7, 74.8, 37.4),
    r"A30": PeakRates(165.0, 82.0, 10.3),
    r"A10G": PeakRates(70.0, 35.0, 35.0),
    r"A10": PeakRates(125.0, 62.5, 31.2),
    r"L40S": PeakRates(362.05, 183.0, 91.6),
    r"L40": PeakRates(181.05, 90.5, 90.5),
    r"L4": PeakRates(121.0, 60.0, 30.3),
    r"RTX 6000 Ada": PeakRates(364.2, 182.1, 91.1),
    r"RTX A6000": PeakRates(154.8, 77.4, 38.7),
    r"RTX 5090": PeakRates(209.5, 104.8, 104.8),
    r"RTX 4090": PeakRates(165.2, 82.6, 82.6),
    r"RTX 3090": PeakRates(71.0, 35.6, 35.6),
    r"V100-SXM\d": PeakRates(125.0, None, 15.7),
    r"V100-PCIE": PeakRates(112.0, None, 14.0),
    r"T4": PeakRates(65.0, None, 8.1),
    r"MI300X": PeakRates(1307.4, 653.7, 163.4),
}
# What makes another device of one with the same name: a slice, or a slower variant.
OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti|SUPER)\b")


def gpu_rates(name: str) -> PeakRates | None:
    """The row of a device by the name that its driver gives; None for one that is not known."""
    if OTHERS.search(name):
        return None
    found = (rates for known, rates in GPUS.items() if re.search(rf"\b{known}\b", name))
    return next(found, None)


def gpu_peak(name: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s of the GPU ``name`` in ``precision``; ``tf32``: fp32 products may be computed so."""
    rates = gpu_rates(name)
    if rates is None:
        return None
    found = rates.half if precision != "fp32" else rates.tf32 if tf32 else rates.fp32
    return None if found is None and precision != "fp32" else (found or rates.fp32) * TERA


SIZES = (128, 256, 512, 1024, 2048)
LEAST = 512  # is always multiplied
LONGEST_S = 0.03  # of a larger product
TIMES = 3


def measured_rate(precision: str) -> float:
    """FLOP/s of this process's matrix products on the CPU: the best of square ones of all sizes
    that take :data:`LONGEST_S` at most, and of :data:`LEAST` at least, :data:`TIMES` each. No
    random numbers are drawn."""
    rate = 0.0
    for size in SIZES:
        work = 2.0 * size**3
        # Threads of a busy machine make small products wait far longer than they take.
        if size > LEAST and work / rate > LONGEST_S:
            break
        left = torch.full((size, size), 0.5, dtype=PRECISIONS[precision])
        product = torch.empty_like(left)
        torch.mm(left, left, out=product)
        rate = max(rate, work / min(_seconds(left, product) for _ in range(TIMES)))
    return rate


def _seconds(left: torch.Tensor, product: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(left, left, out=product)
    return time.perf_counter() - began


def peak_rate(device: torch.device, precision: str) -> float | None:
    """FLOP/s that ``device`` is at best capable of in ``precision``, "fp32", "bf16" or "fp16"; None
    for a GPU that is not known."""
    if device.type == "cpu":
        return measured_rate(precision)
    return gpu_peak(torch.cuda.get_device_name(device), precision, takes_tf32())


def takes_tf32() -> bool:
    """Whether fp32 products on an NVIDIA GPU may be computed as TF32."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":  # of cuBLAS, whatever PyTorch says
        return False
    matmul = torch.backends.cuda.matmul
    # From PyTorch 2.9 on the older name cannot be read where the newer one was set.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
