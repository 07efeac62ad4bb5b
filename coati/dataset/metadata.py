"""What prepared rows were made with, for their report: command, tokenizer and template."""

from typing import Any

from coati.dataset.chat.conversation import Conversation


def describe_tokenizer(tokenizer, name: str, fingerprint: str) -> dict[str, Any]:
    """The tokenizer of a report; ``name``: what the user called it."""
    return {
        "path": name or getattr(tokenizer, "name_or_path", ""),
        "vocab_size": len(tokenizer),
        "fingerprint": fingerprint,
        "probe": probe_tokens(tokenizer),
    }


# Words, numbers, white space, scripts and marks that tokenizers have treated differently.
PROBE = "Probe 12 345,6\n\tcafé 你好 can't  👩\u200d👧 …\r\n"


def probe_tokens(tokenizer) -> list[int]:
    """Ids of a short text, by which prepared rows know the tokenizer again under another release
    of its library."""
    return tokenizer.encode(PROBE, add_special_tokens=False)


def describe_template(template: Conversation) -> dict[str, Any]:
    """The fields of the template, its stop sequences as text too, and what is learned of a row
    where that is not the default."""
    stops = [template.encoder.decode(ids) for ids in template.stop_ids]
    options = template.options.named()
    return template.to_config() | {"stop_texts": stops} | ({"options": options} if options else {})
