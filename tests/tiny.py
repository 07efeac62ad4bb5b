"""Throwaway models and a tokenizer made in-process: no network, no files of a hub, milliseconds on
a CPU."""

from functools import lru_cache

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>\n"
    "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@lru_cache
def tiny_tokenizer(vocab_size: int = 384):
    """A byte-level BPE tokenizer (fast, with offsets); ChatML; bos none, eos = pad = <|im_end|> on
    purpose (pad = eos must stay harmless)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["hello there, how are you today? user assistant system\n" * 4], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:2]})
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_llama(
    seed: int = 0,
    tie: bool = False,
    layers: int = 2,
    hidden: int = 64,
    vocab_size: int = 384,
    **extra,
):
    """A random Llama: hidden 64, 4 heads of 2 KV heads, 2 layers, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=None,
        **extra,
    )
    return LlamaForCausalLM(config)
