"""The padding of a saved reward model. transformers' sequence classifiers know no mask: they score
the last token that is not padding. Where padding is the end token, as in many tokenizers, that is
not the token that was trained, so what is saved pads with a token that no row ends with."""

import copy
from collections.abc import Iterable
from typing import Any

from coati.utils.logging import get_logger

logger = get_logger(__name__)

ADDED = "<|pad|>"
_WORDS = ("pad", "reserved", "unused", "unk", "endoftext")  # best first


def scoring_tokenizer(tokenizer: Any, rows: int, used: Iterable[int]) -> tuple[Any, int | None]:
    """A copy of ``tokenizer`` whose padding is none of ``used``, the ids that a row may end with,
    and the padding's id: its own where that serves, a special token that stands for nothing here,
    or a new one if the embedding, of ``rows`` rows, has one to spare. None where there is none:
    ``tokenizer`` is then returned as it is."""
    used = set(used) | {tokenizer.eos_token_id}
    if tokenizer.pad_token_id not in used:
        return tokenizer, tokenizer.pad_token_id
    changed = copy.deepcopy(tokenizer)
    free = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number < rows and number not in used
    }
    if free:
        changed.pad_token = min(free.items(), key=_preference)[1]
    elif max(tokenizer.get_vocab().values()) + 1 < rows and ADDED not in tokenizer.get_vocab():
        changed.add_special_tokens({"pad_token": ADDED})
    else:
        logger.warning_once(
            f"reward model: the tokenizer pads with its end token {tokenizer.pad_token!r} and has "
            "no other token to spare, so plain transformers scores padded batches at another token "
            "than the one trained (coati score does not); score single rows there, or train with "
            f"--add_tokens '{ADDED}'"
        )
        return tokenizer, None
    logger.info(
        f"reward model: it is saved with {changed.pad_token!r} as padding instead of the end token "
        f"{tokenizer.pad_token!r}, so that plain transformers scores the token that is trained, "
        "the last of a row; training itself masks padding by lengths"
    )
    return changed, changed.pad_token_id


def _preference(entry: tuple[int, str]) -> tuple[int, int]:
    number, text = entry
    places = [place for place, word in enumerate(_WORDS) if word in text.lower()]
    return min(places, default=len(_WORDS)), number
