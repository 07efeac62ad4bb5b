"""Loading quantized models, or quantizing while loading: what transformers and bitsandbytes need to
know."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from coati.models.directory_files import read_config
from coati.models.loading import DTYPES
from coati.models.quantization_registry import QUANTS
from coati.utils.transformers_compat import skip_pattern

# The package that transformers needs to load a directory of each quant_method.
PACKAGES = {
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
    """Keywords of ``from_pretrained`` for a model that is quantized, or is to be by ``quant``, a
    key of QUANTS; None for any other.

    ``skip_modules``: layers that 4-bit quantization leaves alone, besides
    :func:`default_skip_modules`.

    Raises:
        ValueError: for a directory that is quantized already, or a package that is not installed.
    """
    existing = read_config(directory).get("quantization_config")
    if quant is None and existing is None:
        return None
    method = (existing or {}).get("quant_method")
    if quant and existing:
        raise ValueError(f"{directory} is quantized already ({method}); leave --quant away")
    require_package(
        PACKAGES.get(method or "bitsandbytes", "transformers"), f"{directory}: {quant or method}"
    )
    keywords: dict[str, Any] = {"device_map": {"": str(device)}}
    if quant:
        keywords["quantization_config"] = bitsandbytes_config(
            quant, dtype, [*default_skip_modules(directory), *skip_modules]
        )
    return keywords


@contextmanager
def bitsandbytes_on_cpus() -> Iterator[None]:
    """Inside the block transformers allows bitsandbytes on a CPU. Version 4.51 does so only with
    Intel's extension for PyTorch, which bitsandbytes no longer needs since 0.46."""
    from transformers.integrations import bitsandbytes as gate

    asked = getattr(gate, "is_ipex_available", None)
    if asked is None:  # transformers 5 asks bitsandbytes itself
        yield
        return
    gate.is_ipex_available = lambda: True
    try:
        yield
    finally:
        gate.is_ipex_available = asked


def num_layers(directory: str | os.PathLike) -> int:
    """The number of layers of the model; 0 where its configuration does not say."""
    config = read_config(directory)
    return next(
        (config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config),
        0,
    )


def default_skip_modules(directory: str | os.PathLike) -> list[str]:
    """Layers that 4-bit quantization leaves alone, by name or a part of it: head, value
    projections, key projections where heads share them (they are small there), and the MLPs of the
    last fifteenth of the layers."""
    config = read_config(directory)
    layers = num_layers(directory)
    heads = config.get("num_attention_heads") or 0
    keys = ["k_proj"] if (config.get("num_key_value_heads") or heads) < heads else []
    last = range(layers - layers // 15, layers)
    mlps = [
        skip_pattern(f"{layer}.{n}.{part}")
        for n in last
        for layer in ("layers", "h")
        for part in ("mlp", "fc1", "fc2")
    ]
    return ["lm_head", "embed_out", "v_proj", *keys, *mlps]


def bitsandbytes_config(quant: str, dtype: str, skip_modules: Sequence[str] = ()) -> Any:
    """``quant``: a key of QUANTS; matrix products are computed in ``dtype``, a key of DTYPES.
    ``skip_modules``: layers that 4-bit quantization leaves alone."""
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
        bnb_4bit_use_double_quant=True,  # the scales are quantized to 8 bits
        llm_int8_skip_modules=list(skip_modules),
    )


def require_package(package: str, wanted: str) -> None:
    """Raise ValueError where ``package``, needed for ``wanted``, is not installed."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise ValueError(
            f"{wanted} needs the package {name}, which is not installed; see docs/inference.md"
        )
