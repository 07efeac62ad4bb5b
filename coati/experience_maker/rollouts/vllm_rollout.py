"""Rollouts by vLLM in the training process, for one process on one GPU; imported only when it is
chosen.

What holds: weights are handed over after each update, adapters merged; the ratio of the update is
taken against the policy's own log-probs, vLLM's are kept beside them, so its kernels and rounding
do not enter the ratio. What does not: a response is repeated by its row's noise only within one
vLLM version and batch composition (vLLM takes a seed per request, not the noise itself); a stop
sequence of several tokens ends a response only afterward, so vLLM computes tokens that are cut off;
model and key-value cache live on the GPU beside the training state, unless they sleep.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker.rollouts.rollout_client import cut, is_whole
from coati.models.generation.loop import Generated, Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.parallel.engine import Engine
from coati.parallel.weights import checkpoint_weights, is_lora
from coati.utils.distributed import world_size
from coati.utils.logging import get_logger

logger = get_logger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WAYS_TO_THE_RUNNER = (
    "llm_engine.model_executor.driver_worker.model_runner",
    "llm_engine.model_executor.driver_worker.worker.model_runner",
)


@dataclass(frozen=True)
class VllmOptions:
    """``model_path``: the model's directory or name, from which vLLM reads its shape and first
    weights. ``precision``: of ``--mixed_precision``. ``max_length``: tokens of prompt and response.
    ``memory_share``: of the GPU's memory, for vLLM's weights and cache; training has the rest.
    ``sleep``: give it back to training between rollouts."""

    model_path: str
    precision: str = "bf16"
    max_length: int | None = None
    memory_share: float = 0.4
    sleep: bool = False
    trust_remote_code: bool = False


class VllmRollout:
    """A :class:`~coati.experience_maker.rollouts.rollout_engine.RolloutEngine`; see the module for
    what it promises and what not."""

    at_once = True

    def __init__(
        self,
        engine: Engine,
        options: VllmOptions,
        *,
        sampling: Sampling,
        stop_sequences: Sequence[list[int]],
        max_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        """Raises ValueError without vLLM, with more than one process, for adapters on tied
        embeddings, and for a sleep that this vLLM cannot have."""
        if world_size() > 1:
            raise ValueError(
                f"--rollout_engine vllm works with one process, not {world_size()}; use "
                "--rollout_url with servers of coati rollout-server, or --rollout_engine model"
            )
        # Its engine must live in this process, where the weights are.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self.vllm = import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"--rollout_engine vllm: vllm cannot be imported ({error}); install it (pip "
                "install vllm, on a machine with a GPU), run it as a server in an environment of "
                "its own (--rollout_url), or use --rollout_engine model"
            ) from error
        check_head(engine, "--rollout_engine vllm")
        self.engine = engine
        self.sampling = sampling
        self.stops = tuple(tuple(stop) for stop in stop_sequences)
        self.max_new_tokens = max_new_tokens
        self.pad = pad_token_id
        self.sleeps = options.sleep
        self.llm = self.vllm.LLM(**self._llm_options(options))
        self._awake = True
        self._check_sleep()
        self.version = 0

    def _llm_options(self, options: VllmOptions) -> dict[str, Any]:
        given: dict[str, Any] = {
            "model": options.model_path,
            "dtype": DTYPES[options.precision],
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": options.memory_share,
            "enable_prefix_caching": False,
            "trust_remote_code": options.trust_remote_code,
        }
        if self._has_mode():  # with the temperature in them, as the policy's are
            given["logprobs_mode"] = "processed_logprobs"
        if not torch.cuda.is_available():
            # Seeds and prompts that are prefilled in parts do not go together on a CPU (0.32).
            given["enable_chunked_prefill"] = False
        if options.max_length is not None:
            given["max_model_len"] = options.max_length
        if options.sleep:
            given["enable_sleep_mode"] = True
        return given

    def _has_mode(self) -> bool:
        known = getattr(self.vllm, "EngineArgs", None)
        return known is None or hasattr(known, "logprobs_mode")

    @property
    def gives_logprobs(self) -> bool:
        """Whether responses come with log-probs of the whole distribution that sampled them."""
        return self._has_mode() and is_whole(self.sampling)

    def _check_sleep(self) -> None:
        if not self.sleeps:
            return
        if not torch.cuda.is_available():
            raise ValueError(
                "--vllm_sleep frees the memory of a GPU, and there is none; leave it out"
            )
        if not hasattr(self.llm, "sleep") or not hasattr(self.llm, "wake_up"):
            raise ValueError(
                f"--vllm_sleep: vllm {self._release()} has no sleep mode; leave it out"
            )

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand the weights over to vLLM, which wakes for them."""
        self._wake()
        tensors = list(checkpoint_weights(self.engine, dict(weights)).items())
        if hasattr(self.llm, "collective_rpc") and self._reloads():
            # It also renews what vLLM has derived from the weights.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        else:
            logger.warning_once(
                f"vllm {self._release()} has no reload_weights: weights are handed to its model "
                "directly, which is right for plain bf16, fp16 and fp32 models alone"
            )
            self._model().load_weights(iter(tensors))
        self.version = version

    def _reloads(self) -> bool:
        """Whether the worker takes new weights one by one."""
        found = self._find(_WAYS_TO_THE_RUNNER, "reload_weights")
        if found is None:
            return False
        return "weights_iterator" in signature(found).parameters

    def ask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        noise: NoiseRows,
        temperature: float,
        limits: Sequence[int] | None = None,
    ) -> "Future[Generated]":
        """Samples at once; vLLM takes a seed a response, the first number of its noise."""
        self._wake()
        rows = [
            row[real.bool()].tolist() for row, real in zip(input_ids, attention_mask, strict=True)
        ]
        seeds = (noise.noise(1)[:, 0] * 2**31).long().tolist()
        most = [self.max_new_tokens] * len(rows) if limits is None else limits
        outputs = self.llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            [self._parameters(seed, temperature, n) for seed, n in zip(seeds, most, strict=True)],
            use_tqdm=False,
        )
        if self.sleeps:
            self.llm.sleep(level=1)  # the weights stay, in the host's memory
            self._awake = False
        answer: Future[Generated] = Future()
        first = [output.outputs[0] for output in outputs]
        answer.set_result(self._generated(input_ids, first, most))
        return answer

    def _wake(self) -> None:
        if not self._awake:
            self.llm.wake_up()
            self._awake = True

    def close(self) -> None:
        """vLLM ends with the process."""

    def _parameters(self, seed: int, temperature: float, most: int) -> Any:
        sampling = replace(self.sampling, temperature=temperature)
        # logprobs: of the sampled token, and no other
        return vllm_parameters(self.vllm, sampling, self.stops, seed, most, logprobs=0)

    def _generated(self, input_ids: Tensor, outputs: list[Any], limits: Sequence[int]) -> Generated:
        responses = [
            cut(list(output.token_ids), self.stops, most)
            for output, most in zip(outputs, limits, strict=True)
        ]
        width = max(len(tokens) for tokens, _ in responses)
        new = [tokens + [self.pad] * (width - len(tokens)) for tokens, _ in responses]
        device = input_ids.device
        return Generated(
            torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=device)], dim=1),
            torch.tensor([len(tokens) for tokens, _ in responses], device=device),
            torch.tensor([stopped for _, stopped in responses], device=device),
            input_ids.shape[1],
            logprobs=None,
            sampled_logprobs=self._logprobs(outputs, [len(t) for t, _ in responses], width, device),
            version=self.version,
        )

    def _logprobs(
        self, outputs: list[Any], lengths: list[int], width: int, device: torch.device
    ) -> Tensor | None:
        """(B, width), 0 after a response's end; None where vLLM's are of what top-k, top-p and
        penalties leave."""
        if not self._has_mode():
            logger.warning_once(
                f"vllm {self._release()} gives log-probs without the temperature: they are not used"
            )
            return None
        if not is_whole(self.sampling):
            logger.warning_once(
                "vLLM gives log-probs of what top-k, top-p and the repetition penalty leave, not "
                "of the whole distribution: they are not used"
            )
            return None
        found = torch.zeros(len(outputs), width)
        for row, (output, length) in enumerate(zip(outputs, lengths, strict=True)):
            each = zip(output.token_ids[:length], output.logprobs, strict=False)
            found[row, :length] = torch.tensor([by_id[token].logprob for token, by_id in each])
        return found.to(device)

    def _find(self, ways: Sequence[str], name: str) -> Any:
        """The first ``llm.<way>.<name>`` there is; None for none."""
        for way in ways:
            found = self.llm
            for part in (*way.split("."), name):
                found = getattr(found, part, None)
            if found is not None:
                return found
        return None

    def _model(self) -> Any:
        found = self._find(_WAYS_TO_THE_RUNNER, "model")
        if found is not None:
            return found
        raise ValueError(
            f"--rollout_engine vllm: the weights of vllm {self._release()} cannot be reached in "
            f"this process (looked for llm.{_WAYS_TO_THE_RUNNER[0]}.model); use another version or "
            "--rollout_engine model"
        )

    def _release(self) -> str:
        return getattr(self.vllm, "__version__", "of unknown version")


def vllm_parameters(
    vllm: Any,
    sampling: Sampling,
    stops: Sequence[Sequence[int]],
    seed: int,
    most: int,
    **more: Any,
) -> Any:
    """vLLM's SamplingParams of one response of at most ``most`` tokens, which ``stops`` end: those
    of several tokens by cutting it afterward
    (:func:`~coati.experience_maker.rollouts.rollout_client.cut`)."""
    return vllm.SamplingParams(
        temperature=sampling.temperature if sampling.do_sample else 0.0,
        top_k=sampling.top_k or -1,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=seed,
        max_tokens=most,
        # The stop sequences say what ends a response, not the model's configuration
        ignore_eos=True,
        stop_token_ids=[stop[0] for stop in stops if len(stop) == 1],
        detokenize=False,
        **more,
    )


def check_head(engine: Engine, flag: str) -> None:
    """Raises ValueError for adapters on one side of tied embeddings. Merged, such a model has a
    head of its own; vLLM, which reads the configuration, would use the input embedding."""
    if not is_lora(engine):
        return
    from coati.models.lora.layers import tied_head

    if tied_head(engine.module.get_base_model()) is not None:
        raise ValueError(
            f"{flag}: the adapters change one side of tied embeddings, which other samplers cannot "
            "be given; leave embed_tokens and lm_head out of the adapters or use "
            "--rollout_engine model"
        )
