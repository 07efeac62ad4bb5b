"""Models with fewer bits a weight, made and read by bitsandbytes and LLM Compressor; nothing is
quantized here."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from coati.models.loading import DTYPES, read_config
from coati.models.quantization_registry import QUANTS

# What transformers needs beside itself to read a directory of each quant_method.
READERS = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
}


def quantization_kwargs(
    directory: str | os.PathLike,
    quant: str | None,
    device: torch.device,
    dtype: str,
    skip_modules: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Keywords of ``from_pretrained`` for a model that is quantized, or to be; None for any other.

    ``skip_modules``: layers that keep their precision with 4 bits, beside those that always do.

    Raises ValueError for a directory that is quantized already and for a package that is not
    installed.
    """
    held = read_config(directory).get("quantization_config")
    if quant is None and held is None:
        return None
    method = (held or {}).get("quant_method")
    if quant and held:
        raise ValueError(f"{directory} is quantized already ({method}); leave --quant away")
    need(READERS.get(method or "bitsandbytes", "transformers"), f"{directory}: {quant or method}")
    placing: dict[str, Any] = {"device_map": {"": str(device)}}
    if quant:
        placing["quantization_config"] = bitsandbytes_config(
            quant, dtype, [*spared_of(directory), *skip_modules]
        )
    return placing


@contextmanager
def bitsandbytes_on_cpus() -> Iterator[None]:
    """transformers 4.51 lets bitsandbytes onto a CPU with Intel's extension for PyTorch alone,
    which bitsandbytes has done without since 0.46: inside the block it is not asked for."""
    from transformers.integrations import bitsandbytes as gate

    asked = gate.is_ipex_available
    gate.is_ipex_available = lambda: True
    try:
        yield
    finally:
        gate.is_ipex_available = asked


def layers_of(directory: str | os.PathLike) -> int:
    """How many the model has; 0 where its configuration does not say."""
    config = read_config(directory)
    return next(
        (config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config),
        0,
    )


def spared_of(directory: str | os.PathLike) -> list[str]:
    """The layers of a model that keep their precision with 4 bits, by name or a part of it: head,
    value projections, key projections where heads share them (they are small there), and the MLPs
    of the last fifteenth of the layers."""
    config, layers = read_config(directory), layers_of(directory)
    heads = config.get("num_attention_heads") or 0
    keys = ["k_proj"] if (config.get("num_key_value_heads") or heads) < heads else []
    last = range(layers - layers // 15, layers)
    mlps = [
        f"{layer}.{n}.{part}"
        for n in last
        for layer in ("layers", "h")
        for part in ("mlp", "fc1", "fc2")
    ]
    return ["lm_head", "embed_out", "v_proj", *keys, *mlps]


def bitsandbytes_config(quant: str, dtype: str, skip_modules: Sequence[str] = ()) -> Any:
    """``quant``: a key of QUANTS; the products are computed in ``dtype``, a key of DTYPES.
    ``skip_modules``: layers that keep their precision with 4 bits."""
    from transformers import BitsAndBytesConfig

    if quant not in QUANTS:
        raise ValueError(f"quant must be one of {', '.join(QUANTS)}, not {quant!r}")
    if quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, "float32" if dtype == "auto" else DTYPES[dtype])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=True,  # the scales too are rounded, to 8 bits
        llm_int8_skip_modules=list(skip_modules),
    )


def need(package: str, wanted: str) -> None:
    """Raise ValueError when ``package`` is not installed; ``wanted``: what for."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise ValueError(
            f"{wanted} needs the package {name}, which is not installed; see docs/inference.md"
        )
