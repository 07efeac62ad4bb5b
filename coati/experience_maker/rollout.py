"""The boundary between training and what samples for it: one method, behind which another engine
can stand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from coati.models.generation.loop import Generated, Sampling
from coati.parallel.engine import Engine
from coati.parallel.sharded_generation import cannot_sample, sample


class RolloutEngine(Protocol):
    """Samples responses of the policy as it is now."""

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, *, noise: Tensor, temperature: float
    ) -> Generated:
        """Continue prompts (B, P), padded on the left with ``attention_mask`` 0.

        ``noise`` (B, max_new_tokens) decides the tokens
        (:func:`~coati.models.generation.row_noise.row_noise`). ``logprobs`` of the result are
        log_softmax(logits / temperature) at each token, without top-k, top-p and penalties; None:
        the caller must recompute them with the policy. Every rank must call it equally often.
        """
        ...


class ModelRollout:
    """The policy samples by itself, with the weights that it is trained with."""

    def __init__(
        self,
        engine: Engine,
        *,
        sampling: Sampling,
        stop_sequences: Sequence[list[int]],
        max_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        """``sampling.temperature`` gives way to the one that :meth:`generate` is called with.
        Raises ValueError where the plugin cannot sample."""
        if reason := cannot_sample(engine):
            raise ValueError(reason)
        self.engine = engine
        self.sampling = sampling
        self.settings = {
            "stop_sequences": stop_sequences,
            "max_new_tokens": max_new_tokens,
            "pad_token_id": pad_token_id,
        }

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, *, noise: Tensor, temperature: float
    ) -> Generated:
        """As :meth:`~coati.experience_maker.rollout.RolloutEngine.generate`."""
        return sample(
            self.engine,
            input_ids,
            attention_mask,
            sampling=replace(self.sampling, temperature=temperature),
            noise=noise,
            return_logprobs=True,
            **self.settings,
        )


def make_rollout(name: str, engine: Engine, *, model_path: str, **settings: Any) -> RolloutEngine:
    """The engine called ``name`` ("model" or "vllm"); ``settings`` are those of
    :class:`ModelRollout`.

    ``model_path``: the model's directory or name, from which another engine reads its shape and
    first weights. Raises ValueError for another name or where the engine cannot work.
    """
    if name == "model":
        return ModelRollout(engine, **settings)
    if name == "vllm":
        from coati.experience_maker.vllm_rollout import VllmRollout

        return VllmRollout(engine, model_path=model_path, **settings)
    raise ValueError(f"--rollout_engine {name}: unknown; choose model or vllm")
