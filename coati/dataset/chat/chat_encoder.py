"""Text to token ids, once, with the token range of each character span.

Control markers that stand inside a message are hidden behind private-use characters while the
template is rendered, and encoded as ordinary text afterward, so typing a marker cannot end a turn.
"""

import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from operator import itemgetter

from coati.dataset.chat.document_ends import start_of_document
from coati.dataset.chat.message_forms import (
    Messages,
    Tools,
    texts_of,
    with_texts,
    with_written_texts,
    written_texts,
)
from coati.dataset.chat.word_cache import Span, Words
from coati.dataset.rows.row_errors import RowError
from coati.utils.logging import get_logger

logger = get_logger(__name__)

CHECKED = 32  # texts of a process


def special_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that stand for control markers (never for ordinary added words such as
    ``<think>``)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(
        {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    )


class ChatEncoder:
    """Encodes rendered conversations with one tokenizer; ``end_of_assistant`` counts as a control
    marker."""

    def __init__(self, tokenizer, end_of_assistant: str = ""):
        self.tokenizer = tokenizer
        self.controls = {i: tokenizer.convert_ids_to_tokens(i) for i in special_ids(tokenizer)}
        self.end_of_assistant = end_of_assistant
        self._to_check = CHECKED
        texts = {*self.controls.values(), end_of_assistant}
        self.markers = sorted((t for t in texts if t), key=lambda t: (-len(t), t))
        self._pattern = re.compile("|".join(map(re.escape, self.markers)) or r"(?!)")

    def __getstate__(self) -> dict:
        # The Rust copies are rebuilt when needed.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_backends", "_words")
        }

    def hide(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[Messages, Tools | None, str | None]:
        """The messages and tools with each marker in their texts replaced by ``<key>index<key>``,
        and the key (None: no marker). The tags of thoughts stay what they are."""
        texts = list(texts_of([[written_texts(message) for message in messages], tools]))
        if not any(map(self._pattern.search, texts)):
            return messages, tools, None
        together = "".join(texts)
        key = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in together)

        def hidden(text: str) -> str:
            return self.hidden(text, key)

        return (
            [with_written_texts(message, hidden) for message in messages],
            with_texts(tools, hidden),
            key,
        )

    def hide_contents(self, messages: Messages) -> tuple[Messages, str | None]:
        """:meth:`hide` of messages that are but role and content."""
        for message in messages:
            if self._pattern.search(message["content"]):
                messages, _, key = self.hide(messages)
                return messages, key
        return messages, None

    def hidden(self, text: str, key: str) -> str:
        """``text`` with each marker in it replaced."""
        number = {text: index for index, text in enumerate(self.markers)}
        return self._pattern.sub(lambda found: f"{key}{number[found.group()]}{key}", text)

    def encode(
        self, text: str, spans: list[Span], key: str | None = None, others: Sequence[Span] = ()
    ) -> tuple[str, list[int], list[Span]]:
        """``(final text, input_ids, token range of each span)``.

        No token reaches over the beginning or the end of a span, nor over the beginning of the end
        marker in it: so a prompt has the ids that a row with its response begins with, and a
        response ends with the ids that generation stops at. ``spans`` count characters of ``text``,
        in which :meth:`hide`'s placeholders may stand; ``others`` are responses too, whose tokens
        are not asked for.
        """
        if not self.tokenizer.is_fast:
            return self._encode_slow(text, spans, key)
        borders = self._borders(text, [*spans, *others])
        if (
            key is None
            and self._words is not None
            and (found := self._words.encode(text, spans, borders))
        ):
            if self._sure_of(text, found[0]):
                return text, *found
        if key is None and not borders:
            return text, self._ids(text), []
        text, ids, offsets, spans = self._with_offsets(text, spans, key, others)
        return text, ids, self._token_ranges(offsets, spans)

    def encode_weighted(
        self,
        text: str,
        spans: list[Span],
        key: str | None,
        others: Sequence[Span],
        weights: list[tuple[Span, float]],
    ) -> tuple[str, list[int], list[Span], list[float]]:
        """:meth:`encode`, and one weight per token: the least of those of its characters, which
        ``weights`` give by spans of ``text``, later ones before earlier ones; 0 elsewhere. Raises
        RowError for a tokenizer without offsets."""
        if not self.tokenizer.is_fast:
            raise RowError(
                "marker_in_text",
                "a slow tokenizer cannot tell which tokens a weight is for; use a fast one "
                "(tokenizer.json)",
            )
        whole = text
        text, ids, offsets, spans = self._with_offsets(text, spans, key, others)
        by_character = [0.0] * len(text)
        for (start, end), weight in weights:
            if key is not None:
                start = self._shift(whole, start, key)
                end = self._shift(whole, end, key)
            by_character[start:end] = [weight] * (end - start)
        # A token of no width is a word-start mark: it counts as the character after it.
        weighed = [
            min(by_character[start : max(end, start + 1)], default=0.0) for start, end in offsets
        ]
        return text, ids, self._token_ranges(offsets, spans), weighed

    def _with_offsets(
        self, text: str, spans: list[Span], key: str | None, others: Sequence[Span]
    ) -> tuple[str, list[int], list[Span], list[Span]]:
        """``(final text, ids, characters of each token, spans in the final text)``."""
        encoded = self._backend(as_text=False).encode(text, add_special_tokens=False)
        ids = encoded.ids
        offsets = encoded.offsets
        if key is not None:
            tokens = self._reveal_sections(text, list(zip(ids, offsets, strict=True)), key)
            ids = [i for i, _ in tokens]
            offsets = [offset for _, offset in tokens]
            spans, others = (
                [(self._shift(text, s, key), self._shift(text, e, key)) for s, e in some]
                for some in (spans, others)
            )
            text = self.revealed(text, key)
        if crossed := self._crossed(offsets, self._borders(text, [*spans, *others])):
            tokens = self._cut(text, list(zip(ids, offsets, strict=True)), crossed)
            ids = [i for i, _ in tokens]
            offsets = [offset for _, offset in tokens]
        return text, ids, offsets, spans

    def encode_inside(self, text: str) -> list[int]:
        """The ids of a template's own ``text``, which stands in the middle of others."""
        if not self.tokenizer.is_fast:
            return self.tokenizer.encode(text, add_special_tokens=False)
        backend = self._backend(as_text=False, at_start=False, inside=True)
        return backend.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str, inside: bool = False) -> list[int]:
        """The ids of a text of which all is ordinary, control markers too. ``inside``: it goes on
        from another one, so that no word-start mark is put before it. Raises RowError."""
        if inside and self.tokenizer.is_fast:
            ids = self._backend(as_text=True, inside=True).encode(text, add_special_tokens=False)
            return self._without_controls(ids.ids)
        shown, key = self.hide_contents([{"role": "", "content": text}])
        return self.encode(shown[0]["content"], [], key)[1]

    def _without_controls(self, ids: list[int]) -> list[int]:
        if not (self.controls.keys() - {self.tokenizer.unk_token_id}).isdisjoint(ids):
            raise RowError(
                "marker_in_text", "this tokenizer has no way to spell the marker as ordinary text"
            )
        return ids

    def _sure_of(self, text: str, ids: list[int]) -> bool:
        """Whether the word cache gave the tokenizer's own ids. Checked on the first texts; once it
        did not, only the tokenizer is used, which is logged."""
        if not self._to_check:
            return True
        self._to_check -= 1
        if ids == self._ids(text):
            if self._words.spell(text) and self.decode(ids) != text:
                self._words.spell_bytes = False
            return True
        logger.warning_once(
            "the memory of words does not fit this tokenizer, which is asked for every row "
            "instead: slower"
        )
        self.__dict__["_words"] = None
        return False

    def _ids(self, text: str) -> list[int]:
        """The ids alone: offsets cost nearly as much as a short text's encoding."""
        backend = self._backend(as_text=False)
        if os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            # Elsewhere a batch, even of one, would start threads, after which a process must not
            # fork.
            return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return backend.encode(text, add_special_tokens=False).ids

    def _borders(self, text: str, spans: Sequence[Span]) -> set[int]:
        """Of spans, and of the end markers in them."""
        marker = self.end_of_assistant
        borders = {border for span in spans for border in span}
        borders |= {end - len(marker) for s, end in spans if text.endswith(marker, s, end)}
        return borders

    @staticmethod
    def _crossed(offsets: list[Span], borders: set[int]) -> list[int]:
        """Those of ``borders`` that lie inside a token."""
        crossed = []
        for border in sorted(borders):
            # The last token that begins before it.
            before = bisect_left(offsets, border, key=itemgetter(0)) - 1
            if before >= 0 and offsets[before][1] > border:
                crossed.append(border)
        return crossed

    def _cut(self, text: str, tokens: list, borders: list[int]) -> list:
        """``tokens`` with each stretch between control tokens that a border crosses encoded in
        pieces."""
        cut = []
        end = 0
        for special, run in self._runs(text, tokens):
            start, end = run[0][1][0] if special else end, run[-1][1][1]
            inside = [border for border in borders if start < border < end]
            if not inside:
                cut += run
                continue
            if not special:
                cut += self._encode_piece(text, start, inside[0], inside=False)
                cut += self._encode_pieces(text, [*inside, end])
                continue
            for token, (first, last) in run:
                # A control token that takes in the white space after it gives back what lies beyond
                # the border.
                own = [border for border in inside if first < border < last]
                cut.append((token, (first, own[0] if own else last)))
                cut += self._encode_pieces(text, [*own, last]) if own else []
        return cut

    def _encode_pieces(self, text: str, edges: list[int]) -> list:
        pairs = zip(edges, edges[1:], strict=False)
        return [
            token
            for start, end in pairs
            for token in self._encode_piece(text, start, end, inside=True)
        ]

    def _encode_piece(self, text: str, start: int, end: int, inside: bool) -> list:
        backend = self._backend(as_text=True, at_start=start == 0, inside=inside)
        encoded = backend.encode(text[start:end], add_special_tokens=False)
        return [
            (i, (s + start, e + start))
            for i, (s, e) in zip(encoded.ids, encoded.offsets, strict=True)
        ]

    def _runs(self, text: str, tokens: list) -> Iterator[tuple[bool, list]]:
        """Control tokens and the stretches between them, in turn."""
        # An unknown character has a special id too, but another text.
        for special, run in groupby(
            tokens, key=lambda t: self.controls.get(t[0]) == text[t[1][0] : t[1][1]].strip()
        ):
            yield special, list(run)

    @staticmethod
    def _token_ranges(offsets: list[Span], spans: list[Span]) -> list[Span]:
        ranges = []
        for start, end in spans:
            first = bisect_right(offsets, start, key=itemgetter(1))
            # A token of no width is a word-start mark that the tokenizer inserted: it belongs to
            # what follows.
            while first > 0 and offsets[first - 1][0] >= start:
                first -= 1
            ranges.append((first, bisect_left(offsets, end, key=itemgetter(0))))
        return ranges

    def revealed(self, text: str, key: str) -> str:
        """``text`` with its markers back in place of what :meth:`hide` put there."""
        # A template may write texts as JSON or as Python does, with escapes for the key.
        escapes = (key, json.dumps(key)[1:-1], f"\\U{ord(key):08x}")
        hidden = "|".join(rf"{re.escape(one)}(\d+){re.escape(one)}" for one in escapes)
        return re.sub(hidden, lambda found: self.markers[int(found[found.lastindex])], text)

    def _shift(self, text: str, position: int, key: str) -> int:
        return len(self.revealed(text[:position], key))

    def _reveal_sections(self, text: str, tokens: list, key: str) -> list:
        """Encode again, as plain text, each stretch between control tokens that holds a
        placeholder."""
        revealed = []
        end = 0
        for special, run in self._runs(text, tokens):
            start, end = run[0][1][0] if special else end, run[-1][1][1]
            moved = self._shift(text, start, key)
            if special or self.revealed(text[start:end], key) == text[start:end]:
                revealed += [(i, (s - start + moved, e - start + moved)) for i, (s, e) in run]
                continue
            backend = self._backend(as_text=True, at_start=start == 0)
            encoded = backend.encode(self.revealed(text[start:end], key), add_special_tokens=False)
            self._without_controls(encoded.ids)
            revealed += [
                (i, (s + moved, e + moved))
                for i, (s, e) in zip(encoded.ids, encoded.offsets, strict=True)
            ]
        return revealed

    @cached_property
    def document_start(self) -> list[int]:
        """See :func:`start_of_document`. Raises ValueError without eos token."""
        return start_of_document(self.tokenizer)

    @cached_property
    def _words(self) -> Words | None:
        return Words.of(self._backend(as_text=False))

    @cached_property
    def _backends(self) -> dict:
        return {}

    def _backend(self, as_text: bool, at_start: bool = True, inside: bool = False):
        """A private copy of the Rust tokenizer: exact offsets, no padding or truncation set by
        other callers.

        ``inside``: for text in the middle of a stretch, where no word-start mark is put.
        """
        if (as_text, at_start, inside) not in self._backends:
            from tokenizers import Tokenizer

            layout = json.loads(self.tokenizer.backend_tokenizer.to_str())
            layout["truncation"] = layout["padding"] = None
            _set_everywhere(layout["post_processor"], "trim_offsets", False)
            _set_everywhere(layout["pre_tokenizer"], "trim_offsets", False)
            if not at_start and '"first"' in json.dumps(layout["pre_tokenizer"]):
                # "first" adds the word-start mark at the beginning of the text only, and this piece
                # is not there.
                _set_everywhere(layout["pre_tokenizer"], "prepend_scheme", "never")
            if inside:
                _set_everywhere(layout["pre_tokenizer"], "prepend_scheme", "never")
                _set_everywhere(layout["pre_tokenizer"], "add_prefix_space", False)
                layout["normalizer"] = _without_prepend(layout["normalizer"])
            copy = Tokenizer.from_str(json.dumps(layout))
            copy.encode_special_tokens = as_text
            self._backends[as_text, at_start, inside] = copy
        return self._backends[as_text, at_start, inside]

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids`` with control tokens, untouched by clean-up of spaces."""
        if self.tokenizer.is_fast:
            return self._backend(as_text=False).decode(ids, skip_special_tokens=False)
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def spells(self, text: str) -> bool:
        """Whether the ids that :meth:`encode` gives for ``text`` decode to it, and those of a span
        to the characters of the span."""
        words = self._words if self.tokenizer.is_fast else None
        return words is not None and words.spell(text)

    def _encode_slow(
        self, text: str, spans: list[Span], key: str | None
    ) -> tuple[str, list[int], list[Span]]:
        """Without offsets: the ids of each prefix are compared with those of the whole text."""
        logger.warning_once(
            f"{type(self.tokenizer).__name__} is a slow tokenizer without character offsets: masks "
            "come from encoding prefixes of each row, right but many times slower; a "
            "tokenizer.json gives the fast way"
        )
        if key is not None:
            raise RowError(
                "marker_in_text", "a slow tokenizer cannot do it; use a fast one (tokenizer.json)"
            )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return (
            text,
            ids,
            [(self._prefix(ids, text[:s])[0], sum(self._prefix(ids, text[:e]))) for s, e in spans],
        )

    def _prefix(self, ids: list[int], text: str) -> Span:
        """How many leading tokens of ``ids`` are those of ``text``, and 1 if a token reaches over
        its end."""
        part = self.tokenizer.encode(text, add_special_tokens=False)
        same = next(
            (n for n, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b),
            min(len(part), len(ids)),
        )
        return same, int(same < len(part))


def _without_prepend(normalizer: dict | None) -> dict | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    return normalizer | {
        "normalizers": [one for one in normalizer["normalizers"] if one["type"] != "Prepend"]
    }


def _set_everywhere(node, name: str, value) -> None:
    if isinstance(node, dict):
        if name in node:
            node[name] = value
        for child in node.values():
            _set_everywhere(child, name, value)
    elif isinstance(node, list):
        for child in node:
            _set_everywhere(child, name, value)
