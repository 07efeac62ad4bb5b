"""Sample answers during training: what the model says to fixed prompts, as a table."""

import shutil
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import nn

from coati.models.generation import generate


def sample_answers(
    model: nn.Module,
    tokenizer,
    conversation,
    prompts: Sequence[str | list[dict[str, str]]],
    max_new_tokens: int = 64,
    stop_flag: Callable[[bool], bool] | None = None,
) -> list[tuple[str, str]]:
    """``[(prompt, likeliest answer), ...]`` in one left-padded batch; the loss's end marker is not part of the answer.

    ``model`` may be wrapped for training; where its forward pass contains collectives every rank calls this with the
    same prompts (or its own and a ``stop_flag`` that is shared, see :func:`coati.models.generation.generate`). A prompt
    is a question or a list of messages ({role, content}). ``conversation`` encodes them and knows the stop sequences.
    """
    if not prompts:
        return []
    dialogues = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    rows = [conversation.encode(dialogue, add_generation_prompt=True).input_ids for dialogue in dialogues]
    input_ids, mask = left_pad(rows, tokenizer.pad_token_id, next(model.parameters()).device)
    shared = {} if stop_flag is None else {"stop_flag": stop_flag}
    result = generate(
        model,
        input_ids,
        mask,
        stop_sequences=conversation.stop_ids,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        **shared,
    )
    answers = [without_stop(answer, conversation.stop_ids) for answer in result.answers()]
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    return [(dialogue[-1]["content"], text) for dialogue, text in zip(dialogues, texts, strict=True)]


def left_pad(rows: list[list[int]], pad: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both (B, longest), of rows that end together; the mask is 1 on a row's own tokens."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def without_stop(answer: list[int], stop_sequences: list[list[int]]) -> list[int]:
    """``answer`` without the stop sequence at its end, if there is one."""
    for stop in sorted(stop_sequences, key=len, reverse=True):
        if answer[-len(stop) :] == stop:
            return answer[: -len(stop)]
    return answer


def format_samples(samples: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Two columns, prompt and answer, in ``width`` characters (default: the terminal's), at most 6 lines each."""
    width = min(width or shutil.get_terminal_size((100, 24)).columns, 160)
    left = max(12, (width - 3) * 2 // 5)
    right = max(12, width - 3 - left)
    lines = [f"{'prompt':<{left}} | answer", f"{'-' * left}-+-{'-' * right}"]
    for prompt, answer in samples:
        cells = [_wrapped(prompt, left), _wrapped(answer, right)]
        height = max(map(len, cells))
        columns = [cell + [""] * (height - len(cell)) for cell in cells]
        lines += [f"{a:<{left}} | {b}".rstrip() for a, b in zip(*columns, strict=True)]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, max_lines=6, placeholder=" ...") or ["(empty)"]
