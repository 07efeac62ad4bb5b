"""An encoded conversation: token ids, and which of them are learned."""

from collections.abc import Callable
from dataclasses import dataclass

from coati.dataset.chat.word_cache import Span
from coati.dataset.rows.row_errors import RowError

Decode = Callable[[list[int]], str]


@dataclass
class Encoded:
    """One encoded text: ``input_ids`` and ``loss_mask`` of equal length, ``spans`` the token range
    of each response.

    ``weights``: of each token, where the tokens of responses do not all count alike. ``notes``:
    what is counted of the row, names of dialogue.py. ``written``: the characters of each response
    in ``text``, where the ids decode to just these (ChatEncoder.spells); None: they are decoded.
    """

    input_ids: list[int]
    text: str
    spans: list[Span]
    truncated: bool = False
    weights: list[float] | None = None
    notes: frozenset[str] = frozenset()
    written: list[Span] | None = None

    @property
    def loss_mask(self) -> list[bool]:
        mask = [False] * len(self.input_ids)
        for start, end in self.spans:
            mask[start:end] = (
                [True] * (end - start)
                if self.weights is None
                else [weight > 0 for weight in self.weights[start:end]]
            )
        return mask

    def responses(self) -> list[list[int]]:
        """The supervised ids, one list per response."""
        if self.weights is None:
            return [self.input_ids[start:end] for start, end in self.spans]
        mask = self.loss_mask
        return [
            [token for token, kept in zip(self.input_ids[s:e], mask[s:e], strict=True) if kept]
            for s, e in self.spans
        ]

    def decoded(self, decode: Decode) -> str:
        """The text of the ids up to the end of the last response."""
        if self.written is not None:
            return self.text[: self.written[-1][1]]
        return decode(self.input_ids[: self.spans[-1][1]])

    def decoded_responses(self, decode: Decode) -> list[str]:
        """The text of each response."""
        if self.written is not None:
            return [self.text[start:end] for start, end in self.written]
        return [decode(response) for response in self.responses()]

    def cut(self, max_length: int) -> "Encoded":
        """The first complete rounds that fit into ``max_length`` tokens. Raises RowError when not
        one does."""
        if len(self.input_ids) <= max_length:
            return self
        kept = [span for span in self.spans if span[1] <= max_length]
        if not kept:
            needed = self.spans[0][1] if self.spans else len(self.input_ids)
            raise RowError("too_long", f"{needed} tokens are needed, max_length is {max_length}")
        return Encoded(
            self.input_ids[: kept[-1][1]],
            self.text,
            kept,
            truncated=len(kept) < len(self.spans),
            weights=self.weights and self.weights[: kept[-1][1]],
            written=self.written and self.written[: len(kept)],
        )
