"""The ids with which a tokenizer begins and ends a document that no chat template surrounds."""

from typing import Any


def end_of_document(tokenizer: Any) -> int:
    """The id that stands after each document. Raises ValueError where there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, with which a plain text must end; set eos_token"
        )
    return tokenizer.eos_token_id


def start_of_document(tokenizer: Any) -> list[int]:
    """The ids that stand before each document: what the tokenizer itself puts before a text (bos of
    Llama and Gemma, [gMASK]<sop> of GLM); else eos where it is bos too (GPT-2's separator); else
    none."""
    eos = end_of_document(tokenizer)
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            own = whole[:start]
            return own or ([eos] if tokenizer.bos_token_id == eos else [])
    return []
