"""Tokens that a run adds: to the tokenizer, as rows of the embedding and the head, and with LoRA as
modules that are trained whole."""

from collections.abc import Iterable, Sequence
from typing import Any

from coati.utils.logging import get_logger

logger = get_logger(__name__)

SHOWN = 12  # tokens, in messages


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[str, ...]:
    """Add ``texts`` as tokens that are part of the text (decoding keeps them, unlike control
    tokens); those that ``tokenizer`` did not have."""
    from tokenizers import AddedToken

    held = tokenizer.get_vocab()
    new = tuple(text for text in dict.fromkeys(texts) if text not in held)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in new])
    if known := [text for text in texts if text in held]:
        logger.info(f"--add_tokens: the tokenizer has {_named(known)} already")
    return new


def _named(texts: Sequence[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")


def grow_embeddings(model: Any, tokenizer: Any, new: Sequence[str]) -> None:
    """Give each of the tokens ``new`` a row in ``model``'s embedding and head, in place: the mean
    of the rows of the other tokens, so that it begins as an average token. Rows that the model has
    to spare are used first.

    Raises ValueError for a language model in a multimodal checkpoint, whose other parts refer to
    the vocabulary.
    """
    if not new:
        return
    import torch

    if getattr(model, "composite", None) is not None:
        raise ValueError(
            "--add_tokens: the vocabulary of a multimodal checkpoint cannot grow; use a text model"
        )
    ids = tokenizer.convert_tokens_to_ids(list(new))
    before = model.get_input_embeddings().weight.shape[0]
    needed = max(ids) + 1
    if needed > before:
        resize_embeddings(model, needed)
    old = sorted(set(range(min(before, min(ids)))) - set(ids))
    with torch.no_grad():
        for tensor in _vocabulary_tensors(model):
            tensor[ids] = tensor[old].float().mean(0).to(tensor.dtype)
    logger.info(
        f"added {len(new)} tokens ({_named(new)}; ids {min(ids)} to {max(ids)}); their rows "
        f"start as the mean of the others, and the embedding has {max(before, needed)} rows "
        f"({before} before)"
    )


def resize_embeddings(model: Any, rows: int) -> None:
    """Embedding and head of ``rows`` rows; new ones at random."""
    import torch

    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight.requires_grad_(True)


def _vocabulary_tensors(model: Any) -> list[Any]:
    """Tensors with a row for each token: embedding, head (once where they are tied), its bias."""
    found: dict[int, Any] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def vocabulary_modules(model: Any) -> list[str]:
    """Names of the embedding and the head, those there are. Both of a tied pair: peft keeps a copy
    of each module that is trained whole."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = [module for module in modules if module is not None]
    return [name for name, each in model.named_modules() if any(each is one for one in wanted)]


def whole_modules(model: Any, wanted: Iterable[str]) -> list[str]:
    """Full names of the modules meant by ``wanted``, names or endings of names. Raises ValueError
    naming those that there are not."""
    names = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None and name
    ]
    found: list[str] = []
    for each in wanted:
        matching = [name for name in names if name == each or name.endswith(f".{each}")]
        if not matching:
            there = sorted({name.rsplit(".", 1)[-1] for name in names} - set("0123456789"))
            raise ValueError(
                f"LoRA modules_to_save: {each!r} matches no module of {type(model).__name__}; "
                f"there are: {', '.join(there)}"
            )
        found += matching
    return list(dict.fromkeys(found))
