"""Conversion of a GGUF file, a Llama with a GPT-2 style vocabulary, to transformers."""

from pathlib import Path

CONTROL = 3  # the token_type of control tokens in a GGUF file


def build_tokenizer(metadata: dict, *, begin: str, end: str, chat_template: str, max_length: int):
    """A fast tokenizer from the metadata of the GGUF file, without transformers' own conversion.

    That conversion takes ``<|im_start|>`` for eos and omits the pre-tokenizer "smollm", which
    splits digits one by one before byte-level BPE. ``metadata`` holds ``tokens``,
    ``merges`` and ``token_type`` (parallel to tokens).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(metadata["tokens"])}
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in metadata["merges"]]
        )
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    control = [
        token
        for token, kind in zip(metadata["tokens"], metadata["token_type"], strict=True)
        if kind == CONTROL
    ]
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        unk_token=control[0],
        additional_special_tokens=[begin, end],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def build_model(gguf: Path, config: dict, tokenizer):
    """The Llama of the file ``gguf`` in fp32, with the special tokens of ``tokenizer``."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = {
        key: value
        for key, value in config.items()
        if key not in ("_model_name_or_path", "unk_token_id")
    }
    with torch.device("meta"):  # the loader needs only its parameter names
        names = LlamaForCausalLM(LlamaConfig(**{**config, **ids, "torch_dtype": "float32"}))
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=names)["tensors"]
    model = LlamaForCausalLM(names.config)
    missing = set(model.load_state_dict(tensors, strict=False).missing_keys) - set(
        model._tied_weights_keys
    )
    if missing:
        raise ValueError(f"{gguf}: no tensors for {sorted(missing)}")
    model.generation_config = GenerationConfig(**ids)
    return model
