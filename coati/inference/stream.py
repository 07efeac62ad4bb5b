"""Incremental detokenization: never half a character, never a stop sequence."""


class TextStream:
    """Takes token ids one by one and returns the text that is certain.

    Ids that may begin a stop sequence, and bytes that do not make a whole character yet, are held
    back. ``text`` is what has been returned so far, ``ids`` everything that was taken.
    """

    def __init__(self, tokenizer, stop_sequences: list[list[int]] = ()):
        self.tokenizer = tokenizer
        self.stops = [list(stop) for stop in stop_sequences]
        self.ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """The text that became certain with ``token``, often empty."""
        self.ids.append(token)
        return self._advance(self.ids[: len(self.ids) - self._held()], final=False)

    def finish(self) -> str:
        """The rest: what was held back, but for a complete stop sequence at the end."""
        return self._advance(self.ids[: len(self.ids) - self._stop_length()], final=True)

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence has been completed."""
        return self._stop_length() > 0

    def _advance(self, ids: list[int], final: bool) -> str:
        # Decoded from the start each time: a token's text may depend on the one before it.
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not final:
            whole = whole.rstrip("\ufffd")
        if not whole.startswith(self.text):
            # a tokenizer that changes earlier text with later tokens; wait until it agrees again
            return ""
        new = whole[len(self.text) :]
        self.text = whole
        return new

    def _stop_length(self) -> int:
        return max((len(stop) for stop in self.stops if self.ids[-len(stop) :] == stop), default=0)

    def _held(self) -> int:
        """How many of the last ids are the beginning of a stop sequence, or all of one."""
        longest = max(map(len, self.stops), default=0)
        for count in range(min(longest, len(self.ids)), 0, -1):
            if any(stop[:count] == self.ids[-count:] for stop in self.stops):
                return count
        return 0
