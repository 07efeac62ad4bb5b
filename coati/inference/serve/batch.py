"""Rows of unequal age continued together: one may join, another leave, between any two tokens of
the others."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from coati.models.generation.decoder import accepted_by, cache_for, call_with_cache
from coati.models.generation.mkl_prepack import PAYS_AFTER, MklPrepacked
from coati.models.generation.sampling import Sampling, choose
from coati.models.sdpa import teach_sdpa

_NO_LIMIT = 2**31


@dataclass(eq=False)
class Row:
    """One prompt being continued. ``tokens``: what came of it so far, the stop sequence included.

    ``seed`` None draws differently each time; otherwise the answer depends on the row alone, not on
    its neighbors.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_sequences: list[list[int]] = field(default_factory=list)
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.noise = np.random.default_rng(self.seed)

    @property
    def stopped(self) -> bool:
        """Whether the last tokens are a stop sequence."""
        return any(self.tokens[-len(stop) :] == stop for stop in self.stop_sequences)

    @property
    def ended(self) -> bool:
        return len(self.tokens) >= self.max_new_tokens or self.stopped


class Batch:
    """The rows that a model continues now. All end at the same column of the cache, whatever their
    length."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.accepted = model, accepted_by(model)
        self.device = next(model.parameters()).device
        self.rows: list[Row] = []
        # Clients come and go: only a number of rows that stays for a while is worth it.
        self.prepacked = MklPrepacked(model, patience=PAYS_AFTER)
        if self.device.type == "cpu":
            teach_sdpa()
        self.clear()

    def clear(self) -> None:
        """Forget all rows, and what the model has seen of them."""
        self.rows = []
        self.prepacked.end()
        self._cache = None
        self._start = 0  # the first column that the model is shown
        self._seen = torch.zeros(
            0, 0, dtype=torch.long, device=self.device
        )  # (rows, columns shown)
        self._positions = torch.zeros(
            0, dtype=torch.long, device=self.device
        )  # of the next token of each row

    @torch.no_grad()
    def join(self, row: Row) -> None:
        """The prompt of ``row`` goes through the model, alone; the row has its first token and,
        unless that ends it, is one of ``rows``."""
        ids = torch.tensor([row.prompt], device=self.device)
        cache, mask = cache_for(self.model, 1, _NO_LIMIT), torch.ones_like(ids)
        logits = call_with_cache(
            self.model, self.accepted, cache, ids, mask, mask.cumsum(dim=1) - 1
        )
        self._choose(logits[:, -1].float(), [row])
        if row.ended:
            return
        if self.rows:
            self._cache.join(cache)
        else:
            self._cache = cache
        columns = max(self._seen.shape[1], mask.shape[1])
        self._seen = torch.cat([_wide(self._seen, columns), _wide(mask, columns)])
        self._positions = torch.cat([self._positions, mask.sum(dim=1)])
        self._start = 0
        self.rows.append(row)

    @torch.no_grad()
    def step(self) -> None:
        """One token more for each of ``rows``; which of them have ended is for the caller to
        ask."""
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        self._seen = torch.cat([self._seen, torch.ones_like(last)], dim=1)
        positions = self._positions[:, None]
        self.prepacked.use(len(self.rows))
        logits = call_with_cache(
            self.model, self.accepted, self._cache, last, self._seen, positions
        )
        self._positions = self._positions + 1
        self._choose(logits[:, -1].float(), self.rows)

    def leave(self, gone: set[Row]) -> None:
        """Rows that are not continued; the last ones take their slots."""
        staying = [index for index, row in enumerate(self.rows) if row not in gone]
        if not staying:
            return self.clear()
        if len(staying) == len(self.rows):
            return None
        count = len(staying)
        movers = iter(index for index in staying if index >= count)
        slots = [index if self.rows[index] not in gone else next(movers) for index in range(count)]
        survivors = torch.tensor(slots, device=self.device)
        self._cache.keep(survivors)
        self.rows = [self.rows[index] for index in slots]
        self._seen, self._positions = self._seen[survivors], self._positions[survivors]
        unused = int(self._seen.argmax(dim=1).min())
        if unused and self._cache.trim(self._start + unused):
            self._start, self._seen = self._start + unused, self._seen[:, unused:]
        return None

    def _choose(self, logits: Tensor, rows: list[Row]) -> None:
        """The next token of each of ``rows`` from ``logits`` (rows, V), those of like settings
        together."""
        alike: dict[Sampling, list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(row.sampling, []).append(index)
        for sampling, members in alike.items():
            chosen = [rows[index] for index in members]
            uniform = None
            if sampling.do_sample:
                uniform = torch.tensor(
                    [row.noise.random() for row in chosen], dtype=torch.float64, device=self.device
                )
            seen = None if sampling.repetition_penalty == 1 else self._ids(chosen)
            tokens, _ = choose(
                logits if len(members) == len(rows) else logits[members], sampling, uniform, seen
            )
            for row, token in zip(chosen, tokens.tolist(), strict=True):
                row.tokens.append(token)

    def _ids(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Prompts and answers (rows, T) and their mask, for the repetition penalty."""
        ids = [torch.tensor(row.prompt + row.tokens) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        padded = (
            torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(self.device)
            for part in (ids, masks)
        )
        return tuple(padded)


def _wide(mask: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(mask, (columns - mask.shape[1], 0))
