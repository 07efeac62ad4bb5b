"""Loads a model for inference: any directory that training writes, or any Hugging Face model."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from coati.dataset.chat.conversation import Conversation, setup_conversation_template
from coati.dataset.chat.template_file import open_config
from coati.inference.quantized_loading import bitsandbytes_on_cpus, quantization_kwargs
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.value_guidance import BETA, TOP_K, ValueGuidance
from coati.models.ilql_heads import FILE, heads_from, saved_file
from coati.models.loading import DTYPES, adapter_base, find_model, load_causal_lm, load_config
from coati.models.tokenizer import check_vocabulary, find_tokenizer, load_tokenizer
from coati.parallel.compat.import_colossalai import silence_known_noise
from coati.utils.logging import get_logger
from coati.utils.phases import phase
from coati.utils.resources import template_path

logger = get_logger(__name__)

TEMPLATE = "conversation_template.json"


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the template it was trained with."""

    model: nn.Module
    tokenizer: Any
    conversation: Conversation

    def stop_sequences(self) -> list[list[int]]:
        """All that ends a response."""
        return stop_sequences(self.conversation.stop_ids, self.tokenizer, self.model)


@phase("loading the model")
def load(
    path: str | os.PathLike,
    *,
    tokenizer_path: str | os.PathLike | None = None,
    template: dict | str | os.PathLike | None = None,
    template_args: dict[str, Any] | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    quant: str | None = None,
    skip_modules: Sequence[str] = (),
    beta_gen: float | None = None,
) -> Loaded:
    """The model of ``path``: a Hugging Face directory or hub name, a LoRA adapter, a checkpoint
    ``epoch-E_step-S``.

    Tokenizer and template come from the same directory unless they are given; without a template
    file the tokenizer's own chat template serves; ``template_args`` go before the arguments that it
    keeps. ``device`` None: a GPU if there is one. ``dtype``
    "auto": fp32 on a CPU, bf16 or fp16 on a GPU. ``quant``: a key of QUANTS; the weights are
    quantized as they are loaded, with 4 bits except for ``skip_modules``. Directories that hold
    quantized weights need neither. ``beta_gen``: of a model of :func:`coati.ilql` how much its
    values weigh in decoding, 0: nothing, None: as much as a log-prob.

    Raises:
        ValueError: saying what a directory lacks, or has too much.
    """
    silence_known_noise()
    directory = find_model(path, "actor")
    if quant and adapter_base(directory):
        raise ValueError(
            f"{directory} is a LoRA adapter, which cannot be quantized alone; merge it with "
            "coati merge"
        )
    if adapter_base(directory) is None:
        load_config(directory, trust_remote_code)  # its own faults, before a tokenizer has them
    tokenizer = load_tokenizer(tokenizer_path or find_tokenizer(directory), trust_remote_code)
    conversation = conversation_of(directory, tokenizer, template, template_args)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto":
        dtype = (
            "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        )
    quantization = quantization_kwargs(directory, quant, device, dtype, skip_modules)
    options = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "strict": True,
        "placing": quantization,
    }
    with bitsandbytes_on_cpus() if quantization else nullcontext():
        model = load_causal_lm(directory, **options)
    if quantization:
        _compute_in(model, getattr(torch, DTYPES[dtype]))
    check_vocabulary(model, tokenizer)
    model = (model if quantization else model.to(device)).eval()
    guide(model, directory, beta_gen)
    return Loaded(model, tokenizer, conversation)


def guide(model: nn.Module, directory: str | os.PathLike, beta: float | None) -> None:
    """Let ``model`` decode by ILQL's heads in ``directory``, where there are any. Raises ValueError
    for a ``beta`` without heads."""
    if beta == 0:
        return
    config: Any = model.config
    file = saved_file(directory, None if adapter_base(directory) else config)
    if file is None:
        if beta is not None:
            raise ValueError(
                f"--beta_gen {beta:g}: {directory} has no {FILE}, the values of tokens that coati "
                "ilql writes; drop --beta_gen, or name a model of coati ilql"
            )
        return
    weight = BETA if beta is None else beta
    embedding = cast(Any, model).get_output_embeddings()
    heads = heads_from(file, embedding.weight.device, model.dtype)
    if embedding.weight.shape[0] != heads.vocabulary:
        raise ValueError(
            f"{file}: values of {heads.vocabulary} tokens, the model has "
            f"{embedding.weight.shape[0]}: another model's heads"
        )
    ValueGuidance(model, heads, weight).install()
    logger.warning_once(
        f"{directory} decodes by the values of ILQL: log pi + {weight:g} (min Q - V), of which the "
        f"best {TOP_K} tokens may be chosen (--beta_gen 0: by log pi alone)"
    )


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the linear layers that were left unquantized the type that the model computes in; from
    5.24 on transformers leaves them in that of their file."""
    for module in model.modules():
        if type(module) is nn.Linear and not hasattr(module, "quantization_scheme"):
            module.to(dtype)


def with_system(loaded: Loaded, text: str) -> Loaded:
    """``loaded`` with another system message; none for an empty ``text``."""
    config = loaded.conversation.to_config() | {"system_message": text or None}
    return loaded._replace(conversation=Conversation.from_config(loaded.tokenizer, config))


def conversation_of(
    directory: str | os.PathLike,
    tokenizer,
    template: dict | str | os.PathLike | None = None,
    template_args: dict[str, Any] | None = None,
) -> Conversation:
    """The conversation of ``template``, else of the file beside the weights, else of the
    tokenizer's own template; ``template_args`` beside the arguments that it keeps, and before those
    of the same name. Raises ValueError for one that the template does not read."""
    if template is None:
        beside = (folder / TEMPLATE for folder in (Path(directory), Path(directory).parent))
        template = next(filter(Path.is_file, beside), {})
    elif not isinstance(template, dict):
        template_path(template)  # here it must be there; it is not written
    if not template_args:
        return setup_conversation_template(tokenizer, template)
    kept = open_config(template)[0].get("template_args") or {}
    args = {**kept, **template_args}
    try:
        conversation = setup_conversation_template(tokenizer, template, template_args=args)
    except ValueError as error:
        given = str(error).partition("template_args: ")[2]
        raise ValueError(f"--template_args {given}" if given else str(error)) from error
    _say_args(kept, args)
    return conversation


def _say_args(kept: dict[str, Any], args: dict[str, Any]) -> None:
    """What stands instead of arguments that the model keeps."""
    if changed := {name: value for name, value in kept.items() if args[name] != value}:
        logger.warning_once(
            f"--template_args: {json.dumps({name: args[name] for name in changed})} instead of "
            f"{json.dumps(changed)}, which the model was trained with"
        )
