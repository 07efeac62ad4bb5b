"""The library's own sampler behind a server: a plain model that takes published weights and
continues prompts with the noise that a request names, so that its tokens are those of sampling in
the training process. Needs neither ColossalAI nor peft."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.prompt_logprobs import asked_top_k, prompt_logprobs
from coati.experience_maker.rollouts.weight_files import (
    Place,
    digest,
    read_index,
    read_weights,
)
from coati.models.generation.end_tokens import end_tokens
from coati.models.generation.loop import Generated, generate
from coati.models.generation.response_table import left_pad
from coati.models.generation.row_noise import NoiseRows
from coati.models.generation.sampling import Sampling
from coati.models.loading import load_causal_lm
from coati.models.padding_free import PaddingFree
from coati.models.positions import positions_of
from coati.utils.transformers_compat import disk_names


class OtherWeights(Exception):
    """A request names weights that are not loaded."""


class OwnSampler:
    """A model and the name of the weights that it holds. One request after the other: a caller
    that wants more at once sends more rows."""

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        """``max_length``: tokens of prompt and response; None: what the model has positions
        for."""
        self.model = model.eval()
        self.device = next(model.parameters()).device
        positions = positions_of(model.config)
        most = None if positions is None else positions.count
        self.max_length = min(filter(None, (max_length, most)), default=None)
        self.loaded = "start"
        self._lock = Lock()
        on_cpu = self.device.type == "cpu"
        self._padding_free = PaddingFree.of(model) if on_cpu else None

    def describe_model(self) -> dict[str, Any]:
        """What a client compares before it publishes."""
        return {
            "engine": "coati",
            "facts": facts_of(self.model.config),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "max_model_len": self.max_length,
            "logprobs_mode": "processed_logprobs",
            "world": 1,
        }

    def load_published(self, place: str) -> dict[str, Any]:
        """Take the weights at a :class:`~coati.experience_maker.rollouts.weight_files.Place`, as
        JSON. Raises ValueError for ones that are damaged or another model's; those of before then
        stay."""
        wanted = Place.from_json(place)
        index = read_index(wanted)
        self.load(index["name"], dict(read_weights(wanted, index)))
        return {"name": self.loaded}

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take ``tensors``, by their names on disk, and be called ``name`` from here on. Raises
        ValueError for another model's; those of before then stay."""
        with self._lock, torch.no_grad():
            targets = self._targets()
            if targets.keys() >= tensors.keys():
                self._check(targets, tensors)
                self.loaded = "half of " + name  # until the last is there
                for one, tensor in tensors.items():
                    targets[one].copy_(tensor)
            else:  # files hold parts of what the model holds joined
                self.model.load_state_dict(self._converted(dict(tensors)))
            self.loaded = name

    def _targets(self) -> dict[str, Tensor]:
        """The model's tensors by their names on disk: themselves or views of them."""
        state = dict(self.model.state_dict())
        memory = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        composite = getattr(self.model, "composite", None)
        named = disk_names(self.model, state) if composite is None else composite.whole_names(state)
        return {
            name: tensor
            for name, tensor in named.items()
            if tensor.untyped_storage().data_ptr() in memory
        }

    def _check(self, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if targets[name].shape != tensor.shape:
                raise ValueError(
                    f"the published weights are of another model: {name} is "
                    f"{tuple(tensor.shape)} there, {tuple(targets[name].shape)} here"
                )
        given = {targets[name].untyped_storage().data_ptr() for name in tensors}
        missing = [n for n, t in targets.items() if t.untyped_storage().data_ptr() not in given]
        if missing:
            raise ValueError(f"the published weights lack {missing[0]} of the model served here")

    def _converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` of files as the model holds them in memory, by way of loading them."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="coati-weights-") as folder:
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self.model.config.save_pretrained(folder)
            loaded = load_causal_lm(folder, strict=True)
            return dict(loaded.state_dict())

    def weight_checksums(self) -> dict[str, str]:
        """SHA-256 of each tensor by its name on disk."""
        with self._lock:
            return {name: digest(tensor) for name, tensor in self._targets().items()}

    def complete(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices that answer a request to ``/v1/completions``.

        Beside vLLM's fields it may have ``coati``: ``weights`` (the name that must be loaded),
        ``noise`` (seed, episode, rows, turn), ``stop_sequences`` and ``max_tokens`` of each prompt.
        With ``prompt_logprobs`` K the K likeliest ids at each token of the prompts are given, too.
        Raises ValueError for a malformed request, OtherWeights where other weights are loaded.
        """
        prompts = _prompts(body)
        own = body.get("coati") or {}
        limits = _limits(body, len(prompts))
        self._check_lengths(prompts, limits)
        top_k = asked_top_k(body, self.describe_model()["facts"]["vocab_size"])
        stops = [list(stop) for stop in own.get("stop_sequences") or ()]
        stops += [[token] for token in body.get("stop_token_ids") or ()]
        if not body.get("ignore_eos"):
            stops += [[token] for token in end_tokens(self.model)]
        noise = own.get("noise") or {
            "seed": body.get("seed") or 0,
            "episode": 0,
            "rows": range(len(prompts)),
        }
        with self._lock:
            if own.get("weights") not in (None, self.loaded):
                raise OtherWeights(f"weights {self.loaded} are loaded, not {own['weights']}")
            generated = self._generate(prompts, NoiseRows(**noise), stops, limits, body)
            listed = None if top_k is None else prompt_logprobs(self.model, prompts, top_k)
        choices = _choices(generated)
        for choice, places in zip(choices, listed or (), strict=False):
            choice["prompt_logprobs"] = places
        return choices

    def _check_lengths(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        vocabulary = self.describe_model()["facts"]["vocab_size"]
        for number, prompt in enumerate(prompts):
            if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
                raise ValueError(
                    f"prompt {number} has the token id {wrong[0]}; the vocabulary of the model "
                    f"served here has {vocabulary}"
                )
        lengths = [len(prompt) for prompt in prompts]
        longest, count = max(zip(lengths, limits, strict=True), key=sum)
        if self.max_length is not None and longest + count > self.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and {count} new ones are more than the "
                f"{self.max_length} of this server"
            )

    def _generate(
        self,
        prompts: Sequence[list[int]],
        noise: NoiseRows,
        stops: list[list[int]],
        limits: list[int],
        body: Mapping[str, Any],
    ) -> Generated:
        count = max(limits)
        ids, mask = left_pad(prompts, 0)
        sampling = Sampling.at(
            float(body.get("temperature", 1.0)),
            max(int(body.get("top_k") or 0), 0) or None,
            float(body.get("top_p") or 1.0),
            float(body.get("repetition_penalty") or 1.0),
            float(body.get("min_p") or 0.0),
        )
        return generate(
            self.model,
            ids.to(self.device),
            mask.to(self.device),
            stop_sequences=stops,
            max_new_tokens=count,
            limits=limits,
            noise=noise.noise(count),
            return_logprobs=True,
            padding_free=self._padding_free,
            **vars(sampling),
        )


def _prompts(body: Mapping[str, Any]) -> list[list[int]]:
    found = body.get("prompt")
    if isinstance(found, list) and found and isinstance(found[0], int):
        found = [found]
    if not isinstance(found, list) or not found or not all(map(_is_prompt, found)):
        raise ValueError("prompt: expected token ids, a list of them for each row")
    return found


def _is_prompt(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(type(token) is int for token in found)


def _limits(body: Mapping[str, Any], count: int) -> list[int]:
    """Tokens that each of ``count`` prompts may get."""
    found = (body.get("coati") or {}).get("max_tokens")
    limits = [body.get("max_tokens", 16)] * count if found is None else found
    if not isinstance(limits, list) or len(limits) != count:
        raise ValueError(f"max_tokens: expected {count} numbers, one for each prompt")
    for limit in limits:
        if type(limit) is not int or limit < 1:
            raise ValueError(f"max_tokens: expected a whole number of at least 1, found {limit!r}")
    return limits


def _choices(generated: Generated) -> list[dict[str, Any]]:
    lengths = generated.lengths.tolist()
    logprobs = generated.logprobs.tolist()
    return [
        {
            "index": index,
            "token_ids": tokens,
            "text": "",
            "logprobs": {"token_logprobs": logprobs[index][: lengths[index]]},
            "finish_reason": "stop" if stopped else "length",
        }
        for index, (tokens, stopped) in enumerate(
            zip(generated.responses(), generated.stopped.tolist(), strict=True)
        )
    ]
