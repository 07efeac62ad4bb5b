"""Request and response bodies of OpenAI's text completions."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from coati.inference.serve.not_served import Refused
from coati.inference.serve.protocol import OpenAIRequest, Text, Usage, Whole
from coati.inference.serve.token_logprobs import MOST_ALTERNATIVES, TokenLogprob

DEFAULT_NEW_TOKENS = 16  # as OpenAI documents


class CompletionRequest(OpenAIRequest):
    """The body of POST /v1/completions. ``prompt``: a text or token ids, or a list of either."""

    prompt: Text | list[Whole] | list[Text] | list[list[Whole]] | None = None
    logprobs: Whole | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises Refused for an empty one."""
        given = self.prompt
        one = isinstance(given, str) or (
            isinstance(given, list) and given and type(given[0]) is int
        )
        prompts = [given] if one else list(given or [])
        if not prompts or not all(prompts):
            raise Refused(400, "prompt is empty; send a text or token ids", param="prompt")
        return prompts

    def asked(self) -> tuple[str, int | None]:
        unlimited = self.max_tokens is None and "max_tokens" in self.model_fields_set
        if self.max_tokens is None and not unlimited:
            return "max_tokens", DEFAULT_NEW_TOKENS
        return super().asked()

    def alternatives(self) -> int | None:
        return self.logprobs


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


def text_logprobs(scored: Sequence[TokenLogprob]) -> TextLogprobs:
    return TextLogprobs(
        tokens=[each.token.text for each in scored],
        token_logprobs=[each.logprob for each in scored],
        top_logprobs=[
            {token.text: logprob for token, logprob in each.alternatives} for each in scored
        ],
        text_offset=[each.offset for each in scored],
    )
