"""Engines that draw responses to prompts: the model in this process, vLLM in it, and rollout
servers; api_sampler.py asks any OpenAI-compatible server.

A response is known by its prompt's number and its own among the responses to that prompt. Its noise
belongs to these and the seed, so that it does not depend on what is drawn beside it, before it or
in an earlier start.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from coati.dataset.chat.encoded import Encoded
from coati.dataset.chat.response_format import response_format
from coati.experience_maker.rollouts.model_facts import difference, facts_of
from coati.experience_maker.rollouts.rollout_client import (
    RolloutServer,
    Row,
    ServerFailed,
    Wanted,
    cut,
)
from coati.experience_maker.rollouts.vllm_rollout import vllm_parameters
from coati.inference.evaluate.generate_responses import (
    Prompt,
    Response,
    SamplingConfig,
    Skipped,
    encoded_prompts,
    noise_of,
    response_of,
    sample_batch,
)
from coati.inference.model_loading import Loaded
from coati.inference.stream import TextStream
from coati.models.generation.end_tokens import stop_sequences
from coati.models.ilql_heads import FILE as HEADS
from coati.models.loading import adapter_base, find_model, load_configuration
from coati.models.positions import within_positions
from coati.rewards.background import map_bounded
from coati.utils.file_samples import sampled_hash


@dataclass(frozen=True)
class Draw:
    """What is asked for: the ``sample``-th response to ``prompt``."""

    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Drawn:
    """One response. ``number``: its prompt's; ``tokens``: how many it has, its stop sequence
    included; ``message``: as a message of a conversation."""

    number: int
    sample: int
    text: str
    tokens: int
    stopped: bool
    message: dict[str, Any]


Keep = Callable[[Sequence[Drawn]], None]


class Sampler(Protocol):
    """``tags``: response_format_tags of its template. ``facts``: what decides its responses beside
    the prompts, as JSON."""

    tags: dict | None
    facts: dict[str, Any]

    def ready(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Skipped]]:
        """The prompts that it can be asked, and why not the others."""
        ...

    def draw(self, wanted: Sequence[Draw], keep: Keep) -> None:
        """Draw what is ``wanted``; ``keep`` is given responses as they come, in any order. Raises
        ValueError for what fails, after those that came have been kept."""
        ...

    def prompt_text(self, prompt: Prompt) -> str:
        """What the model is given for ``prompt``."""
        ...


class TemplateSampler:
    """What the engines share that are given token ids: template, stop sequences, room for
    prompts."""

    def __init__(
        self, conversation: Any, tokenizer: Any, config: SamplingConfig, model: Any
    ) -> None:
        """``model``: what has the ``config`` and the ``generation_config`` of the model."""
        self.conversation = conversation
        self.tokenizer = tokenizer
        self.config = config
        self.stops = stop_sequences(conversation.stop_ids, tokenizer, model)
        self.room = within_positions(model.config, config.max_length) - config.max_new_tokens
        self.tags = conversation.response_format_tags
        self.format = response_format(conversation)
        self.facts: dict[str, Any] = {}
        self._encoded: dict[int, Encoded] = {}

    def ready(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Skipped]]:
        """See :class:`Sampler`."""
        found, skipped = encoded_prompts(self.conversation, prompts, self.room)
        self._encoded = {prompt.number: encoded for prompt, encoded in found}
        return [prompt for prompt, _ in found], skipped

    def prompt_text(self, prompt: Prompt) -> str:
        """See :class:`Sampler`."""
        return self._encoded[prompt.number].text

    def message_of(self, prompt: Prompt, tokens: Sequence[int]) -> dict[str, Any]:
        """A response as the template reads it back, as in a chat: thought, content and calls of
        tools, without control tokens that are none of these."""
        shown = self.format.shown_of_calls if prompt.tools else self.format.shown
        stream = TextStream(self.tokenizer, self.stops, shown=shown)
        text = "".join([stream.push(token) for token in tokens]) + stream.finish()
        return self.format.read(text, self.prompt_text(prompt), prompt.tools or ()).message()

    def _drawn(self, draw: Draw, response: Response) -> Drawn:
        message = self.message_of(draw.prompt, response.ids)
        return Drawn(
            draw.prompt.number,
            draw.sample,
            response.text,
            response.tokens,
            response.stopped,
            message,
        )

    def _of_tokens(self, draw: Draw, tokens: list[int], stopped: bool) -> Drawn:
        text = self.prompt_text(draw.prompt)
        return self._drawn(draw, response_of(self.tokenizer, text, tokens, self.stops, stopped))

    def _by_length(self, wanted: Sequence[Draw]) -> list[Draw]:
        """Batches of like length, the responses to a prompt side by side."""
        return sorted(wanted, key=lambda one: (self._length(one), one.prompt.number, one.sample))

    def _length(self, one: Draw) -> int:
        return len(self._encoded[one.prompt.number].input_ids)


class ModelSampler(TemplateSampler):
    """The model in this process."""

    def __init__(self, loaded: Loaded, config: SamplingConfig) -> None:
        super().__init__(loaded.conversation, loaded.tokenizer, config, loaded.model)
        self.loaded = loaded

    def draw(self, wanted: Sequence[Draw], keep: Keep) -> None:
        """See :class:`Sampler`."""
        ordered = self._by_length(wanted)
        for start in range(0, len(ordered), self.config.batch_size):
            batch = ordered[start : start + self.config.batch_size]
            pairs = [(one.prompt, self._encoded[one.prompt.number]) for one in batch]
            samples = [one.sample for one in batch]
            responses = sample_batch(self.loaded, pairs, samples, self.config)
            keep([self._drawn(one, each) for one, each in zip(batch, responses, strict=True)])


class ServerSampler(TemplateSampler):
    """Servers of ``coati rollout-server``, which are sent token ids: the library's own sampler
    draws what the model in this process would, vLLM takes a seed for each response."""

    def __init__(
        self,
        urls: Sequence[str],
        parts: Loaded,
        config: SamplingConfig,
        token: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        """``parts``: tokenizer and template, and in place of the model its configurations. Raises
        ValueError for servers that do not answer, or serve another model."""
        super().__init__(parts.conversation, parts.tokenizer, config, parts.model)
        self.servers = [RolloutServer(url, token=token, timeout=timeout) for url in urls]
        for server in self.servers:
            try:
                server.connect()
            except ServerFailed as error:
                raise ValueError(f"--rollout_url {error}") from error
            self._check(server, facts_of(parts.model.config))
        engines = sorted({str(server.facts.get("engine")) for server in self.servers})
        self.facts = {"engines": engines, "served": sorted(str(s.model) for s in self.servers)}

    def _check(self, server: RolloutServer, ours: dict[str, Any]) -> None:
        if found := difference(server.facts.get("facts") or {}, ours):
            raise ValueError(f"--rollout_url {server.url} serves another model: {found}")
        most = server.facts.get("max_model_len")
        if most is not None:
            self.room = min(self.room, most - self.config.max_new_tokens)

    def draw(self, wanted: Sequence[Draw], keep: Keep) -> None:
        """See :class:`Sampler`. A server has one request at a time, vLLM a batch of them."""
        chunks = self._chunks(wanted)
        together = len(self.servers)
        if not all(server.is_own for server in self.servers):
            together *= self.config.batch_size

        def ask(index: int) -> None:
            keep(self._ask(self.servers[index % len(self.servers)], chunks[index]))

        try:
            map_bounded(ask, len(chunks), together)
        except ServerFailed as error:
            raise ValueError(f"--rollout_url {error}") from error

    def _chunks(self, wanted: Sequence[Draw]) -> list[list[Draw]]:
        """What is asked at once: on the own sampler responses of one number, whose noise it is
        told by that; on vLLM, where a seed is of a request, one."""
        own = all(server.is_own for server in self.servers)
        size = self.config.batch_size if own else 1
        chunks = []
        numbered = sorted(wanted, key=lambda one: one.sample)
        for _, same in groupby(numbered, key=lambda one: one.sample):
            ordered = self._by_length(list(same))
            chunks += [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return chunks

    def _ask(self, server: RolloutServer, chunk: Sequence[Draw]) -> list[Drawn]:
        most = self.config.max_new_tokens
        rows = [
            Row(
                self._encoded[one.prompt.number].input_ids,
                most,
                self.config.seed,
                one.sample,
                one.prompt.number,
            )
            for one in chunk
        ]
        wanted = Wanted(self.config.sampling, tuple(map(tuple, self.stops)))
        # The weights that the server was started with; a run that uses it has published others.
        answers = server.complete(rows, wanted, "start")
        return [
            self._of_tokens(one, answer.tokens, answer.stopped)
            for one, answer in zip(chunk, answers, strict=True)
        ]


class VllmSampler(TemplateSampler):
    """vLLM in this process. A response is repeated by its seed within one release of vLLM."""

    def __init__(
        self, path: str, parts: Loaded, config: SamplingConfig, memory_share: float, code: bool
    ) -> None:
        """Raises ValueError for an adapter, and where vLLM cannot be imported."""
        super().__init__(parts.conversation, parts.tokenizer, config, parts.model)
        directory = find_model(path, "actor")
        if adapter_base(directory) is not None:
            raise ValueError(
                f"--rollout_engine vllm: {path} is a LoRA adapter; merge it first (coati merge)"
            )
        try:
            self.vllm = import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"--rollout_engine vllm: vllm cannot be imported ({error}); leave the flag out"
            ) from error
        # Seeds and prompts that are prefilled in parts do not go together on a CPU (0.32).
        on_cpu = {} if torch.cuda.is_available() else {"enable_chunked_prefill": False}
        self.llm = self.vllm.LLM(
            model=directory,
            skip_tokenizer_init=True,
            gpu_memory_utilization=memory_share,
            max_model_len=self.room + config.max_new_tokens,
            trust_remote_code=code,
            **on_cpu,
        )
        self.facts = {"vllm": str(getattr(self.vllm, "__version__", None))}

    def draw(self, wanted: Sequence[Draw], keep: Keep) -> None:
        """See :class:`Sampler`. vLLM forms batches itself; what it is given at once is what is lost
        if the process is killed."""
        ordered = self._by_length(wanted)
        size = max(256, self.config.batch_size)
        for start in range(0, len(ordered), size):
            keep(self._batch(ordered[start : start + size]))

    def _batch(self, batch: Sequence[Draw]) -> list[Drawn]:
        most = self.config.max_new_tokens
        first = replace(self.config, max_new_tokens=1)
        noise = noise_of([one.prompt for one in batch], [one.sample for one in batch], first)
        seeds = (noise[:, 0] * 2**31).long().tolist()
        outputs = self.llm.generate(
            [{"prompt_token_ids": self._encoded[one.prompt.number].input_ids} for one in batch],
            [
                vllm_parameters(self.vllm, self.config.sampling, self.stops, seed, most)
                for seed in seeds
            ],
            use_tqdm=False,
        )
        found = []
        for one, output in zip(batch, outputs, strict=True):
            stops = tuple(map(tuple, self.stops))
            tokens, stopped = cut(list(output.outputs[0].token_ids), stops, most)
            found.append(self._of_tokens(one, tokens, stopped))
        return found


class Configurations:
    """In place of a model that samples elsewhere: its configurations."""

    def __init__(self, path: str | os.PathLike, trust_remote_code: bool = False) -> None:
        from transformers import GenerationConfig

        directory = find_model(path, "actor")
        while (base := adapter_base(directory)) is not None:
            directory = find_model(base, "actor")
        self.config = load_configuration(directory, trust_remote_code)
        try:
            self.generation_config = GenerationConfig.from_pretrained(directory)
        except OSError:
            self.generation_config = GenerationConfig.from_model_config(self.config)


def fingerprint_of(path: str | os.PathLike) -> str | dict[str, str]:
    """What tells the files of a model from others, in bounded time: a hash of each file that
    decides its responses, of an adapter's base too; the name of one of the hub."""
    directory = Path(find_model(path, "actor"))
    if not directory.is_dir():
        return str(path)
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model", Path(HEADS).suffix)
    files = [one for one in sorted(directory.iterdir()) if one.suffix in kinds and one.is_file()]
    found = {one.name: sampled_hash(one) for one in files if one.name != "arguments.json"}
    base = adapter_base(directory)
    below = {} if base is None else fingerprint_of(base)
    named = below if isinstance(below, dict) else {"": below}
    return found | {f"base/{name}": each for name, each in named.items()}
