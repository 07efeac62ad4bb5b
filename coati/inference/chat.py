"""A conversation with a model: history, context length, streaming."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from coati.inference.stream import TextStream
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.loop import generate_streaming
from coati.models.generation.sampling import Sampling
from coati.models.positions import within_positions


class ChatSession:
    """One conversation: ``messages``, {role, content} each, and the response to the next one.

    Args:
        max_length: tokens of prompt and response together (never more than the model has
            positions); the oldest rounds are left out to stay below it.
        sampling: how tokens are drawn, by default at temperature 0.7.
        seed: makes the drawing repeatable.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        conversation: Any,
        *,
        max_length: int = 2048,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.conversation = conversation
        self.max_length = within_positions(model.config, max_length)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling(temperature=0.7)
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()
        self.stops = stop_sequences(conversation.stop_ids, tokenizer, model)
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation; the system message stays."""
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # rounds left out to make room
        self.cut = False  # whether the last response ended at max_new_tokens
        self.empty = False  # whether it had no text

    def ask(self, question: str) -> Iterator[str]:
        """The response as it comes. One that is broken off stays in the history as far as it came.

        Raises ValueError when the question alone leaves no room for a response.
        """
        input_ids = self._make_room({"role": "user", "content": question})
        stream = TextStream(self.tokenizer, self.stops)
        tokens = generate_streaming(
            self.model,
            torch.tensor([input_ids], device=self.device),
            stop_sequences=self.stops,
            max_new_tokens=self.max_new_tokens,
            generator=self.generator,
            **vars(self.sampling),
        )
        try:
            for token in tokens:
                if piece := stream.push(token):
                    yield piece
            if piece := stream.finish():
                yield piece
        finally:
            self.cut = not stream.stopped
            self.empty = not stream.text
            if stream.text:
                self.messages.append({"role": "assistant", "content": stream.text})
            else:  # an empty turn would confuse the next prompt
                self.messages.pop()

    def _make_room(self, question: dict[str, str]) -> list[int]:
        """Add ``question`` and leave out the oldest rounds until prompt and response fit; the
        prompt's token ids."""
        messages = [*self.messages, question]
        forgotten = self.forgotten
        kept = int(messages[0]["role"] == "system")  # the rounds begin after it
        while True:
            prompt = self.conversation.encode_prompt(messages).input_ids
            if len(prompt) + self.max_new_tokens <= self.max_length:
                break
            if len(messages) == kept + 1:
                raise ValueError(
                    f"the question takes {len(prompt)} tokens and the response up to "
                    f"{self.max_new_tokens} (--max_new_tokens), more than the {self.max_length} of "
                    "--model_max_length or of the model; shorten the question or lower "
                    "--max_new_tokens"
                )
            messages = messages[:kept] + messages[kept + 2 :]
            forgotten += 1
        self.messages = messages
        self.forgotten = forgotten
        return prompt
