"""What a student is distilled from: a model in this process, or a server that gives the likeliest
tokens of a prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coati.models.distillation import ListedTeacher, WholeTeacher, after_head
from coati.models.generation.detokenize import decode
from coati.models.head import Head
from coati.models.head_outputs import HeadOutputs, HeadRequest
from coati.models.logprobs import IGNORE_INDEX
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch
from coati.rewards.endpoint import bearer, post_json
from coati.rewards.failures import Rejected, Unreachable
from coati.utils.distributed import raise_together
from coati.utils.errors import RunFailed

TOKEN_VARIABLE = "COATI_TEACHER_TOKEN"
TIMEOUT_S = 600.0  # of the answer to a micro-batch, tries included
CHECK_S = 60.0
# Words, numbers and signs, by whose tokens two vocabularies are compared.
PROBE = "The answer is 12, not 3: naïve words & {signs}."
UNREADABLE = "\ufffd"  # of a token that is a part of a character


class Teacher:
    """Looks at a micro-batch before the student does. A subclass defines all three methods, and
    ``token_keys``: what of :meth:`look_at` has an entry for each supervised token, not each row.
    ``vocabulary``: ids that the student has; the trainer sets it."""

    token_keys: tuple[str, ...] = ()
    vocabulary: float = math.inf

    def look_at(self, batch: Batch) -> Batch:
        """What :meth:`request` and :meth:`label_logps` need of it, by names of their own; on the
        device of ``batch``, before the forward pass. Every rank calls it equally often."""
        raise NotImplementedError(f"{type(self).__name__} must say what it makes of a batch")

    def request(self, batch: Batch, beta: float) -> HeadRequest:
        """What the student's head is asked for."""
        raise NotImplementedError(f"{type(self).__name__} must say what it is compared by")

    def label_logps(self, outputs: HeadOutputs, batch: Batch) -> Tensor:
        """(n,) its log-probs of the supervised tokens."""
        raise NotImplementedError(f"{type(self).__name__} must give log-probs of labels")

    def engines(self) -> list[Any]:
        """The engine of its model, where that is in this process."""
        return []


class ModelTeacher(Teacher):
    """A model in this process, frozen, in evaluation mode. Of its distribution only the last hidden
    states (n, H') are kept from its forward pass to the student's; its head then works a chunk at
    a time beside the student's."""

    token_keys = ("teacher_hidden",)

    def __init__(self, model: InferenceModel) -> None:
        self.model = model
        engine = model.engine
        if engine.head is None:  # of a model that changes its logits after the head
            engine.head = Head.install(engine.module)
        self.head: Head = engine.head
        self.after_head = after_head(engine.module.config)

    def engines(self) -> list[Any]:
        return [self.model.engine]

    def look_at(self, batch: Batch) -> Batch:
        asked = HeadRequest(hidden=True)
        return {"teacher_hidden": self.model.forward_only(batch, _hidden, asked)}

    def request(self, batch: Batch, beta: float) -> HeadRequest:
        return HeadRequest(teacher=WholeTeacher(batch["teacher_hidden"], self._logits, beta))

    def label_logps(self, outputs: HeadOutputs, batch: Batch) -> Tensor:
        assert outputs.teacher_logps is not None
        return outputs.teacher_logps

    @torch.no_grad()
    def _logits(self, rows: Tensor) -> Tensor:
        # The student's forward, around this one, may be rounded by autocast.
        with torch.autocast(rows.device.type, enabled=False):
            logits = self.head.logits(rows.to(self.model.engine.dtype))
            return self.after_head(logits)


def _hidden(outputs: HeadOutputs, _: Batch) -> Tensor:
    assert outputs.hidden is not None
    return outputs.hidden


class ServerTeacher(Teacher):
    """A server whose /v1/completions gives ``prompt_logprobs`` (vLLM's, or the library's own
    rollout server): the ``top_k`` likeliest ids at each token of a row.

    Raises ValueError from :meth:`look_at`, on every rank, for what it does not answer.
    """

    token_keys = ("teacher_ids", "teacher_logps", "teacher_label_logps")

    def __init__(self, url: str, top_k: int, model: str | None = None) -> None:
        base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        self.url = f"{base}/v1/completions"
        self.top_k = top_k
        self.model = model
        self.headers: Mapping[str, str] = bearer(TOKEN_VARIABLE)

    def check(self, tokenizer: Any) -> None:
        """Raise ValueError where its tokens are not those of ``tokenizer``, so far as it says what
        they are."""
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        (found,) = self._ask([ids], CHECK_S)
        for position in found[1:]:
            for id, entry in position.items():
                theirs = entry.get("decoded_token")
                known = int(id) < len(tokenizer)
                ours = decode(tokenizer, [int(id)], skip_special_tokens=False) if known else None
                if not isinstance(theirs, str) or UNREADABLE in theirs + (ours or ""):
                    continue
                if ours is None or ours.strip() != theirs.strip():
                    raise ValueError(
                        f"--teacher_url {self.url}: the teacher has another tokenizer: token {id} "
                        f"is {theirs!r} there, {ours!r} here; distillation compares probabilities "
                        "token by token, so serve a teacher of the student's tokenizer"
                    )

    def look_at(self, batch: Batch) -> Batch:
        return raise_together(lambda: self._look_at(batch))

    def request(self, batch: Batch, beta: float) -> HeadRequest:
        teacher = ListedTeacher(batch["teacher_ids"], batch["teacher_logps"], beta)
        return HeadRequest(teacher=teacher)

    def label_logps(self, outputs: HeadOutputs, batch: Batch) -> Tensor:
        return batch["teacher_label_logps"]

    def _look_at(self, batch: Batch) -> Batch:
        real = batch["attention_mask"].bool().cpu()
        rows = batch["input_ids"].cpu()
        labels = batch["labels"].cpu()
        prompts = [ids[mask].tolist() for ids, mask in zip(rows, real, strict=True)]
        wanted = [row[mask].tolist() for row, mask in zip(labels, real, strict=True)]
        learned = [i for i, row in enumerate(wanted) if any(x != IGNORE_INDEX for x in row[1:])]
        answers = self._ask([prompts[i] for i in learned]) if learned else []
        listed = [
            self._listed(position, label)
            for i, positions in zip(learned, answers, strict=True)
            for position, label in zip(positions[1:], wanted[i][1:], strict=True)
            if label != IGNORE_INDEX
        ]
        device = batch["input_ids"].device
        ids = [[id for id, _ in pairs] for pairs, _ in listed]
        logps = [[logp for _, logp in pairs] for pairs, _ in listed]
        shape = (len(listed), self.top_k)
        return {
            "teacher_ids": torch.tensor(ids, dtype=torch.long, device=device).view(shape),
            "teacher_logps": torch.tensor(logps, dtype=torch.float32, device=device).view(shape),
            "teacher_label_logps": torch.tensor([logp for _, logp in listed], device=device),
        }

    def _ask(
        self, prompts: Sequence[list[int]], timeout: float = TIMEOUT_S
    ) -> list[list[dict[str, Any]]]:
        """For each prompt, for each of its tokens, {id: {"logprob": ...}}; the first has none."""
        body = {
            "prompt": list(prompts),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
        } | ({"model": self.model} if self.model else {})
        try:
            answer = post_json(self.url, body, timeout=timeout, headers=self.headers)
        except Rejected as error:
            raise RunFailed(
                f"--teacher_url {self.url} {error} (vLLM lists at most --max-logprobs ids; "
                "--teacher_top_k asks for fewer)"
            ) from error
        except Unreachable as error:
            raise RunFailed(f"--teacher_url {self.url} {error}") from error
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise RunFailed(f"--teacher_url {self.url}: no answer to each of {len(prompts)} rows")
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        found = [choice.get("prompt_logprobs") for choice in ordered]
        for positions, prompt in zip(found, prompts, strict=True):
            if not isinstance(positions, list) or len(positions) != len(prompt):
                raise RunFailed(
                    f"--teacher_url {self.url} gives no prompt_logprobs; serve the teacher by vLLM "
                    "or `coati rollout-server MODEL`, or load it here: --teacher"
                )
        return found

    def _listed(
        self, position: dict[str, Any], label: int
    ) -> tuple[list[tuple[int, float]], float]:
        """The ``top_k`` likeliest ids and their log-probs, and that of ``label``, which stands
        beside them where it is not one."""
        try:
            pairs = {
                int(id): float(entry["logprob"])
                for id, entry in position.items()
                if int(id) < self.vocabulary  # rows that only the teacher's embedding has
            }
            of_label = pairs[label]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunFailed(
                f"--teacher_url {self.url}: prompt_logprobs of another form than "
                '{"ID": {"logprob": NUMBER}, ...} with the token itself'
            ) from error
        best = sorted(pairs.items(), key=lambda pair: -pair[1])[: self.top_k]
        if len(best) < self.top_k or not all(math.isfinite(logp) for _, logp in best):
            raise RunFailed(
                f"--teacher_url {self.url} lists {len(best)} ids with finite log-probs at a token; "
                f"--teacher_top_k asks for {self.top_k}"
            )
        return best, of_label
