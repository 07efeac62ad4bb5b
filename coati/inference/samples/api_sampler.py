"""Responses of any OpenAI-compatible server, asked for by chat completions. Its template, its
tokenizer and its noise are its own; a seed goes along with each request."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from coati.dataset.rows.thoughts import CLOSE, OPEN
from coati.inference.evaluate.generate_responses import Prompt, SamplingConfig, Skipped, noise_of
from coati.inference.samples.samplers import Draw, Drawn, Keep
from coati.rewards.background import map_bounded
from coati.rewards.endpoint import bearer, post_json
from coati.rewards.failures import Rejected, Unreachable

KEY_VARIABLE = "COATI_API_KEY"
NEWER = "max_completion_tokens"  # what OpenAI's reasoning models take in place of max_tokens


class ApiSampler:
    """A :class:`~coati.inference.samples.samplers.Sampler` that asks the model ``name`` of the
    server at ``url``. Raises ValueError for a key in the environment that is none."""

    def __init__(
        self,
        url: str,
        name: str,
        config: SamplingConfig,
        tags: dict | None = None,
        timeout: float = 600.0,
    ) -> None:
        whole = url.rstrip("/")
        self.url = whole if whole.endswith("/chat/completions") else f"{whole}/chat/completions"
        self.name = name
        self.config = config
        self.tags = tags
        self.timeout = timeout
        self.headers = bearer(KEY_VARIABLE)
        self.facts: dict[str, Any] = {"api_url": url, "api_model": name}
        self._limit = "max_tokens"

    def ready(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Skipped]]:
        """All: the server knows what it has room for."""
        return list(prompts), []

    def prompt_text(self, prompt: Prompt) -> str:
        """The messages, since the server renders them."""
        return "\n".join(f"{each['role']}: {each['content']}" for each in prompt.messages)

    def draw(self, wanted: Sequence[Draw], keep: Keep) -> None:
        """As many requests at a time as ``config.batch_size``; each response is kept when it comes.

        Raises ValueError naming the prompt of a request that fails.
        """

        def ask(index: int) -> None:
            keep([self._ask(wanted[index])])

        map_bounded(ask, len(wanted), self.config.batch_size)

    def _ask(self, draw: Draw) -> Drawn:
        place = f"{draw.prompt.place}: --api_url {self.url}"
        try:
            found = self._posted(self._body(draw))
        except (Rejected, Unreachable) as error:
            raise ValueError(f"{place} {error}") from error
        try:
            choice = found["choices"][0]
            said = choice["message"]
            content = said.get("content") or ""
            calls, unreadable = _calls(said.get("tool_calls") or ())
            tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            shown = json.dumps(found)[:160]
            raise ValueError(
                f"{place} answered {shown}; expected OpenAI's chat completion"
            ) from error
        # What the model made of a call, cut off or wrong: its own words, not the server's.
        content = "\n".join(filter(None, [content, *unreadable]))
        thought = said.get("reasoning_content") or said.get("reasoning") or ""
        message = {"role": "assistant", "content": content}
        message |= {"reasoning_content": thought} if thought else {}
        message |= {"tool_calls": calls} if calls else {}
        return Drawn(
            draw.prompt.number,
            draw.sample,
            self._text(content, thought),
            tokens,
            choice.get("finish_reason") != "length" and not unreadable,
            message,
        )

    def _text(self, content: str, thought: str) -> str:
        """The response as a model writes it, for rewards that look for tags."""
        if not thought:
            return content
        if not self.tags:
            return f"{OPEN}{thought}{CLOSE}{content}"
        start = self.tags["think_start"]
        opening = start["text"] if start.get("num_occur", 1) else ""  # else the prompt opens it
        return f"{opening}{thought}{self.tags['think_end']['text']}{content}"

    def _body(self, draw: Draw) -> dict[str, Any]:
        sampling = self.config.sampling
        noise = noise_of([draw.prompt], [draw.sample], replace(self.config, max_new_tokens=1))
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_as_openai(message) for message in draw.prompt.messages],
            "temperature": sampling.temperature if sampling.do_sample else 0.0,
            "top_p": sampling.top_p,
            "seed": int(float(noise[0, 0]) * 2**31),
        }
        # Not OpenAI's: servers that have them name them so.
        more = {"top_k": sampling.top_k, "repetition_penalty": sampling.repetition_penalty}
        body |= {name: value for name, value in more.items() if value and value != 1}
        body |= {"tools": draw.prompt.tools} if draw.prompt.tools else {}
        return body

    def _posted(self, body: Mapping[str, Any]) -> Any:
        limit = self._limit
        whole = {**body, limit: self.config.max_new_tokens}
        try:
            return post_json(self.url, whole, timeout=self.timeout, headers=self.headers)
        except Rejected as error:
            if limit == NEWER or NEWER not in str(error):
                raise
            self._limit = NEWER
            return self._posted(body)


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the interface takes it: arguments of calls are JSON texts."""
    named = ("role", "content", "name", "tool_call_id", "reasoning_content")
    found = {name: message[name] for name in named if name in message}
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [
            {
                "id": call.get("id", f"call_{number}"),
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for number, call in enumerate(calls)
        ]
    return found


def _calls(said: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The calls of a message; where the arguments of one cannot be read, none, and all as texts."""
    try:
        return [_call(one) for one in said], []
    except json.JSONDecodeError:
        return [], [f"{one['function']['name']}({one['function']['arguments']})" for one in said]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as a message of a conversation holds it."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    named = {"name": function["name"], "arguments": arguments}
    found = {"type": "function", "function": named}
    return found | ({"id": call["id"]} if call.get("id") else {})
