"""Rollouts by vLLM in the training process, for one process on one GPU; imported only when it is
chosen.

What holds: weights are handed over after each update, adapters merged;
log-probs are left to the policy, whose numbers the update is compared with, so vLLM's kernels and
rounding do not enter the ratio. What does
not: a response is repeated by its row's noise only within one vLLM version and batch composition
(vLLM takes a seed per request, not the noise itself); a stop sequence of several tokens ends a
response only afterward, so vLLM computes tokens that are cut off; model and key-value cache live
on the GPU beside the training state.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from coati.models.generation.loop import Generated, Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.parallel.engine import Engine
from coati.parallel.weights import is_lora
from coati.utils.distributed import world_size

GPU_SHARE = 0.4  # of the GPU's memory, for vLLM's weights and cache; training has the rest
_WAYS_TO_THE_MODEL = (
    "llm_engine.model_executor.driver_worker.model_runner.model",
    "llm_engine.model_executor.driver_worker.worker.model_runner.model",
)


class VllmRollout:
    """A :class:`~coati.experience_maker.rollouts.rollout_engine.RolloutEngine`; see the module for
    what it promises and what not."""

    def __init__(
        self,
        engine: Engine,
        *,
        model_path: str,
        sampling: Sampling,
        stop_sequences: Sequence[list[int]],
        max_new_tokens: int,
        pad_token_id: int,
        gpu_share: float = GPU_SHARE,
    ) -> None:
        """Raises ValueError without vLLM, with more than one process, or for adapters on tied
        embeddings."""
        if world_size() > 1:
            raise ValueError(
                f"--rollout_engine vllm works with one process, not {world_size()}; use "
                "--rollout_engine model"
            )
        # Its engine must live in this process, where the weights are.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self.vllm = import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"--rollout_engine vllm: vllm cannot be imported ({error}); install it (pip "
                "install vllm, on a machine with a GPU) or use --rollout_engine model"
            ) from error
        _check_head(engine)
        self.engine = engine
        self.sampling = sampling
        self.stops = [tuple(stop) for stop in stop_sequences]
        self.max_new_tokens = max_new_tokens
        self.pad = pad_token_id
        self.llm = self.vllm.LLM(
            model=model_path,
            skip_tokenizer_init=True,
            gpu_memory_utilization=gpu_share,
            enable_prefix_caching=False,
        )
        self.version = 0

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand the weights over to vLLM."""
        self._model().load_weights(iter(weights))
        self.version = version

    def ask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        noise: NoiseRows,
        temperature: float,
        limits: Sequence[int] | None = None,
    ) -> "Future[Generated]":
        """Samples at once; vLLM takes a seed a response, the first number of its noise. Log-probs
        are left to the policy."""
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
        responses = [
            cut(list(output.outputs[0].token_ids), self.stops, n)
            for output, n in zip(outputs, most, strict=True)
        ]
        answer: Future[Generated] = Future()
        answer.set_result(replace(self._padded(input_ids, responses), version=self.version))
        return answer

    def close(self) -> None:
        """vLLM ends with the process."""

    def _parameters(self, seed: int, temperature: float, most: int) -> Any:
        sampling = self.sampling
        return self.vllm.SamplingParams(
            temperature=temperature if sampling.do_sample else 0.0,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            max_tokens=most,
            # The stop sequences say what ends a response, not the model's configuration
            ignore_eos=True,
            stop_token_ids=[stop[0] for stop in self.stops if len(stop) == 1],
            detokenize=False,
        )

    def _padded(self, input_ids: Tensor, responses: list[tuple[list[int], bool]]) -> Generated:
        width = max(len(tokens) for tokens, _ in responses)
        new = [tokens + [self.pad] * (width - len(tokens)) for tokens, _ in responses]
        device = input_ids.device
        return Generated(
            torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=device)], dim=1),
            torch.tensor([len(tokens) for tokens, _ in responses], device=device),
            torch.tensor([stopped for _, stopped in responses], device=device),
            input_ids.shape[1],
            logprobs=None,
        )

    def _model(self) -> Any:
        for way in _WAYS_TO_THE_MODEL:
            found = self.llm
            for name in way.split("."):
                found = getattr(found, name, None)
            if found is not None:
                return found
        version = getattr(self.vllm, "__version__", "of unknown version")
        raise ValueError(
            f"--rollout_engine vllm: the weights of vllm {version} cannot be reached in this "
            f"process (looked for llm.{_WAYS_TO_THE_MODEL[0]}); use another version or "
            "--rollout_engine model"
        )


def _check_head(engine: Engine) -> None:
    # Merged, such a model has a head of its own; vLLM, which reads the configuration, would use the
    # input embedding.
    if not is_lora(engine):
        return
    from coati.models.lora.layers import tied_head

    if tied_head(engine.module.get_base_model()) is not None:
        raise ValueError(
            "--rollout_engine vllm: the adapters change one side of tied embeddings, which vllm "
            "cannot be given; leave embed_tokens and lm_head out of the adapters or use "
            "--rollout_engine model"
        )


def cut(tokens: list[int], stops: list[tuple[int, ...]], limit: int) -> tuple[list[int], bool]:
    """``tokens`` up to the end of the first stop sequence to be complete, and whether there is one
    within ``limit``."""
    tokens = tokens[:limit]
    for end in range(1, len(tokens) + 1):
        if any(tuple(tokens[max(0, end - len(stop)) : end]) == stop for stop in stops):
            return tokens[:end], True
    return tokens, False
