"""generate: equal to transformers token for token, fed once, stopped where it should."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from coati.models.generation.loop import generate, generate_streaming
from coati.models.generation.row_noise import row_noise
from coati.models.generation.sampling import Sampling, choose, keep_likely
from coati.models.padding_free import PaddingFree
from coati.models.sdpa import decode_attention
from tests.models.families import tiny_bloom, tiny_gpt2, tiny_opt, tiny_qwen2
from tests.tiny import tiny_llama

PROMPTS = [[5, 17, 300, 42, 9, 11], [7, 8], [1, 2, 3, 250]]
NO_STOP = {"stop_sequences": [], "do_sample": False}


def left_padded(rows, pad=2):
    """pad is a token that occurs in prompts on purpose: the mask comes from lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def reference(model, ids, mask, n, **kwargs):
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    return model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, **kwargs)


def tied_llama():
    return tiny_llama(tie=True)


def until_a_tie(rows, logits, closest=1e-4):
    """Each row of (B, N) up to the first position whose two best of (B, N, V) logits are closer
    than that."""
    best = logits.topk(2).values
    ties = best[..., 0] - best[..., 1] < closest
    return [
        row[: int(tie.long().argmax()) if tie.any() else len(row)]
        for row, tie in zip(rows, ties, strict=True)
    ]


@pytest.mark.parametrize(
    "make", [tiny_llama, tied_llama, tiny_qwen2, tiny_opt, tiny_bloom, tiny_gpt2]
)
def test_greedy_is_transformers_token_for_token_up_to_a_tie(make):
    model, (ids, mask) = make(), left_padded(PROMPTS)
    ours = generate(model, ids, mask, max_new_tokens=40, **NO_STOP).sequences
    chosen, model.config._attn_implementation = model.config._attn_implementation, "eager"
    theirs = reference(model, ids, mask, 40, output_logits=True, return_dict_in_generate=True)
    model.config._attn_implementation = chosen
    expected = until_a_tie(theirs.sequences[:, 6:].tolist(), torch.stack(theirs.logits, dim=1))
    assert sum(map(len, expected)) > 60, "too many ties to compare anything"
    assert [
        row[: len(part)] for row, part in zip(ours[:, 6:].tolist(), expected, strict=True)
    ] == expected


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_opt, tiny_bloom, tiny_gpt2])
def test_rows_that_end_leave_and_the_others_do_not_notice(make):
    """Rows of unequal prompts that end at unequal times: each is what it is alone, log-probs
    included."""
    model, (ids, mask) = make(), left_padded([*PROMPTS, [9, 9], [31, 32, 33, 34, 35]])
    options = {"stop_sequences": [[token] for token in range(0, 300, 8)], "max_new_tokens": 20}
    options |= {"return_logprobs": True, "temperature": 1.5}
    noise = row_noise(0, 0, range(len(ids)), 20)
    batch = generate(model, ids, mask, noise=noise, **options)
    assert len(set(batch.lengths.tolist())) >= 4
    assert batch.lengths.tolist() != sorted(batch.lengths.tolist(), reverse=True), (
        "no row moved to another's place"
    )
    for row, answer in enumerate(batch.responses()):
        prompt = ids[row, mask[row].bool()][None]
        alone = generate(model, prompt, noise=noise[row : row + 1], **options)
        assert alone.responses() == [answer]
        assert torch.allclose(alone.logprobs[0], batch.logprobs[row, : len(answer)], atol=1e-5)
        assert (batch.logprobs[row, len(answer) :] == 0).all()


def test_one_row_alone_is_the_row_of_the_batch():
    model, (ids, mask) = tiny_llama(), left_padded(PROMPTS)
    batch = generate(model, ids, mask, max_new_tokens=10, **NO_STOP).responses()
    for row, answer in zip(PROMPTS, batch, strict=True):
        assert generate(model, torch.tensor([row]), max_new_tokens=10, **NO_STOP).responses() == [
            answer
        ]


def test_repetition_penalty_is_transformers():
    model, (ids, mask) = tiny_llama(), left_padded([PROMPTS[0]])
    ours = generate(
        model, ids, mask, max_new_tokens=20, repetition_penalty=1.3, **NO_STOP
    ).sequences
    theirs = reference(model, ids, mask, 20, repetition_penalty=1.3)
    assert torch.equal(ours, theirs) and not torch.equal(ours, reference(model, ids, mask, 20))


class Watched(nn.Module):
    """A wrapper as plugins make them; keeps what every call was fed and what it returned."""

    def __init__(self, module):
        super().__init__()
        self.module, self.fed, self.logits, self.modes = module, [], [], []
        self.rows, self.columns = [], []

    def forward(self, **inputs):
        outputs = self.module(**inputs)
        self.fed.append(inputs["input_ids"].shape[1])
        self.rows.append(len(inputs["input_ids"]))
        self.columns.append(
            inputs["attention_mask"].shape[1] if "attention_mask" in inputs else None
        )
        self.logits.append(outputs.logits[:, -1])
        self.modes.append((self.module.training, torch.is_grad_enabled()))
        return outputs


def test_the_prompt_is_fed_once_then_one_token_at_a_time_and_logits_are_those_of_the_full_forward():
    model = Watched(tiny_llama())
    ids, mask = left_padded(PROMPTS)
    result = generate(model, ids, mask, max_new_tokens=5, **NO_STOP)
    assert model.fed == [6, 1, 1, 1, 1]
    for row, prompt in enumerate(PROMPTS):
        whole = torch.tensor([prompt + result.responses()[row]])
        with torch.no_grad():
            full = model.module(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(torch.stack(model.logits, dim=1)[row], full, atol=1e-5)


def test_only_living_rows_are_fed_and_columns_of_padding_alone_left_behind():
    model = Watched(tiny_llama())
    ids, mask = left_padded(PROMPTS)  # of 6, 2 and 4 tokens
    answers = generate(model, ids, mask, max_new_tokens=9, **NO_STOP).responses()
    model.rows, model.columns = [], []
    stops = [answers[0][:3], answers[2][:6]]
    found = generate(model, ids, mask, stop_sequences=stops, max_new_tokens=9, do_sample=False)
    assert found.responses() == [answers[0][:3], answers[1], answers[2][:6]]
    assert model.rows == [3, 3, 3, 2, 2, 2, 1, 1, 1]
    assert model.columns == [
        6,
        7,
        8,
        7,
        8,
        9,
        8,
        9,
        10,
    ]  # the longest prompt of those that live, and its answer


def test_equal_prompts_go_through_the_model_once():
    model, prompt = Watched(tiny_llama()), PROMPTS[0]
    ids, mask = left_padded([prompt, PROMPTS[1], prompt, prompt])
    options = {"stop_sequences": [], "max_new_tokens": 4, "return_logprobs": True}
    noise = row_noise(0, 0, range(4), 4)
    group = generate(model, ids, mask, noise=noise, **options)
    assert model.rows == [2, 4, 4, 4] and len({tuple(answer) for answer in group.responses()}) == 4
    alone = generate(model, torch.tensor([prompt]), noise=noise[2:3], **options)
    assert alone.responses() == group.responses()[2:3] and torch.allclose(
        alone.logprobs[0], group.logprobs[2], atol=1e-5
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_prompts_go_in_without_padding_where_the_model_can_be_given_them_so(make):
    model, (ids, mask) = Watched(make()), left_padded(PROMPTS)
    padded = generate(model, ids, mask, max_new_tokens=5, return_logprobs=True, **NO_STOP)
    model.fed = []
    padding_free = PaddingFree.of(model.module)
    found = generate(
        model,
        ids,
        mask,
        max_new_tokens=5,
        return_logprobs=True,
        padding_free=padding_free,
        **NO_STOP,
    )
    assert model.fed == [6 + 2 + 4, 1, 1, 1, 1]
    assert torch.equal(found.sequences, padded.sequences)
    assert torch.allclose(found.logprobs, padded.logprobs, atol=1e-5)


def test_the_cache_grows_with_the_answers(monkeypatch):
    model, (ids, mask) = tiny_llama(), left_padded(PROMPTS)
    expected = generate(model, ids, mask, max_new_tokens=12, **NO_STOP).sequences
    monkeypatch.setattr("coati.models.generation.kv_cache.GROWTH", 5)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=12, **NO_STOP).sequences, expected)


def test_ranks_agree_on_tokens_and_log_probs():
    """The tokens of the first rank are taken even where this rank's logits say otherwise."""
    model, asked = tiny_llama(), []

    def of_the_first_rank(tensor):
        asked.append(tensor.clone())
        return torch.full_like(tensor, 33)

    found = generate(
        model,
        torch.tensor([[5, 6]]),
        max_new_tokens=3,
        synchronize=of_the_first_rank,
        return_logprobs=True,
        **NO_STOP,
    )
    assert found.responses() == [[33, 33, 33]] and found.logprobs.tolist() == [[33.0] * 3]
    assert [tuple(tensor.shape) for tensor in asked] == [(1,), (1,), (1,), (1, 3)] and asked[
        0
    ].item() != 33


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_decode_attention_reads_the_cache_where_it_lies(groups, masked):
    torch.manual_seed(0)
    query, cache = torch.randn(2, 2 * groups, 1, 8), torch.randn(2, 4, 2, 20, 8)
    key, value = cache[0, :2, :, 3:9], cache[1, :2, :, 3:9]
    mask = torch.zeros(2, 1, 1, 7)
    mask[0, ..., :2] = torch.finfo(torch.float32).min
    found = decode_attention(query, key, value, mask if masked else None, scale=0.5)
    repeated = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask[..., :6] if masked else None, scale=0.5
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_dropout_and_gradients_are_off_while_sampling_and_only_then():
    model = Watched(tiny_llama(attention_dropout=0.5)).train()
    model.module.model.layers[0].eval()
    expected = [module.training for module in model.modules()]
    generate(model, torch.tensor([[5, 6]]), max_new_tokens=2, **NO_STOP)
    assert set(model.modes) == {(False, False)}
    assert [module.training for module in model.modules()] == expected and torch.is_grad_enabled()


class Scripted(nn.Module):
    """Says what it is told: the row whose prompt begins with r + 1 answers ``script[r]``, by the
    number of tokens since its prompt. Which row stands where it reads in the cache, as attention
    does."""

    class config:
        max_position_embeddings = 64

    def __init__(self, script, prompt_length, vocabulary=50):
        super().__init__()
        self.script, self.prompt_length, self.vocabulary = script, prompt_length, vocabulary

    def forward(self, input_ids=None, past_key_values=None, cache_position=None):
        from types import SimpleNamespace

        states = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(states, states, 0)
        step = int(cache_position[-1]) + 1 - self.prompt_length
        logits = torch.full((len(input_ids), 1, self.vocabulary), -5.0)
        for slot, first in enumerate(keys[:, 0, 0, 0].long().tolist()):
            script = self.script[min(first, len(self.script)) - 1]  # an idle row has no prompt
            logits[slot, 0, script[min(step, len(script) - 1)]] = 5.0
        return SimpleNamespace(logits=logits)


def test_rows_stop_at_their_stop_sequence_and_the_batch_when_all_have_stopped():
    script = [[9, 7, 8, 20], [7, 9, 30, 31], [7, 7, 7, 8]]  # stops: [7, 8] or [30]
    prompts = torch.tensor([[1, 2], [2, 2], [3, 2]])
    result = generate(
        Scripted(script, 2),
        prompts,
        stop_sequences=[[7, 8], [30]],
        max_new_tokens=9,
        do_sample=False,
    )
    assert result.responses() == [[9, 7, 8], [7, 9, 30], [7, 7, 7, 8]]
    assert result.sequences[:, 2:].tolist() == [[9, 7, 8, 0], [7, 9, 30, 0], [7, 7, 7, 8]]
    assert result.stopped.all() and result.lengths.tolist() == [3, 3, 4]


def test_a_stop_sequence_does_not_begin_in_the_prompt():
    result = generate(
        Scripted([[8, 3, 7, 8]], 2),
        torch.tensor([[1, 7]]),
        stop_sequences=[[7, 8]],
        max_new_tokens=9,
        do_sample=False,
    )
    assert result.responses() == [[8, 3, 7, 8]]


def test_a_row_at_the_limit_has_not_stopped():
    result = generate(
        Scripted([[3, 4], [7, 7]], 1),
        torch.tensor([[1], [2]]),
        stop_sequences=[[7]],
        max_new_tokens=3,
        do_sample=False,
    )
    assert result.stopped.tolist() == [False, True] and result.lengths.tolist() == [3, 1]


def test_ranks_leave_the_loop_together():
    asked = []

    def until_the_other_rank_has_stopped(mine):
        asked.append(mine)
        return mine and len(asked) >= 4

    result = generate(
        Scripted([[5, 7, 6]], 1),
        torch.tensor([[1]]),
        stop_sequences=[[7]],
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        stop_flag=until_the_other_rank_has_stopped,
    )
    assert asked == [False, True, True, True]
    assert result.responses() == [[5, 7]] and result.sequences.tolist() == [[1, 5, 7, 0, 0]]


def test_a_rank_with_shorter_limits_stays_in_the_loop():
    """Idle for longer than the model has positions: the other rank may have more of them left."""
    model = tiny_llama()
    model.config.max_position_embeddings = 8
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    asked = []

    def until_the_other_rank_is_through(mine):
        asked.append(mine)
        return mine and len(asked) >= 12

    def limited(**more):
        ids = torch.tensor([PROMPTS[0][:3], PROMPTS[0][1:4]])
        return generate(model, ids, max_new_tokens=5, limits=[2, 1], **NO_STOP, **more)

    result = limited(stop_flag=until_the_other_rank_is_through)
    assert asked == [False] + [True] * 11 and len(calls) == 12
    assert result.lengths.tolist() == [2, 1] and not result.stopped.any()
    assert result.responses() == limited().responses() and len(calls) == 14


def test_streaming_yields_the_same_tokens_and_the_stop_sequence():
    model = tiny_llama()
    whole = generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=8, **NO_STOP).responses()[0]
    stream = generate_streaming(model, torch.tensor([PROMPTS[0]]), max_new_tokens=8, **NO_STOP)
    assert list(stream) == whole
    short = generate_streaming(
        model,
        torch.tensor([PROMPTS[0]]),
        stop_sequences=[whole[2:4]],
        max_new_tokens=8,
        do_sample=False,
    )
    assert (
        list(short)
        == whole[: next(i for i in range(1, 8) if whole[i - 1 : i + 1] == whole[2:4]) + 1]
    )


def test_sampling_is_repeated_by_its_generator():
    model, ids = tiny_llama(), torch.tensor([PROMPTS[0]])

    def draw(seed):
        seeded = torch.Generator().manual_seed(seed)
        return generate(
            model, ids, stop_sequences=[], max_new_tokens=16, temperature=2.0, generator=seeded
        ).responses()

    assert draw(1) == draw(1) != draw(2)


def test_the_fewest_likely_tokens_are_kept():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    kept = lambda k, p: (keep_likely(logits, k, p)[0] > -torch.inf).tolist()  # noqa: E731
    assert kept(2, 1.0) == [True, False, True, False]
    assert kept(None, 0.5) == [True, False, False, False]  # 0.5 alone is the share asked for
    assert kept(None, 0.6) == [True, False, True, False]
    assert kept(1, 0.9) == [True, False, False, False]
    assert kept(0, 1.0) == kept(99, 1.0) == [True] * 4


def test_sampled_frequencies_follow_temperature():
    logits = torch.tensor([[0.8, 0.2]]).log().repeat(20000, 1)
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature, share in [(1.0, 0.2), (0.5, 0.2**2 / (0.2**2 + 0.8**2)), (1e6, 0.5)]:
        tokens, _ = choose(logits, Sampling(temperature=temperature), uniform)
        drawn = tokens.float().mean().item()
        assert abs(drawn - share) < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padded on the left"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 600}, "3 tokens and 600 new ones exceed the model's 512 positions"),
        ({"stop_sequences": [7]}, "lists of token ids"),
        ({"stop_sequences": [[]]}, "non-empty"),
        ({"temperature": 0.0}, "do_sample=False"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "nothing to continue"),
    ],
)
def test_bad_requests_are_named(change, message):
    request = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "stop_sequences": [],
        "max_new_tokens": 4,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(layers=1), **request)


def test_a_model_without_a_usable_cache_is_refused_rather_than_wrong():
    class Forgetful(Scripted):
        def forward(self, input_ids=None, past_key_values=None, cache_position=None):
            return super().forward(input_ids, DynamicCache(), cache_position)

    with pytest.raises(ValueError, match="Forgetful fills no key-value cache"):
        generate(Forgetful([[4]], 3), torch.tensor([[1, 2, 3]]), max_new_tokens=2, **NO_STOP)
