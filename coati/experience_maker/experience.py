"""Responses and what is known of them, in the one layout that rollout and update share.

A row is [padding | prompt | response | padding]: prompts end, and responses begin, in the same
column. Position j of every (B, A) tensor is the action that produced token j of the response; the
state before it is the position of the token to its left. So V_j, like the log-prob of action j, is
read one column before token j.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.models.logprobs import IGNORE_INDEX

# How a field follows when rows are padded: on both sides, on the right, or not at all.
_SEQUENCE = ("sequences", "attention_mask")
_ROW = ("reward", "sample_index", "version")


@dataclass
class Experience:
    """B responses of up to A actions, after prompts of up to P tokens.

    Args:
        sequences: (B, P + A) token ids; any id at padding.
        attention_mask: (B, P + A) bool, True at real tokens; derived from lengths, not from ids.
        action_mask: (B, A) bool, the actions that count: a response's tokens, its stop sequence
            included.
        action_log_probs: (B, A) of the policy that sampled, log_softmax(logits / temperature).
        reward: (B,) the score, before KL and clipping.
        sample_index: (B,) index of the response among all of its episode, over all ranks
            (:func:`sample_indices`).
        kl: (B, A) estimated KL from the reference.
        advantages, returns, values: (B, A); the last two are None without a critic.
        reference_log_probs: (B, A), if the loss has a KL term.
        sampled_log_probs: (B, A) by the weights that sampled, where ``action_log_probs`` are those
            of others: of the policy as it was when the update began.
        version: (B,) optimizer steps behind the weights that sampled.

    Raises:
        ValueError: for tensors whose shapes do not fit together.
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    action_log_probs: Tensor
    reward: Tensor
    sample_index: Tensor
    kl: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    reference_log_probs: Tensor | None = None
    sampled_log_probs: Tensor | None = None
    version: Tensor | None = None

    def __post_init__(self) -> None:
        batch, width = self.sequences.shape
        actions = self.action_mask.shape[1]
        if actions >= width:
            raise ValueError(
                f"sequences of {width} tokens leave no prompt before {actions} actions"
            )
        for name, tensor in self.tensors().items():
            expected = (
                (batch,) if name in _ROW else (batch, width if name in _SEQUENCE else actions)
            )
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"experience: {name} has shape {tuple(tensor.shape)}, expected {expected}"
                )

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_actions(self) -> int:
        """A, columns of the responses."""
        return self.action_mask.shape[1]

    @property
    def prompt_width(self) -> int:
        """P, columns of the prompts."""
        return self.sequences.shape[1] - self.num_actions

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _map(self, change) -> "Experience":
        return Experience(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def to_device(self, device: torch.device | str) -> "Experience":
        """With all tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "Experience":
        """With all tensors in pinned memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def select(self, index: Tensor | Sequence[int]) -> "Experience":
        """The rows ``index``, in that order."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.sequences.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def lengths(self) -> Tensor:
        """(B,) real tokens of each row, prompt and response."""
        return self.attention_mask.sum(1)

    def response_lengths(self) -> Tensor:
        """(B,) tokens of each response, whether its actions still count or not."""
        return self.attention_mask[:, self.prompt_width :].sum(1)

    def labels(self) -> Tensor:
        """(B, P + A): the token of each action, -100 elsewhere; what the vocabulary head is told to
        score."""
        actions = self.sequences[:, self.prompt_width :].masked_fill(
            ~self.action_mask.bool(), IGNORE_INDEX
        )
        return F.pad(actions, (self.prompt_width, 0), value=IGNORE_INDEX)

    def trimmed(self) -> "Experience":
        """Without the columns that are padding in every row; one prompt and one response column at
        least stay."""
        if not len(self):
            return self
        real = self.attention_mask.bool()
        prompts = int(real[:, : self.prompt_width].sum(1).max())
        actions = int(real[:, self.prompt_width :].sum(1).max())
        left = self.prompt_width - max(prompts, 1)
        right = self.num_actions - max(actions, 1)
        return self._resized(-left, -right)

    def _resized(self, left: int, right: int) -> "Experience":
        """``left`` columns more before the prompts, ``right`` more after the responses; fewer when
        negative."""
        changed = {}
        for name, tensor in self.tensors().items():
            if name not in _ROW:
                changed[name] = F.pad(tensor, (left if name in _SEQUENCE else 0, right))
        return Experience(**(self.tensors() | changed))


def masks(prompt_mask: Tensor, lengths: Tensor, actions: int) -> tuple[Tensor, Tensor]:
    """attention_mask (B, P + A) and action_mask (B, A), both bool, from the prompts' mask (B, P)
    and the ``lengths`` (B,) of the responses, stop sequence included. Lengths, not token ids: pad
    may equal eos."""
    action_mask = torch.arange(actions, device=lengths.device) < lengths[:, None]
    return torch.cat([prompt_mask.bool(), action_mask], dim=1), action_mask


def at_actions(per_token: Tensor, actions: int) -> Tensor:
    """(B, A) from what a model says at each position (B, P + A): what it says of the state before
    each action."""
    return per_token[:, -actions - 1 : -1]


def logprobs_at_actions(logprobs: Tensor, actions: int) -> Tensor:
    """(B, A) from log-probs (B, P + A - 1) whose column t belongs to token t + 1
    (:func:`~coati.models.logprobs.scatter_token_logprobs`)."""
    return logprobs[:, logprobs.shape[1] - actions :]


def sample_indices(step: int, steps: int, first: int, count: int) -> list[int]:
    """The indices of ``count`` responses of collect step ``step`` of ``steps``, from the ``first``
    of all ranks on.

    Response i of step s has the index i steps + s. What is sampled
    (:func:`~coati.models.generation.row_noise.row_noise`) and when it is trained on follow from it,
    not from the rank that holds it.
    """
    return [(first + i) * steps + step for i in range(count)]


def concatenate(parts: Sequence[Experience]) -> Experience:
    """One experience of all rows, padded to the longest prompt and response. Raises ValueError for
    no parts, or parts that do not hold the same fields."""
    if not parts:
        raise ValueError("there is no experience to concatenate")
    if len(kinds := {frozenset(part.tensors()) for part in parts}) > 1:
        different = frozenset.union(*kinds) - frozenset.intersection(*kinds)
        raise ValueError(f"only some of the experiences hold {', '.join(sorted(different))}")
    prompts = max(part.prompt_width for part in parts)
    actions = max(part.num_actions for part in parts)
    wide = [
        part._resized(prompts - part.prompt_width, actions - part.num_actions) for part in parts
    ]
    return Experience(
        **{name: torch.cat([getattr(part, name) for part in wide]) for name in wide[0].tensors()}
    )


def split_experience_batch(experience: Experience) -> list[Experience]:
    """One experience for each row, without its padding."""
    return [experience.select([row]).trimmed() for row in range(len(experience))]


def make_experience_batch(items: Sequence[Experience]) -> Experience:
    """The inverse of :func:`split_experience_batch`."""
    return concatenate(items)
