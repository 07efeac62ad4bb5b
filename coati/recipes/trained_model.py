"""What a function of the Python front door returns: a run's directory as an object."""

import gc
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from coati.dataset.chat.conversation import Conversation

Messages = list[dict[str, str]]
FINAL = ("modeling", "actor/modeling")  # of one model, and of PPO and GRPO
EVALUATED = "eval/"
MAX_LENGTH = 2**31  # no bound of its own: the model's positions are one
BATCH = 16


class TrainedModel:
    """The model of a run, read from the run's directory: ``TrainedModel("output/sft/001")`` is what
    :func:`coati.sft` returned after that run.

    The weights are loaded when they are first needed and let go when the next stage starts. In a
    run of several processes each of them loads a copy of its own.

    Args:
        run_dir: the ``save_dir`` of the run.
    """

    def __init__(self, run_dir: str | os.PathLike) -> None:
        self.run_dir = Path(run_dir)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.run_dir)!r})"

    @property
    def path(self) -> str:
        """The model directory: the final model, else (of a run that was stopped early) that of the
        newest checkpoint.

        Raises ValueError where there is neither, as after ``dry_run``.
        """
        if not self.run_dir.is_dir():
            raise ValueError(f"{self.run_dir}: there is no such directory; expected that of a run")
        if (final := self._final()) is not None:
            return str(final)
        from coati.parallel.checkpoint import latest_checkpoint
        from coati.recipes.resume import weights_of

        checkpoint = latest_checkpoint(self.run_dir)
        if checkpoint is None:
            raise ValueError(f"{self.run_dir} holds neither a final model nor a checkpoint")
        return weights_of(checkpoint)

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step; the same call with ``save_dir`` and
        ``checkpoint_path="auto"`` goes on."""
        return self._final() is None

    def _final(self) -> Path | None:
        places = (self.run_dir / name for name in FINAL)
        return next((place for place in places if place.is_dir()), None)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the run's ``metrics.jsonl``, each with its ``step``."""
        file = self.run_dir / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        # A run that was killed while it wrote leaves half a line.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def evaluation(self) -> dict[str, float]:
        """The metrics of the last evaluation, such as ``loss``; empty without one."""
        rows = [row for row in self.history if any(name.startswith(EVALUATED) for name in row)]
        return {
            name.removeprefix(EVALUATED): value
            for name, value in (rows[-1] if rows else {}).items()
            if name.startswith(EVALUATED)
        }

    @cached_property
    def _loaded(self) -> tuple["nn.Module", Any, "Conversation"]:
        from coati.inference.model_loading import load
        from coati.trainer.progress import bars_in_terminals_alone

        with bars_in_terminals_alone():
            return load(self.path)

    @property
    def model(self) -> "nn.Module":
        """The module in evaluation mode, adapters merged, on the GPU where there is one."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    def release(self) -> None:
        """Let go of the loaded weights; they are loaded again when they are needed."""
        self.__dict__.pop("_loaded", None)
        collect_garbage()

    def save(self, folder: str | os.PathLike) -> Path:
        """Copy the model directory, in which Hugging Face's libraries find a model (or, after LoRA,
        an adapter), to ``folder``. Every rank must call it.

        Raises ValueError where something is there already.
        """
        from coati.inference.export.model_dir import fresh_folder
        from coati.utils.distributed import is_rank_0, raise_together

        source = self.path

        def copy() -> None:
            if is_rank_0():
                with fresh_folder(folder) as temporary:
                    shutil.copytree(source, temporary, dirs_exist_ok=True)

        raise_together(copy)
        return Path(folder)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 42,
    ) -> Any:
        """The response to ``prompt``, a text of the user or messages that end with one; of a list
        of prompts the list of responses. What is in a list beside a prompt changes nothing of its
        response.

        Args:
            max_new_tokens: tokens of the longest response.
            temperature: 0 takes the likeliest token each time.
            top_k, top_p, seed: of sampling, at a temperature above 0.

        Raises:
            ValueError: for a prompt that the template cannot write, or that leaves no room.
        """
        from coati.inference.evaluate.generate_responses import (
            Prompt,
            SamplingConfig,
            generate_responses,
        )
        from coati.inference.model_loading import Loaded
        from coati.models.generation.detokenize import decode
        from coati.models.generation.response_table import without_stop
        from coati.models.generation.sampling import Sampling

        conversations = _conversations(prompt)
        config = SamplingConfig(
            Sampling.at(temperature, top_k, top_p),
            max_new_tokens,
            MAX_LENGTH,
            BATCH,
            seed,
        )
        prompts = [
            Prompt(f"prompt {number}", number, messages)
            for number, messages in enumerate(conversations)
        ]
        loaded = Loaded(*self._loaded)
        found, skipped = generate_responses(loaded, prompts, config)
        if skipped:
            place, reason = skipped[0]
            raise ValueError(f"{place}: {reason}")
        stops = loaded.stop_sequences()
        texts = [
            decode(loaded.tokenizer, without_stop(found[number].ids, stops))
            for number in range(len(prompts))
        ]
        return texts[0] if _is_one(prompt) else texts


class TrainedRewardModel(TrainedModel):
    """The reward model of a run; its weights are loaded when they are first needed."""

    @cached_property
    def _loaded(self) -> tuple["nn.Module", Any, "Conversation"]:
        from coati.inference.evaluate.score_rows import load_reward_model
        from coati.trainer.progress import bars_in_terminals_alone

        with bars_in_terminals_alone():
            return load_reward_model(self.path)

    def generate(self, *_: Any, **__: Any) -> Any:
        """A reward model writes nothing. Raises TypeError."""
        raise TypeError("a reward model scores responses, it writes none; use score()")

    def score(self, rows: Any, max_length: int = 2048) -> Any:
        """The score of a conversation that ends with a response (messages, or ``{"messages":
        ...}``), a float; of a pair (``prompt``, ``chosen``, ``rejected``) both scores; of a list of
        rows the list. ``max_length``: tokens of the longest row, as in training.

        Raises:
            ValueError: for a row that cannot be read or does not fit.
        """
        from coati.dataset.rows.row_errors import RowError
        from coati.inference.evaluate.score_rows import row_to_score, score
        from coati.models.positions import within_positions

        model, tokenizer, conversation = self._loaded
        max_length = within_positions(model.config, max_length, hard_only=True)
        alone = isinstance(rows, Mapping) or _is_messages(rows)
        ready = []
        for number, row in enumerate([rows] if alone else rows):
            try:
                ready.append(row_to_score(f"row {number}", row, conversation, max_length))
            except RowError as error:
                raise ValueError(f"row {number}: {error.reason}: {error.detail}") from error
        score(model, ready, tokenizer.pad_token_id or 0, BATCH)
        scores = [row.scores[0] if len(row.scores) == 1 else tuple(row.scores) for row in ready]
        return scores[0] if alone else scores


def collect_garbage() -> None:
    """Give back what nothing refers to any longer, on a GPU too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no GPU was used


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(each, Mapping) and "role" in each for each in value)
    )


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, str) or _is_messages(prompt)


def _conversations(prompt: Any) -> list[Messages]:
    prompts = [prompt] if _is_one(prompt) else prompt
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompt is {type(prompt).__name__}; expected a text, messages, or a list of them"
        )
    for number, each in enumerate(prompts):
        if not _is_one(each):
            raise TypeError(
                f"prompt {number} is {type(each).__name__}; expected a text or messages"
            )
    return [
        [{"role": "user", "content": each}] if isinstance(each, str) else list(each)
        for each in prompts
    ]
