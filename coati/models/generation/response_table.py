"""Batches of prompts and readable responses: left padding, removing the stop sequence, and a table
of samples."""

from collections.abc import Sequence

import torch

from coati.utils.text_table import table, terminal_width


def left_pad(
    rows: list[list[int]], pad: int, device: torch.device | str = "cpu", width: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both (B, longest, or ``width`` if that is more), of rows that end together; the
    mask is 1 on a row's own tokens."""
    width = max(width, *map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def without_stop(response: list[int], stop_sequences: list[list[int]]) -> list[int]:
    """``response`` without the stop sequence at its end, if there is one."""
    for stop in sorted(stop_sequences, key=len, reverse=True):
        if response[-len(stop) :] == stop:
            return response[: -len(stop)]
    return response


def format_samples(samples: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Two columns, prompt and response, in ``width`` places (default: the terminal's), at most 6
    lines each."""
    width = terminal_width(width)
    left = (width - 3) * 2 // 5
    rows = [[prompt or " ", response or " "] for prompt, response in samples]
    return table(["prompt", "response"], rows, [left, width - 3 - left], [False, False])
