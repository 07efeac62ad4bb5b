"""Rows that begin alike share these tokens in a batch laid end to end: the same numbers and
gradients as rows that do not."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from coati.models import padding_free as padding_free_module
from coati.models.critic import Critic
from coati.models.head_outputs import HeadRequest
from coati.models.padding_free import LEAST_PREFIX, PaddingFree
from coati.models.prefix_attention import blocks_of, prefix_attention
from coati.models.prefix_layout import prefix_layout
from coati.models.reward_model import RewardModel
from coati.utils.transformers_compat import body_name, transformers_major
from tests.experience_maker.engines import engine_of, group_of_one
from tests.models.test_padding_free import BY_TYPE, PACKED, PACKED_TODAY
from tests.models_table.families import tiny_model
from tests.tiny import tiny_llama

PROMPT = [7, 11, 13, 17, 19, 23]
# A pair; one that goes on where the first ends; a stranger; the first once more; the prompt alone;
# two that leave the first after two tokens of its answer.
ROWS = [
    [*PROMPT, 31, 37, 41, 43, 47],
    [*PROMPT, 53, 59],
    [*PROMPT, 31, 37, 41, 43, 47, 61, 67],
    [8, 11, 13, 17],
    [*PROMPT, 31, 37, 41, 43, 47],
    PROMPT,
    [*PROMPT, 31, 37, 71],
    [*PROMPT, 31, 37, 73, 79, 83, 89],
]
WIDTH = max(map(len, ROWS))
REAL = sum(map(len, ROWS))


@pytest.fixture(autouse=True)
def least(monkeypatch):
    """Two common tokens count."""
    monkeypatch.setattr(padding_free_module, "LEAST_PREFIX", 2)


def batch(side: str = "right", supervised: str = "all") -> dict[str, torch.Tensor]:
    """ROWS padded with a real token's id. ``supervised``: all but first tokens, or only every other
    row's, and of the others what follows the prompt."""
    ids = torch.full((len(ROWS), WIDTH), 5)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(ROWS):
        start = 0 if side == "right" else WIDTH - len(row)
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
        first = start + (1 if supervised == "all" or index % 2 == 0 else len(PROMPT))
        labels[index, first : start + len(row)] = ids[index, first : start + len(row)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_layout_by_hand():
    """Rows abcd, xy, abce, abce: abc once, then d and e; xy stays where it stood."""
    ids = torch.tensor([1, 2, 3, 4, 8, 9, 1, 2, 3, 5, 1, 2, 3, 5])
    layout = prefix_layout(ids, [4, 2, 4, 4], least=2)
    assert ids[layout.source].tolist() == [1, 2, 3, 4, 5, 8, 9]
    assert layout.places.tolist() == [0, 1, 2, 3, 5, 6, 0, 1, 2, 4, 0, 1, 2, 4]
    assert layout.ends == [0, 3, 4, 5, 7] and layout.prefixes == [(0, 3, 5)]
    assert prefix_layout(ids[:10], [4, 2, 4], least=4) is None  # three common tokens


def test_every_token_is_laid_and_found_again():
    """Whatever the rows: each token's place holds its id, and what it sees is its own row."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
        ids = torch.randint(0, 2, (sum(lengths),), generator=generator)
        layout = prefix_layout(ids, lengths, least=2)
        if layout is None:
            continue
        laid = ids[layout.source]
        assert torch.equal(laid[layout.places], ids)
        sees = visible(layout.ends, layout.prefixes)
        for row, places in zip(ids.split(lengths), layout.places.split(lengths), strict=True):
            for index, place in enumerate(places):
                assert torch.equal(laid[sees[place]], row[: index + 1])


def visible(ends: list[int], prefixes: list[tuple[int, int, int]]) -> torch.Tensor:
    """(P, P) bool, from the words of PrefixLayout: what each token attends to."""
    segment = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends), right=True)
    found = (segment[:, None] == segment) & torch.ones(ends[-1], ends[-1]).tril().bool()
    for start, end, stop in prefixes:
        found[end:stop, start:end] = True
    return found


def test_attention_is_that_under_the_mask():
    """In fp64, with grouped heads and prefixes within prefixes; gradients as well."""
    ends = [0, 4, 6, 7, 10, 12]
    prefixes = [(4, 6, 10), (0, 4, 12)]
    torch.manual_seed(0)
    query = torch.randn(1, 4, 12, 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(1, 2, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    found = prefix_attention(query, key, value, blocks_of(ends, prefixes), 0.3)
    mask = visible(ends, prefixes)
    assert mask.sum() < 12 * 13 / 2  # some do not see all that stands before them
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.repeat_interleave(2, dim=1) for x in (key, value)), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    inputs = (query, key, value)
    assert_close(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        rtol=1e-12,
        atol=1e-12,
    )


def states_and_gradients(
    model, padding_free: PaddingFree, rows: dict, share: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the real tokens row by row, (T, d); of a sum of them with random weights."""
    unpadded = padding_free.unpad(rows, share=share)
    assert (unpadded.places is not None) == share
    model.zero_grad()
    inner = getattr(model, body_name(model))
    states = inner(**unpadded.inputs, use_cache=False)[0][0]
    if share:
        assert len(states) < 0.6 * REAL
        states = states[unpadded.places]
    assert len(states) == REAL
    torch.manual_seed(1)
    (states * torch.randn_like(states)).sum().backward()
    gradients = [p.grad.clone() for p in inner.parameters() if p.grad is not None]
    return states.detach(), gradients


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(BY_TYPE))
def test_states_and_gradients_of_every_family(family, side, monkeypatch):
    packed_here = PACKED_TODAY if transformers_major() >= 5 else PACKED
    if family not in packed_here:
        pytest.skip("needs padded rows")
    windows = {
        name: 64
        for name in ("sliding_window", "attention_chunk_size", "index_topk")
        if BY_TYPE[family].config.get(name)
    }
    model = tiny_model(BY_TYPE[family], **windows).eval()
    padding_free = PaddingFree.of(model)
    assert padding_free.shares
    tolerance = 1e-5
    if not hasattr(model.config, "num_experts_per_tok"):  # whose kernels know no fp64
        model = model.double()
        tolerance = 1e-9
        # Norms and rotations ask for fp32.
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    alone, expected = states_and_gradients(model, padding_free, batch(side), share=False)
    shared, found = states_and_gradients(model, padding_free, batch(side), share=True)
    assert (shared - alone).abs().max() <= tolerance * alone.abs().max()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-6)


def test_queries_and_values_of_different_widths_are_not_shared():
    """Latent attention; PyTorch's flash attention does not have it."""
    family = BY_TYPE["deepseek_v3"]
    model = tiny_model(replace(family, config=family.config | {"v_head_dim": 8}))
    padding_free = PaddingFree.of(model)
    assert padding_free is not None and not padding_free.shares


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


def both_ways(model, rows: dict, forward) -> tuple:
    """``forward(engine)`` with and without shared prefixes."""
    engine = engine_of(model, packed=True)
    found = []
    for share in (True, False):
        engine.share_prefixes = share
        found.append(forward(engine))
    return tuple(found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("supervised", ["all", "some prompts"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_log_probs_and_their_gradients(side, supervised, checkpointing):
    """A supervised token of a shared prefix counts in each row."""
    model = tiny_llama(tie=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = batch(side, supervised)

    def forward(engine):
        model.train()
        model.zero_grad()
        logps = engine.forward(rows)
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        return logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    (shared, found), (alone, expected) = both_ways(model, rows, forward)
    assert len(shared) == int((rows["labels"][:, 1:] != -100).sum())
    assert_close(shared, alone, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    "asked", [HeadRequest(entropy=True, logsumexp=True, top_k=3), HeadRequest(hidden=True)]
)
def test_what_else_a_head_is_asked_for(asked):
    rows = batch(supervised="some prompts")
    names = ("logps", "entropy", "logsumexp", "topk_logps", "hidden")

    def read(outputs, _):
        fields = (getattr(outputs, name) for name in names)
        return torch.cat([field.flatten() for field in fields if field is not None])

    shared, alone = both_ways(
        tiny_llama(), rows, lambda engine: engine.forward_only(rows, read, head_request=asked)
    )
    assert_close(shared, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [Critic, RewardModel])
def test_scalar_heads(kind, side):
    """Values of all tokens, and scores of last tokens, with their gradients."""
    torch.manual_seed(0)
    model = kind(backbone=tiny_llama())
    torch.nn.init.normal_(model.score.weight, std=0.1)
    rows = batch(side)
    del rows["labels"]

    def forward(engine):
        model.zero_grad()
        outputs = engine.forward(rows)
        (outputs * torch.linspace(-1, 2, outputs.numel()).view_as(outputs)).sum().backward()
        return outputs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (shared, found), (alone, expected) = both_ways(model, rows, forward)
    assert shared.shape == ((1, REAL) if kind is Critic else (len(ROWS),))
    assert_close(shared, alone, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def tokens_seen(model, rows: dict, **settings) -> int:
    """Tokens that go through ``model`` in a forward of the engine."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].numel())
    )
    engine = engine_of(model, packed=True)
    seen.clear()  # of the probes
    vars(engine).update(settings)
    engine.forward(rows)
    hook.remove()
    (count,) = seen
    return count


def test_what_is_shared_goes_through_the_model_once():
    laid = [*PROMPT, 31, 37, 41, 43, 47, 61, 67, 71, 73, 79, 83, 89, 53, 59, *ROWS[3]]
    assert tokens_seen(tiny_llama(), batch()) == len(laid)
    assert tokens_seen(tiny_llama(), batch(), share_prefixes=False) == REAL


def test_few_common_tokens_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(padding_free_module, "LEAST_PREFIX", LEAST_PREFIX)
    assert LEAST_PREFIX > WIDTH
    assert tokens_seen(tiny_llama(), batch()) == REAL - len(ROWS[4])  # equal to another


def test_packs_share_too():
    """Two packs of two rows; all four begin alike."""
    rows = [[*PROMPT, 31], [*PROMPT, 37, 41], [*PROMPT, 43], [*PROMPT, 47, 53]]
    ids = torch.tensor([rows[0] + rows[1], rows[2] + rows[3]])
    positions = torch.tensor([[*range(7), *range(8)]] * 2)
    pack = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    pack["labels"] = ids.masked_fill(positions == 0, -100)
    assert tokens_seen(tiny_llama(), pack) == len(PROMPT) + 6
    shared, alone = both_ways(tiny_llama(), pack, lambda engine: engine.forward(pack))
    assert_close(shared, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["attention", "lora"])
def test_with_dropout_rows_are_on_their_own_in_training(way):
    """Each row has a dropout of its own, as without sharing; evaluation shares."""
    if way == "attention":
        model = tiny_llama(attention_dropout=0.1)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            tiny_llama(), LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"])
        )
    state = torch.get_rng_state()
    padding_free = PaddingFree.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert padding_free.shares and not padding_free.shares_in_training
    assert PaddingFree.of(tiny_llama()).shares_in_training
    assert tokens_seen(model.train(), batch()) == REAL > tokens_seen(model.eval(), batch())


def test_autocast():
    """What bf16 leaves of it."""
    rows = batch()

    def forward(engine):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return engine.forward(rows).detach()

    shared, alone = both_ways(tiny_llama(), rows, forward)
    assert_close(shared, alone, rtol=2e-2, atol=2e-2)
