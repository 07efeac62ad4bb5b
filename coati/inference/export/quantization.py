"""Quantized model directories, by bitsandbytes and LLM Compressor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coati.inference.export.measures import Row
from coati.inference.export.model_dir import copy_heads, fresh_folder, write_beside, write_model
from coati.inference.model_loading import conversation_of, load
from coati.inference.quantized_loading import num_layers, quantization_kwargs, require_package
from coati.models.loading import adapter_base, find_model, load_causal_lm
from coati.models.quantization_registry import CALIBRATED, METHOD_OF_QUANT, METHODS
from coati.models.tokenizer import find_tokenizer, load_tokenizer
from coati.utils.phases import phase


@phase("quantizing the model")
def quantize(
    path: str | os.PathLike,
    output: str | os.PathLike,
    method: str,
    *,
    calibration: Sequence[Row] = (),
    group_size: int = 128,
    trust_remote_code: bool = False,
) -> None:
    """Write the model of ``path`` to ``output``, quantized by ``method``, a key of METHODS.

    Args:
        calibration: rows that GPTQ measures its errors on.
        group_size: neighboring weights that share a scale, for gptq and rtn.

    Raises:
        ValueError: for an adapter, for gptq without calibration rows, for a group size that does
            not divide the width of a layer, and for a package that is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method in CALIBRATED and not calibration:
        raise ValueError(
            f"{method} needs calibration data: rows like those the model will see (--calibration "
            "FILE)"
        )
    directory = find_model(path, "actor")
    if adapter_base(directory):
        raise ValueError(
            f"{directory} is a LoRA adapter, which cannot be quantized alone; merge it with "
            "coati merge"
        )
    with fresh_folder(output) as folder:
        quants = [quant for quant, own in METHOD_OF_QUANT.items() if own == method]
        if quants:
            _write_bitsandbytes(directory, folder, quants[0], trust_remote_code)
            return
        require_package("llmcompressor", method)
        tokenizer = load_tokenizer(find_tokenizer(directory), trust_remote_code)
        conversation = conversation_of(directory, tokenizer)
        model = load_causal_lm(
            directory, dtype="fp32", strict=True, trust_remote_code=trust_remote_code
        )
        check_groups(model, group_size)
        # LLM Compressor looks for the recipe of an earlier compression there, also on the hub.
        model.name_or_path = str(folder)
        copy_heads(directory, folder, model.config)
        write_beside(model, tokenizer, conversation, folder)  # before hours of work
        _compress(model, tokenizer, method, calibration, group_size)
        write_model(model, tokenizer, conversation, folder)


def _write_bitsandbytes(
    directory: str | os.PathLike, folder: Path, quant: str, trust_remote_code: bool
) -> None:
    """Load the model quantized, and save it so."""
    quantization_kwargs(directory, quant, torch.device("cpu"), "auto")  # refuses before loading
    skip_modules = outlier_layers(directory, trust_remote_code) if quant == "4bit" else []
    loading = {"skip_modules": skip_modules, "trust_remote_code": trust_remote_code}
    model, tokenizer, conversation = load(directory, quant=quant, beta_gen=0, **loading)
    copy_heads(directory, folder, model.config)
    head = model.get_output_embeddings()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not head:  # was not quantized
            layer.to(torch.bfloat16)
    write_model(model, tokenizer, conversation, folder)


@torch.no_grad()
def outlier_layers(directory: str | os.PathLike, trust_remote_code: bool = False) -> list[str]:
    """Names of the linear layers with the largest outputs, a tenth as many as the model has layers:
    they hold the few weights that quantization must not touch, whatever the input ("The Super
    Weight in Large Language Models", Yu et al. 2024, arXiv 2411.07191)."""
    count = num_layers(directory) // 10
    if not count:
        return []
    model = load_causal_lm(
        directory, dtype="bf16", strict=True, trust_remote_code=trust_remote_code
    ).eval()
    head = model.get_output_embeddings()
    largest = {}

    def note(name: str):
        return lambda module, inputs, output: largest.__setitem__(name, float(output.abs().max()))

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            layer.register_forward_hook(note(name))
    model(torch.arange(min(16, model.get_input_embeddings().num_embeddings))[None])
    return sorted(largest, key=largest.get, reverse=True)[:count]


def check_groups(model: nn.Module, group_size: int) -> None:
    """Raise ValueError naming the first linear layer whose inputs ``group_size`` does not divide,
    and the sizes that divide all layers."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for name, layer in layers.items():
        if layer.in_features % group_size:
            widths = {one.in_features for one in layers.values()}
            fits = [
                size for size in range(16, 513, 16) if not any(width % size for width in widths)
            ]
            sizes = ", ".join(map(str, fits)) or "none of 16 to 512"
            raise ValueError(
                f"--group_size {group_size} does not divide the {layer.in_features} inputs of "
                f"{name}; these divide all layers: {sizes}"
            )


def _compress(
    model: nn.Module, tokenizer: Any, method: str, calibration: Sequence[Row], group_size: int
) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from loguru import logger

    logger.disable("llmcompressor")  # some lines for each layer

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
    )
    modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[method]
    recipe = modifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
    )
    given: dict[str, Any] = {}
    if method in CALIBRATED:
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in calibration]
        longest = max(len(ids) for ids, _ in calibration)
        given = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": longest,
        }
    with torch.random.fork_rng(devices=[]):
        oneshot(model=model, recipe=[recipe], tokenizer=tokenizer, log_dir=None, **given)
