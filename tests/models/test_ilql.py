"""ILQL's losses and heads: values worked out by hand, and against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from coati.models import ilql_heads
from coati.models.head import Head
from coati.models.head_outputs import HeadRequest
from coati.models.ilql_heads import ActionValues, ILQLHeads, attach
from coati.models.ilql_loss import (
    ILQLLoss,
    bellman_targets,
    expectile_loss,
    ilql_losses,
    last_of_rows,
    total,
)
from tests.tiny import tiny_llama


def test_the_last_actions_of_rows():
    rows = torch.tensor([0, 0, 2, 2, 2, 5])
    assert last_of_rows(rows).tolist() == [False, True, False, False, True, True]
    assert last_of_rows(rows[:0]).tolist() == []


def test_bellman_targets_by_hand():
    """Two rows, of 2 and 1 actions: 0 + 0.5 x 4, 3 + 0 at the end, 1 + 0 at the end."""
    v = torch.tensor([2.0, 4.0, 8.0], requires_grad=True)
    last = torch.tensor([False, True, True])
    found = bellman_targets(torch.tensor([0.0, 3.0, 1.0]), v, last, gamma=0.5)
    assert found.tolist() == [2.0, 3.0, 1.0] and not found.requires_grad


def test_expectile_loss_by_hand():
    """Q' above V: tau x 4; below: (1 - tau) x 4."""
    target = torch.tensor([3.0, -1.0])
    v = torch.tensor([1.0, 1.0], requires_grad=True)
    losses = expectile_loss(target, v, 0.7)
    assert losses.tolist() == pytest.approx([2.8, 1.2])
    losses.sum().backward()
    assert v.grad.tolist() == pytest.approx([-2.8, 1.2])  # -2 w (Q' - V)


def test_the_whole_loss_by_hand():
    """One row of two actions, rewards 0 and 1, gamma 0.5.

    Targets of Q: 0 + 0.5 x 0.6 = 0.3, and 1. q: (0.5 - 0.3)^2 + (0.1 - 0.3)^2 = 0.08; (1 - 1)^2 +
    (2 - 1)^2 = 1. v: target 0.2 below V 0.4: 0.2 x 0.04 = 0.008; 1.1 above 0.6: 0.8 x 0.25 = 0.2.
    cql: 1 + 2 = 3; 0.5 + 0.25 = 0.75. awac: exp(2 x (0.2 - 0.4)) x 0.7; exp(2 x 0.5) x 0.1.
    """
    values = ActionValues(
        q1=torch.tensor([0.5, 1.0]),
        q2=torch.tensor([0.1, 2.0]),
        q1_logps=torch.tensor([-1.0, -0.5]),
        q2_logps=torch.tensor([-2.0, -0.25]),
        v=torch.tensor([0.4, 0.6]),
        target=torch.tensor([0.2, 1.1]),
    )
    settings = ILQLLoss(tau=0.8, gamma=0.5, cql_coef=0.1, awac_coef=2.0, awac_beta=2.0)
    last = torch.tensor([False, True])
    logps = torch.tensor([-0.7, -0.1])
    parts = ilql_losses(values, logps, torch.tensor([0.0, 1.0]), last, settings)
    wanted = {
        "q": [0.08, 1.0],
        "v": [0.008, 0.2],
        "cql": [3.0, 0.75],
        "awac": [0.7 * math.exp(-0.4), 0.1 * math.exp(1.0)],
    }
    assert {name: part.tolist() for name, part in parts.items()} == {
        name: pytest.approx(part, abs=1e-6) for name, part in wanted.items()
    }
    whole = [
        wanted["q"][k] + wanted["v"][k] + 0.1 * wanted["cql"][k] + 2 * wanted["awac"][k]
        for k in (0, 1)
    ]
    assert total(parts, settings).tolist() == pytest.approx(whole, abs=1e-6)


def plain_heads(heads: ILQLHeads, states: torch.Tensor, actions: torch.Tensor) -> ActionValues:
    """The same by whole (n, V) matrices."""
    q = [getattr(heads, name)(states) for name in ("q1", "q2")]
    at = actions[:, None]
    targets = []
    for name in ("q1", "q2"):
        first, first_bias, last, last_bias = (
            heads.targets[f"{name}.{layer}.{part}"]
            for layer in (0, 2)
            for part in ("weight", "bias")
        )
        inner = (states.detach() @ first.T + first_bias).clamp(min=0)
        targets.append((inner @ last.T + last_bias).gather(1, at)[:, 0])
    return ActionValues(
        q[0].gather(1, at)[:, 0],
        q[1].gather(1, at)[:, 0],
        q[0].log_softmax(-1).gather(1, at)[:, 0],
        q[1].log_softmax(-1).gather(1, at)[:, 0],
        heads.v(states)[:, 0],
        torch.minimum(*targets),
    )


@pytest.mark.parametrize("chunk_bytes", [2**27, 4 * 11 * 3], ids=["one chunk", "chunks of 3 rows"])
def test_the_heads_and_their_gradients_are_those_of_whole_matrices(monkeypatch, chunk_bytes):
    monkeypatch.setattr("coati.models.logprobs.CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(1)
    heads = ILQLHeads(6, 11)
    heads.sync(1.0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # so that targets differ
    states = torch.randn(7, 6)
    actions = torch.randint(11, (7,))
    found = []
    for compute in (heads, lambda s, a: plain_heads(heads, s, a)):
        heads.zero_grad()
        leaf = states.clone().requires_grad_()
        values = compute(leaf, actions)
        names = ("q1", "q2", "q1_logps", "q2_logps", "v")
        loss = sum((k + 1) * getattr(values, name).square().sum() for k, name in enumerate(names))
        loss.backward()
        found.append((values, [leaf.grad, *(p.grad.clone() for p in heads.parameters())]))
    (ours, our_grads), (plain, plain_grads) = found
    for name in (*names, "target"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), atol=1e-5, rtol=1e-5)
    assert not ours.target.requires_grad
    for mine, theirs in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_targets_move_by_alpha_and_stay_in_fp32():
    """0.25 x 2 + 0.75 x 1 = 1.25, then 0.25 x 2 + 0.75 x 1.25 = 1.4375."""
    heads = ILQLHeads(4, 5)
    with torch.no_grad():
        for parameter in heads.q1.parameters():
            parameter.fill_(1.0)
        heads.sync(1.0)
        for parameter in heads.q1.parameters():
            parameter.fill_(2.0)
    heads.to(torch.bfloat16)
    for value in (1.25, 1.4375):
        heads.sync(0.25)
        for name, tensor in heads.targets.items():
            assert tensor.dtype == torch.float32
            if name.startswith("q1"):
                assert (tensor == value).all()
    # A thousandth is less than bf16 can add to 1.4375.
    heads.sync(0.001)
    assert float(heads.targets["q1.2.bias"][0]) == pytest.approx(1.4375 + 0.001 * 0.5625, abs=1e-7)


def test_the_head_gives_action_values_at_the_supervised_tokens():
    model = tiny_llama()
    heads = attach(model, seed=3)
    ids = torch.randint(384, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :] = -100
    labels[1, 3:5] = ids[1, 3:5]
    chosen = labels[:, 1:] != -100
    states = model.model(input_ids=ids)[0][:, :-1][chosen]
    logps = model.lm_head(states).log_softmax(-1).gather(1, ids[:, 1:][chosen][:, None])[:, 0]
    wanted = plain_heads(heads, states, ids[:, 1:][chosen])
    head = Head.install(model)
    head.set(labels, request=HeadRequest(action_values=True))
    given = model(input_ids=ids).logits
    outputs = head.take()
    torch.testing.assert_close(outputs.logps[0], logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given[0], outputs.logps[0])
    for name in ("q1", "q2_logps", "v", "target"):
        torch.testing.assert_close(
            getattr(outputs.action_values, name), getattr(wanted, name), atol=1e-5, rtol=1e-5
        )
    bare = tiny_llama()
    head = Head.install(bare)
    head.set(labels, request=HeadRequest(action_values=True))
    with pytest.raises(ValueError, match="a model without ILQL's heads"):
        bare(input_ids=ids)


def test_new_heads_depend_on_the_seed_alone_and_leave_the_random_state():
    found = []
    for draws in (1, 5):
        model = tiny_llama()
        torch.manual_seed(9)
        torch.rand(draws)
        state = torch.get_rng_state()
        found.append(attach(model, seed=4))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, found[0].parameters(), found[1].parameters()))
    assert not torch.equal(attach(tiny_llama(), seed=5).q1[0].weight, found[0].q1[0].weight)


def saved(heads: ILQLHeads, folder) -> dict[str, torch.Tensor]:
    tensors = ilql_heads.tensors_of(heads, dict(heads.state_dict()))
    save_file(tensors, folder / ilql_heads.FILE)
    return tensors


def test_heads_are_loaded_as_they_were_saved(tmp_path):
    heads = ILQLHeads(64, 384)
    with torch.no_grad():
        heads.q1[2].weight.add_(1.0)
    heads.sync(0.25)
    saved(heads, tmp_path)
    again = attach(tiny_llama(), tmp_path)
    assert all(map(torch.equal, heads.parameters(), again.parameters()))
    assert all(torch.equal(heads.targets[name], again.targets[name]) for name in heads.targets)
    for_decoding = ilql_heads.heads_from(
        tmp_path / ilql_heads.FILE, torch.device("cpu"), torch.float32
    )
    states = torch.randn(3, 64)
    torch.testing.assert_close(for_decoding.advantages(states), heads.advantages(states))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda t: t.pop("target.q2.2.bias"), "no target.q2.2.bias"),
        (lambda t: t.update({"v.2.bias": torch.zeros(2)}), r"v.2.bias is \(2,\), of this model"),
        (
            lambda t: t.update({"q1.2.weight": torch.zeros(385, 128)}),
            "tokens were added to its vocabulary",
        ),
    ],
)
def test_heads_of_another_model_are_refused(tmp_path, spoil, said):
    tensors = saved(ILQLHeads(64, 384), tmp_path)
    spoil(tensors)
    save_file(tensors, tmp_path / ilql_heads.FILE)
    with pytest.raises(ValueError, match=said):
        attach(tiny_llama(), tmp_path)


def test_a_damaged_file_and_a_missing_one_are_named(tmp_path):
    model = tiny_llama()
    assert ilql_heads.saved_file(tmp_path, model.config) is None
    (tmp_path / "config.json").write_text("{}")
    ilql_heads.name_in(model.config, True)
    with pytest.raises(ValueError, match="names ilql_heads.st.*which is not there"):
        ilql_heads.saved_file(tmp_path, model.config)
    (tmp_path / ilql_heads.FILE).write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="not readable"):
        attach(model, tmp_path)
    ilql_heads.name_in(model.config, False)
    assert not hasattr(model.config, ilql_heads.NAME)


def test_tensors_of_the_heads_are_split_off_under_any_wrapper():
    names = ["model.x", "ilql_heads.q1.0.weight", "base_model.model.ilql_heads.v.2.bias"]
    model, own = ilql_heads.split({name: torch.zeros(1) for name in names})
    assert list(model) == ["model.x"] and list(own) == ["q1.0.weight", "v.2.bias"]


def test_what_is_saved_has_one_file_of_each(tmp_path):
    """The layout of the file, which later releases must read."""
    saved(ILQLHeads(2, 3), tmp_path)
    parts = [f"{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")]
    online = [f"{head}.{part}" for head in ("q1", "q2", "v") for part in parts]
    targets = [f"target.{head}.{part}" for head in ("q1", "q2") for part in parts]
    found = load_file(tmp_path / ilql_heads.FILE)
    assert sorted(found) == sorted(online + targets)
    assert F.relu(found["q1.0.weight"]).shape == (4, 2) and found["q1.2.weight"].shape == (3, 4)
