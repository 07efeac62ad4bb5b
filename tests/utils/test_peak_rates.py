"""Peak rates of devices by their names, and the measured one of a CPU."""

import time

import pytest
import torch

from coati.utils import peak_rates


@pytest.mark.parametrize(
    "name, half",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_name_finds_its_row(name, half):
    assert peak_rates.gpu_peak(name, "bf16", tf32=False) == half * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A1000",
        "Some other GPU",
    ],
)
def test_what_is_only_called_like_another_is_not_known(name):
    assert peak_rates.gpu_peak(name, "bf16", tf32=False) is None


def test_fp32_is_tf32_where_products_may_be_computed_so():
    name = "NVIDIA A100-SXM4-40GB"
    assert peak_rates.gpu_peak(name, "fp32", tf32=False) == 19.5e12
    assert peak_rates.gpu_peak(name, "fp32", tf32=True) == 156e12
    assert peak_rates.gpu_peak("Tesla T4", "fp32", tf32=True) == 8.1e12  # has none


def test_tf32_is_read_from_each_of_its_switches(monkeypatch):
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    assert not peak_rates.takes_tf32()
    try:
        setattr(matmul, name, "tf32" if name == "fp32_precision" else True)
        assert peak_rates.takes_tf32()
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        assert not peak_rates.takes_tf32()
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")  # which leaves it to PyTorch
        assert peak_rates.takes_tf32()
    finally:
        setattr(matmul, name, before)


def test_a_cpu_is_measured_by_its_best_product(monkeypatch):
    """Of products of up to 512, which take seconds by hand: the larger ones would take too long."""
    asked = []

    def seconds(left, product):
        asked.append(len(left))
        return 0.5 if len(asked) == 8 else 2.0

    monkeypatch.setattr(peak_rates, "_seconds", seconds)
    assert peak_rates.measured_rate("fp32") == 2 * 512**3 / 0.5
    assert asked == [size for size in (128, 256, 512) for _ in range(peak_rates.TIMES)]


def test_threads_that_wait_in_small_products_do_not_end_the_measuring(monkeypatch):
    """0.01 s in each, as on two threads of a busy machine."""
    monkeypatch.setattr(
        peak_rates, "_seconds", lambda left, product: 0.01 + 2 * len(left) ** 3 / 1e11
    )
    assert peak_rates.measured_rate("fp32") > 0.2e11  # of 128: 4e8


def test_a_larger_product_that_another_job_slows_down_does_not_lower_the_rate(monkeypatch):
    seconds = {128: 1e-4, 256: 2e-3, 512: 1.0}
    monkeypatch.setattr(peak_rates, "_seconds", lambda left, product: seconds[len(left)])
    monkeypatch.setattr(peak_rates, "SIZES", tuple(seconds))
    assert peak_rates.measured_rate("fp32") == 2 * 128**3 / 1e-4


def test_measuring_draws_no_random_numbers_and_is_quick():
    before = torch.get_rng_state()
    began = time.process_time()
    assert peak_rates.measured_rate("fp32") > 1e8
    assert torch.equal(torch.get_rng_state(), before)
    assert time.process_time() - began < 20  # far more than on a machine that is busy
