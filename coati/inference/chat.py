"""A dialogue with a model: history, room for the answer, streaming."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from coati.inference.model_loading import stop_sequences
from coati.inference.stream import TextStream
from coati.models.generation.loop import Sampling, generate_streaming


class ChatSession:
    """Keeps the messages of one dialogue and answers the next question in its light.

    ``max_length``: tokens of prompt and answer together (never more than the model has positions).
    ``sampling`` decides how tokens are drawn, ``seed`` makes that repeatable. ``messages`` is the
    history, {role, content} each.
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
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        self.model, self.tokenizer, self.conversation = model, tokenizer, conversation
        self.max_length, self.max_new_tokens = min(max_length, positions), max_new_tokens
        self.sampling = sampling or Sampling(temperature=0.7)
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()
        self.stops = stop_sequences(tokenizer, conversation)
        self.clear()

    def clear(self) -> None:
        """Forget the dialogue; the system message stays."""
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # rounds left out since to make room
        self.cut = False  # whether the last answer ended at max_new_tokens instead of by itself

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece. An answer broken off half-way stays in the history as far as
        it came.

        Raises ValueError when the question alone leaves no room for an answer.
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
            if stream.text:
                self.messages.append({"role": "assistant", "content": stream.text})
            else:  # an empty turn would confuse the next prompt
                self.messages.pop()

    def _make_room(self, question: dict[str, str]) -> list[int]:
        """Add ``question`` and leave out the oldest rounds until prompt and answer fit; the
        prompt's token ids."""
        messages, left_out = [*self.messages, question], 0
        kept = int(
            messages[0]["role"] == "system"
        )  # rounds begin after a system message of the dialogue's own
        while True:
            prompt = self.conversation.encode_prompt(messages).input_ids
            if len(prompt) + self.max_new_tokens <= self.max_length:
                break
            if len(messages) == kept + 1:
                raise ValueError(
                    f"the question takes {len(prompt)} tokens and the answer up to "
                    f"{self.max_new_tokens} "
                    f"(--max_new_tokens), more than the {self.max_length} of --model_max_length or "
                    "of the model"
                )
            messages, left_out = messages[:kept] + messages[kept + 2 :], left_out + 1
        self.messages, self.forgotten = messages, self.forgotten + left_out
        return prompt
