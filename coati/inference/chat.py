"""A conversation with a model: history, context length, streaming."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import nn

from coati.dataset.chat.response_format import response_format
from coati.dataset.chat.response_parts import CONTENT, Part, Reply
from coati.inference.stream import TextStream
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.loop import generate_streaming
from coati.models.generation.sampling import Sampling
from coati.models.positions import within_positions


class ChatSession:
    """One conversation: ``messages``, {role, content} each, and the response to the next one. Of a
    response ``reasoning_content`` is the thought, ``thought_marks`` are what the model wrote around
    it, and ``tool_calls`` are the calls, read back by the template that writes them.

    Args:
        max_length: tokens of prompt and response together (never more than the model has
            positions); the oldest rounds are left out to stay below it.
        sampling: how tokens are drawn, by default at temperature 0.7.
        seed: makes the drawing repeatable.
        tools: schemas of functions that may be called; their results are given by
            :meth:`give_result`.

    Raises ValueError for tools that the template has no place for.
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
        tools: Sequence[dict[str, Any]] = (),
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
        self.format = response_format(conversation)
        self.use_tools(tools)
        self.clear()

    def use_tools(self, tools: Sequence[dict[str, Any]]) -> None:
        """Let ``tools`` be called from now on. Raises ValueError where the template has no place
        for them."""
        if tools and (lacking := self.format.lacking(self.conversation.abilities)):
            raise ValueError(f"tools: this model's chat template has none: {lacking}")
        self.tools = list(tools)

    def clear(self) -> None:
        """Begin a new conversation; the system message stays."""
        self.messages: list[dict[str, Any]] = []
        self.forgotten = 0  # rounds left out to make room
        self.cut = False  # whether the last response ended at max_new_tokens
        self.empty = False  # whether it had no text

    def ask(self, question: str) -> Generator[str, None, None]:
        """The content of the response as it comes; its thought and its calls are in the last of
        ``messages``. See :meth:`respond`."""
        return self._contents(self.respond(question))

    @staticmethod
    def _contents(parts: Generator[Part, None, None]) -> Generator[str, None, None]:
        try:
            for part in parts:
                if part.kind == CONTENT:
                    yield part.text
        finally:
            parts.close()

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """The calls of the last response that have no result yet, {name, arguments} each."""
        given = 0
        for message in reversed(self.messages):
            if message["role"] != "tool":
                calls = message.get("tool_calls", ())
                return [call["function"] for call in calls[given:]]
            given += 1
        return []

    def give_result(self, text: str) -> None:
        """Add the result of the first of :attr:`open_calls`."""
        self.messages.append({"role": "tool", "content": text, "name": self.open_calls[0]["name"]})

    def respond(self, question: str | None) -> Generator[Part, None, None]:
        """The parts of the response as they come; None: to the results of calls. One that is broken
        off stays in the history as far as it came.

        Raises ValueError when the question alone leaves no room for a response.
        """
        asked = [] if question is None else [{"role": "user", "content": question}]
        input_ids, prompt = self._make_room(asked)
        shown = self.format.shown_of_calls if self.tools else self.format.shown
        stream = TextStream(self.tokenizer, self.stops, shown=shown)
        reader = self.format.reader(prompt, self.tools)
        reply = Reply()
        tokens = generate_streaming(
            self.model,
            torch.tensor([input_ids], device=self.device),
            stop_sequences=self.stops,
            max_new_tokens=self.max_new_tokens,
            generator=self.generator,
            frozen=True,
            **vars(self.sampling),
        )
        ended = False
        try:
            for token in tokens:
                if parts := reader.push(stream.push(token)):
                    reply.add(parts)
                    yield from parts
            parts = reader.push(stream.finish(), final=True)
            ended = True
            reply.add(parts)
            yield from parts
        finally:
            if not ended:
                reply.add(reader.push("", final=True))
            reply.marks = reader.marks
            self.cut = not stream.stopped
            self.empty = not (reply.content or reply.calls or reply.thought)
            if self.empty:  # an empty turn would confuse the next prompt
                del self.messages[len(self.messages) - len(asked) :]
            else:
                self.messages.append(reply.message())

    def _make_room(self, asked: list[dict[str, Any]]) -> tuple[list[int], str]:
        """Add what is ``asked`` and leave out the oldest rounds until prompt and response fit; the
        prompt's token ids and text."""
        messages = [*self.messages, *asked]
        forgotten = self.forgotten
        kept = int(messages[0]["role"] == "system")  # the rounds begin after it
        while True:
            encoded = self.conversation.encode_prompt(messages, tools=self.tools or None)
            prompt = encoded.input_ids
            if len(prompt) + self.max_new_tokens <= self.max_length:
                break
            following = _next_round(messages, kept)
            if following is None:
                raise ValueError(
                    f"the question takes {len(prompt)} tokens and the response up to "
                    f"{self.max_new_tokens} (--max_new_tokens), more than the {self.max_length} of "
                    "--model_max_length or of the model; shorten the question or lower "
                    "--max_new_tokens"
                )
            messages = messages[:kept] + messages[following:]
            forgotten += 1
        self.messages = messages
        self.forgotten = forgotten
        return prompt, encoded.text


def _next_round(messages: Sequence[dict[str, Any]], first: int) -> int | None:
    """Where the round after that of message ``first`` begins: with the next question; None: there
    is none."""
    questions = (k for k in range(first + 1, len(messages)) if messages[k]["role"] == "user")
    return next(questions, None)
