"""Streamed text without its stop sequence."""

from collections.abc import Sequence

from coati.models.generation.detokenize import Detokenizer


class TextStream:
    """Takes token ids one by one and returns the text that is certain.

    Ids that may begin a stop sequence are held back, and what a later token may still change
    (:class:`~coati.models.generation.detokenize.Detokenizer`). ``text`` is what has been returned
    so far, ``ids`` everything that was taken. ``before``: ids that the response continues;
    ``shown``: special tokens that are part of the text.
    """

    def __init__(
        self,
        tokenizer,
        stop_sequences: Sequence[Sequence[int]] = (),
        before: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.stops = [list(stop) for stop in stop_sequences]
        self.ids: list[int] = []
        self._text = Detokenizer(tokenizer, before=before, shown=shown)
        self._passed = 0  # ids that were passed on
        self._longest = max(map(len, self.stops), default=0)

    @property
    def text(self) -> str:
        return self._text.text

    def push(self, token: int) -> str:
        """The text that became certain with ``token``, often empty."""
        self.ids.append(token)
        return self._pass_on(len(self.ids) - self._held())

    def finish(self) -> str:
        """The rest: what was held back, but for a complete stop sequence at the end."""
        return self._pass_on(len(self.ids) - self._stop_length()) + self._text.finish()

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence has been completed."""
        return self._stop_length() > 0

    def _pass_on(self, end: int) -> str:
        new = self.ids[self._passed : end]
        self._passed = max(self._passed, end)
        return "".join([self._text.push(token) for token in new])

    def _stop_length(self) -> int:
        return max((len(stop) for stop in self.stops if self.ids[-len(stop) :] == stop), default=0)

    def _held(self) -> int:
        """How many of the last ids are the beginning of a stop sequence, or all of one."""
        for count in range(min(self._longest, len(self.ids)), 0, -1):
            if any(stop[:count] == self.ids[-count:] for stop in self.stops):
                return count
        return 0
