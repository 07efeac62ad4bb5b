"""The likeliest tokens at each place of prompts, as vLLM's ``prompt_logprobs`` gives them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coati.dataset.load.collator import attention_mask, pad
from coati.models.head import Head, head_unsupported
from coati.models.head_outputs import HeadRequest, outputs_from_logits
from coati.models.logprobs import IGNORE_INDEX

Listed = dict[str, dict[str, float]]  # id -> {"logprob": ...}
MOST = 1000


def prompt_logprobs(
    model: nn.Module, prompts: Sequence[Sequence[int]], top_k: int
) -> list[list[Listed | None]]:
    """For each prompt and each of its tokens the ``top_k`` likeliest ids and the token itself, of
    the whole distribution at temperature 1; the first token has none. Full logits are never formed
    where :class:`~coati.models.head.Head` serves the model."""
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = pad(prompts, width, 0).to(device)
    mask = attention_mask([len(prompt) for prompt in prompts], width).to(device)
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    request = HeadRequest(top_k=top_k)
    with torch.no_grad():
        if head_unsupported(model.config):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found = outputs_from_logits(logits, labels, request)
        else:
            head = Head.install(model)
            try:
                head.set(labels, request=request)
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                found = head.take()
            finally:
                head.remove()
    assert found.topk_ids is not None and found.topk_logps is not None
    rows = zip(
        found.topk_ids.tolist(), found.topk_logps.tolist(), found.logps[0].tolist(), strict=True
    )
    answers = []
    for prompt in prompts:
        places: list[Listed | None] = [None]
        for token in prompt[1:]:
            best, logps, own = next(rows)
            pairs = dict(zip(best, logps, strict=True)) | {token: own}
            places.append({str(id): {"logprob": logp} for id, logp in pairs.items()})
        answers.append(places)
    return answers


def asked_top_k(body: Any, vocabulary: int) -> int | None:
    """``prompt_logprobs`` of a request. Raises ValueError for what is none."""
    found = body.get("prompt_logprobs")
    most = min(MOST, vocabulary)
    if found is None:
        return None
    if type(found) is not int or not 1 <= found <= most:
        raise ValueError(
            f"prompt_logprobs: expected a whole number of 1 to {most}, found {found!r}"
        )
    return found
