"""Continuous batching: rows that join and leave between two tokens of the others are continued as
if they were alone."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from coati.models.generation.decoder import Decoder
from coati.models.generation.loop import generate
from coati.models.generation.sampling import Sampling
from tests.tiny import tiny_llama

GREEDY = Sampling(do_sample=False)


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=384, n_positions=512)
    ).eval()


MODELS = {
    "llama": lambda: tiny_llama().eval(),
    "gpt2": tiny_gpt2,
}  # GPT-2 knows only caches that are tuples


def prompt(length, salt=0):
    return [(7 * index + 13 * salt) % 380 + 3 for index in range(length)]


@dataclass(eq=False)
class Row:
    """A prompt and what came of it."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_sequences: list[list[int]] = field(default_factory=list)
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def ended(self):
        return self.stopped or len(self.tokens) >= self.max_new_tokens


class Batch:
    """Rows in a decoder, as a server keeps them."""

    def __init__(self, model):
        self.model, self.decoder, self.known = model, None, []

    @property
    def rows(self):
        return (
            [] if self.decoder is None else [self.known[n] for n in self.decoder.row_ids.tolist()]
        )

    def _take(self, decoder):
        numbers, step = decoder.row_ids.tolist(), decoder.step()
        for number, token, stopped in zip(
            numbers, step.tokens.tolist(), step.stopped.tolist(), strict=True
        ):
            self.known[number].tokens.append(token)
            self.known[number].stopped = stopped

    def step(self):
        self._take(self.decoder)

    def join(self, row):
        ids = torch.tensor([row.prompt])
        noise = np.random.default_rng(row.seed).random((1, row.max_new_tokens))
        decoder = Decoder(
            self.model,
            ids,
            torch.ones_like(ids),
            row.sampling,
            row.stop_sequences,
            noise=torch.from_numpy(noise),
            row_ids=torch.tensor([len(self.known)]),
        )
        self.known.append(row)
        self._take(decoder)
        if self.decoder is None:
            self.decoder = decoder
        else:
            self.decoder.join(decoder)

    def leave(self, gone):
        alive = [row not in gone for row in self.rows]
        if not any(alive):
            self.decoder = None
        else:
            self.decoder.leave(torch.tensor(alive))


def alone(model, row):
    ids = torch.tensor([row.prompt])
    sampling = {
        **vars(row.sampling),
        "stop_sequences": row.stop_sequences,
        "max_new_tokens": row.max_new_tokens,
    }
    return generate(model, ids, **sampling).responses()[0]


def run(batch, arrivals):
    """Rows of ``arrivals`` {step: rows} continued until all have ended."""
    for step in range(200):
        if batch.rows:
            batch.step()
        for row in arrivals.get(step, ()):
            batch.join(row)
        batch.leave({row for row in batch.rows if row.ended})
        if not batch.rows and step >= max(arrivals):
            return
    raise AssertionError("the rows do not end")


@pytest.mark.parametrize("family", MODELS)
def test_greedy_answers_are_those_of_single_prompts(family):
    model = MODELS[family]()
    # A longer prompt joins shorter ones, a shorter one longer ones; the first leaves while others
    # go on.
    first, long, short = (
        Row(prompt(5), GREEDY, 9),
        Row(prompt(40, 1), GREEDY, 25),
        Row(prompt(3, 2), GREEDY, 30),
    )
    late = Row(prompt(20, 3), GREEDY, 6)
    run(Batch(model), {0: [first], 4: [long, short], 30: [late]})
    for row in (first, long, short, late):
        assert row.tokens == alone(model, row)


def test_columns_that_nobody_uses_any_more_are_left_behind():
    model = tiny_llama().eval()
    batch, long, short = Batch(model), Row(prompt(60), GREEDY, 2), Row(prompt(4, 1), GREEDY, 20)
    batch.join(long)
    batch.join(short)
    batch.step()
    decoder = batch.decoder
    # A row holds the token that the cache is to see next.
    assert decoder.mask.shape == (2, 62) and decoder.cache.get_seq_length() == 61
    batch.leave({long})
    assert decoder.mask.shape == (1, 6) and decoder.cache.get_seq_length() == 5
    run(batch, {0: []})
    assert short.tokens == alone(model, short)


def test_a_stop_sequence_ends_a_row_and_is_part_of_it():
    model = tiny_llama().eval()
    free = Row(prompt(6), GREEDY, 12)
    run(Batch(model), {0: [free]})
    stop = free.tokens[3:5]
    row = Row(prompt(6), GREEDY, 12, [stop])
    run(Batch(model), {0: [row]})
    assert row.stopped and row.tokens[-2:] == stop and row.tokens == free.tokens[: len(row.tokens)]


def test_a_row_that_ends_with_its_first_token_is_never_in_the_batch():
    batch, row = Batch(tiny_llama().eval()), Row(prompt(6), GREEDY, 1)
    batch.join(row)
    batch.leave({row for row in batch.rows if row.ended})
    assert batch.rows == [] and len(row.tokens) == 1


def test_rows_of_unlike_settings_are_sampled_each_by_its_own():
    """Three kinds of sampling and stop sequences in one batch; slots change hands meanwhile."""
    model = tiny_llama().eval()
    kinds = [GREEDY, Sampling(temperature=1.4), Sampling(top_k=7, repetition_penalty=1.5)]
    crowd = [
        Row(prompt(3 + 2 * n, n), kinds[n % 3], 6 + 3 * n, [[n], [40 + n, 5]], seed=n)
        for n in range(6)
    ]
    run(Batch(model), {0: crowd[:2], 3: crowd[2:5], 9: crowd[5:]})
    for row in crowd:
        single = Row(row.prompt, row.sampling, row.max_new_tokens, row.stop_sequences, row.seed)
        run(Batch(model), {0: [single]})
        assert row.tokens == single.tokens


def test_a_joined_batch_of_several_prompts_goes_on():
    """Decoders of several rows each, the second with equal prompts that share a prefill."""
    model = tiny_llama().eval()
    first = torch.tensor([prompt(4), prompt(4, 1)])
    second = torch.tensor([prompt(9, 2), prompt(9, 2), prompt(9, 3)])
    decoder = Decoder(model, first, torch.ones_like(first), GREEDY)
    made = [[token] for token in decoder.step().tokens.tolist()]
    for _ in range(3):
        for row, token in zip(made, decoder.step().tokens.tolist(), strict=True):
            row.append(token)
    other = Decoder(model, second, torch.ones_like(second), GREEDY, row_ids=torch.tensor([2, 3, 4]))
    made += [[token] for token in other.step().tokens.tolist()]
    decoder.join(other)
    assert decoder.row_ids.tolist() == [0, 1, 2, 3, 4]
    decoder.leave(torch.tensor([False, True, True, True, True]))
    assert decoder.row_ids.tolist() == [4, 1, 2, 3]
    for _ in range(4):
        for row, token in zip(
            decoder.row_ids.tolist(), decoder.step().tokens.tolist(), strict=True
        ):
            made[row].append(token)
    for row, ids in enumerate([*first, *second]):
        single = generate(
            model, ids[None], stop_sequences=[], max_new_tokens=len(made[row]), do_sample=False
        )
        assert single.responses() == [made[row]]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.5), Sampling(top_k=20, top_p=0.9, repetition_penalty=1.3)]
)
def test_a_seed_decides_whatever_the_neighbors_are(sampling):
    model = tiny_llama().eval()
    single, crowded = (Row(prompt(6), sampling, 15, seed=5) for _ in range(2))
    run(Batch(model), {0: [single]})
    others = [
        Row(prompt(9, salt), Sampling(temperature=0.5 + salt), 10, seed=salt)
        for salt in range(1, 4)
    ]
    run(Batch(model), {0: others[:1], 3: [crowded, *others[1:]]})
    assert crowded.tokens == single.tokens
    other_seed = Row(prompt(6), sampling, 15, seed=6)
    run(Batch(model), {0: [other_seed]})
    assert other_seed.tokens != single.tokens


def test_the_repetition_penalty_sees_prompt_and_answer():
    model = tiny_llama().eval()
    harsh = Sampling(do_sample=False, repetition_penalty=50.0)
    row = Row(prompt(10), harsh, 30)
    run(Batch(model), {0: [Row(prompt(4, 1), GREEDY, 20)], 2: [row]})
    assert len(set(row.tokens)) == 30 and not set(row.tokens) & set(row.prompt)
    assert row.tokens == alone(model, row)


def test_a_temperature_of_0_is_greedy():
    assert Sampling.at(0) == Sampling(do_sample=False)
    assert Sampling.at(0.5, 3, 0.9, 1.2) == Sampling(True, 0.5, 3, 0.9, 1.2)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Sampling.at(-1.0)
