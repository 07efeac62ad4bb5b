"""Experience as models take it, and their numbers back at the actions.

A model gets rows padded on the right, where its numbers do not depend on the padding, or, from the
engine, rows laid end to end. What it says is read off in the order of rows and their actions, which
both forms keep.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.experience_maker.experience import Experience
from coati.models.logprobs import IGNORE_INDEX, right_pad_order
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.objective import Batch
from coati.parallel.token_budget import Cuts, restored


def policy_batch(experience: Experience) -> Batch:
    """``input_ids, attention_mask, labels`` (B, S): the labels are the actions' tokens, -100
    elsewhere."""
    order = _order(experience)
    labels = experience.labels().gather(1, order)
    return _rows(experience, order) | {"labels": labels}


def critic_batch(experience: Experience) -> Batch:
    """``input_ids, attention_mask`` and ``states`` (B, S) bool: the positions whose next token is
    an action."""
    order = _order(experience)
    labels = experience.labels().gather(1, order)
    return _rows(experience, order) | {"states": F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))}


def reward_batch(experience: Experience) -> Batch:
    """``input_ids, attention_mask`` (B, S)."""
    return _rows(experience, _order(experience))


def _order(experience: Experience) -> Tensor:
    return right_pad_order(experience.attention_mask)[:, : max(int(experience.lengths().max()), 2)]


def _rows(experience: Experience, order: Tensor) -> Batch:
    mask = experience.attention_mask.gather(1, order)
    return {"input_ids": experience.sequences.gather(1, order), "attention_mask": mask.long()}


def to_actions(flat: Tensor, action_mask: Tensor) -> Tensor:
    """(n,) numbers of the n actions, row by row -> (B, A) fp32, 0 where ``action_mask`` (B, A) is
    not set."""
    mask = action_mask.bool()
    return torch.zeros(mask.shape, dtype=torch.float32, device=flat.device).masked_scatter(
        mask, flat.float()
    )


def values_at(outputs: Tensor, batch: Batch) -> Tensor:
    """(n,) values of the states before the actions, from a critic's (B, S), or (1, T) of rows laid
    end to end."""
    if outputs.shape == batch["states"].shape:
        return outputs[batch["states"]]
    return outputs[0][batch["states"][batch["attention_mask"].bool()]]


def _unchanged(outputs: Tensor, batch: Batch) -> Tensor:
    return outputs


def action_logprobs(
    model: InferenceModel, experience: Experience, batch_size: int | None = None
) -> Tensor:
    """(B, A) log-probs of the actions under ``model``, 0 where masked. ``batch_size``: a forward
    takes as many tokens as so many of the longest rows have."""
    with model.on_device():
        return _at_actions(model, experience, batch_size, policy_batch, _unchanged)


def state_values(
    critic: InferenceModel, experience: Experience, batch_size: int | None = None
) -> Tensor:
    """(B, A) values of the states before the actions, 0 where masked; ``batch_size`` as of
    :func:`action_logprobs`."""
    return _at_actions(critic, experience, batch_size, critic_batch, values_at)


def scores(
    reward_model: InferenceModel, experience: Experience, batch_size: int | None = None
) -> Tensor:
    """(B,) scores of the whole rows; ``batch_size`` as of :func:`action_logprobs`."""
    cuts = _cuts(reward_model, experience, batch_size)
    with reward_model.on_device():
        found = [
            reward_model.forward_only(reward_batch(experience.select(rows)), _unchanged)
            for rows in cuts
        ]
    return restored(found, cuts)


def _at_actions(
    model: InferenceModel,
    experience: Experience,
    batch_size: int | None,
    batch_of: Callable[[Experience], Batch],
    read: Callable[[Tensor, Batch], Tensor],
) -> Tensor:
    """(B, A) of what ``read`` gives for each action of the batches of ``experience``."""
    cuts = _cuts(model, experience, batch_size)
    found = []
    for rows in cuts:
        part = experience.select(rows)
        flat = model.forward_only(batch_of(part), read)
        found.append(to_actions(flat, part.action_mask.to(flat.device)))
    return restored(found, cuts)


def _cuts(model: InferenceModel, experience: Experience, batch_size: int | None) -> Cuts:
    lengths = experience.lengths().tolist()
    return model.token_budget(lengths, batch_size).cut(lengths)


def sum_over(engine: Engine) -> Callable[[Tensor], Tensor]:
    """A :data:`~coati.models.policy_loss.ReduceSum` over the data-parallel shares of ``engine``;
    processes that share rows count once."""
    return engine.sum_tensor_over_dp
