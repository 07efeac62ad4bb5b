"""Tokenizers of every family's kind, made in-process, and the template each shipped file belongs
to."""

import copy
from functools import lru_cache
from pathlib import Path

from tests.tiny import tiny_tokenizer

TEMPLATES = Path(__file__).parents[2] / "config" / "conversation_template"
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
# Per file: the control tokens of that family, and its bos and eos. Where a file writes ChatML to a
# vocabulary without ChatML tokens (chatglm2, baichuan2, phi-2), the markers are ordinary text
# there, and so they are here.
FAMILIES = {
    "01-ai_Yi-1.5-9B-Chat": (CHATML, {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}),
    "HuggingFaceTB_SmolLM2-135M-Instruct": (
        CHATML,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "MiniCPM-2b": (CHATML, LLAMA),
    "Qwen_Qwen1.5-110B-Chat": (CHATML, {"eos_token": "<|im_end|>"}),
    "Qwen_Qwen1.5-32B-Chat": (CHATML, {"eos_token": "<|im_end|>"}),
    "Qwen_Qwen2.5-3B": (CHATML, {"eos_token": "<|endoftext|>"}),
    "THUDM_chatglm2-6b": ((), LLAMA),
    "THUDM_chatglm3-6b": (
        ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
        {"eos_token": "</s>"},
    ),
    "baichuan-inc_Baichuan2-13B-Chat": ((), LLAMA),
    "colossal-llama2": ((), LLAMA),
    "deepseek-ai_DeepSeek-V2-Lite": ((), DEEPSEEK),
    "llama2": ((), LLAMA),
    "microsoft_phi-2": ((), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "mistralai_Mixtral-8x7B-Instruct-v0.1": ((), LLAMA),
    "tiny-llama": ((), LLAMA),
    "Qwen_Qwen3-8B": ((*CHATML, "<think>", "</think>"), {"eos_token": "<|im_end|>"}),
    "Qwen_Qwen3.5-9B": ((*CHATML, "<think>", "</think>"), {"eos_token": "<|im_end|>"}),
    "HuggingFaceTB_SmolLM3-3B": (
        CHATML,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"},
    ),
    "allenai_Olmo-3-7B-Instruct": (
        CHATML,
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    ),
    "LiquidAI_LFM2-1.2B": (CHATML, {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}),
    "meta-llama_Llama-3.1-8B-Instruct": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "meta-llama_Llama-4-Scout-17B-16E-Instruct": (
        ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|end_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"},
    ),
    "google_gemma-3-4b-it": (
        ("<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "google_gemma-4-31B-it": (
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "openai_gpt-oss-20b": (
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
    ),
    "zai-org_GLM-4.5-Air": (
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        {"eos_token": "<|endoftext|>"},
    ),
    "microsoft_Phi-3.5-mini-instruct": (
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    ),
    "microsoft_phi-4": (
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    ),
    "mistralai_Mistral-Small-3.2-24B-Instruct-2506": (
        (
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"),
            *("[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[TOOL_RESULTS]"),
            *("[TOOL_CONTENT]", "[/TOOL_RESULTS]"),
        ),
        LLAMA,
    ),
    "deepseek-ai_DeepSeek-V3": (("<｜User｜>", "<｜Assistant｜>"), DEEPSEEK),
    "deepseek-ai_DeepSeek-R1": (("<｜User｜>", "<｜Assistant｜>"), DEEPSEEK),
}


# Tokens that reach over the border between a header, an answer and a marker wherever both sides
# allow it.
SPACE = "Ġ"
NEWLINE = "Ċ"
WIDE = [
    (NEWLINE, NEWLINE),
    (NEWLINE * 2, NEWLINE),
    (SPACE, SPACE),
    (NEWLINE, SPACE),
    (":", SPACE),
    ("]", SPACE),
    (">", NEWLINE),
    (">", SPACE),
    *((left, right) for left in (NEWLINE, SPACE, ":") for right in "uahbdef<["),
    *((letter, "<") for letter in "aeot."),
    *((letter, NEWLINE) for letter in "aeot"),
]


def byte_level(specials=(), names=None, template=None, merges=()):
    """A byte-level BPE tokenizer whose only control tokens are ``specials`` and the values of
    ``names``.

    With ``merges`` no pre-tokenizer keeps words apart.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = list(dict.fromkeys(merges))
    wide = {left + right: 256 + index for index, (left, right) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=_byte_vocabulary() | wide, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **(names or {}))
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def _byte_vocabulary() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    return {
        letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }


def family_tokenizer(name: str, merges=()):
    specials, names = FAMILIES[name]
    return byte_level(specials, names, merges=merges)


def chatml_tokenizer(template=None):
    """A fresh copy of the tiny ChatML tokenizer: a Conversation writes its template into the
    tokenizer."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like(kind: str):
    """Word-start marks as sentencepiece puts them: first, always (Metaspace), legacy (Llama's
    normalizer)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "legacy":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        vocab_size=420,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(
        ["Human: hello there, how are you today? Assistant: I am well </s> <s>"] * 4, trainer
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_only_special(core, {"<unk>", "<s>", "</s>"}),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return tokenizer


def _only_special(core, names):
    """The same tokenizer with the byte tokens as ordinary ones."""
    import json

    from tokenizers import Tokenizer

    layout = json.loads(core.to_str())
    layout["added_tokens"] = [
        token for token in layout["added_tokens"] if token["content"] in names
    ]
    return Tokenizer.from_str(json.dumps(layout))


def messages(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
