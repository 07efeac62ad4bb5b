"""Entropy, logsumexp, top-k log-probs and log-probs of given ids, against plain log_softmax over
full logits: values and gradients."""

import math

import pytest
import torch
from torch import nn

from coati.models.head import Head, HeadOutputs, HeadRequest, VocabCollective
from coati.models.head_outputs import outputs_from_logits
from tests.distributed.spawn import run
from tests.models.test_head import (
    Bare,
    LargestTensor,
    Wrapped,
    assert_same_gradients,
    gradients,
    rows,
)
from tests.tiny import tiny_llama

V = 384
K = 5
FIELDS = ("logps", "entropy", "logsumexp", "topk_logps", "given_logps")


def asked(labels: torch.Tensor) -> HeadRequest:
    """Everything at once; the given ids (B, S, K) hold each id twice."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randint(0, V, (*labels.shape, K), generator=generator)
    given[..., 1] = given[..., 0]
    return HeadRequest(entropy=True, logsumexp=True, top_k=K, given=given)


def long_way(logits, labels, request: HeadRequest, temperature=1.0) -> HeadOutputs:
    """The same by log_softmax of full logits."""
    chosen = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    x = logits.float()[chosen] / temperature
    logp = x.log_softmax(-1)
    wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1))[chosen]
    topk = logp.topk(request.top_k, dim=-1)
    return HeadOutputs(
        logp.gather(1, wanted[:, None]).T,
        -(logp.exp() * logp).sum(-1)[None],
        x.logsumexp(-1)[None],
        topk.values,
        topk.indices,
        logp.gather(1, request.given[chosen]),
    )


def weighted(outputs: HeadOutputs, names=FIELDS) -> torch.Tensor:
    """A sum in which every number has a weight of its own."""
    values = torch.cat([getattr(outputs, name).flatten() for name in names])
    return (values * torch.linspace(-1, 2, len(values)))[None]


def assert_same(found: HeadOutputs, expected: HeadOutputs, tolerance: float = 2e-6) -> None:
    assert torch.equal(found.topk_ids, expected.topk_ids)
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
@pytest.mark.parametrize("chunk_rows", [None, 7, 1])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_equals_log_softmax(tie, chunk_rows, wrapped):
    model = tiny_llama(tie=tie)
    ids, labels = rows()
    request = asked(labels)
    expected = long_way(model(ids).logits, labels, request)
    expected_gradients = gradients(model, weighted(expected))
    if wrapped:
        model.set_output_embeddings(Wrapped(model.lm_head))
    head = Head.install(model, chunk_rows=chunk_rows)
    head.set(labels, request=request)
    logps = model(ids).logits
    head.clear()
    found = head.take()
    assert torch.equal(found.logps, logps)
    assert_same(found, expected)
    found_gradients = {
        name.replace("lm_head.inner", "lm_head"): g
        for name, g in gradients(model, weighted(found)).items()
    }
    assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_each_output_has_its_gradient_alone(name, chunk_rows):
    """A loss of one output, as an entropy bonus, a z-loss or distillation is."""
    model = Bare(nn.Linear(16, V, bias=True))
    torch.manual_seed(0)
    hidden, (_, labels) = torch.randn(3, 11, 16), rows()
    request = asked(labels)
    expected = gradients(model, weighted(long_way(model(hidden), labels, request), (name,)))
    head = Head.install(model, chunk_rows=chunk_rows)
    head.set(labels, request=request)
    model(hidden)
    assert_same_gradients(gradients(model, weighted(head.take(), (name,))), expected)


@pytest.mark.parametrize("way", ["head", "head in bf16", "full logits"])
@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_temperature_divides_the_logits(chunk_rows, temperature, way, monkeypatch):
    monkeypatch.setattr("coati.models.logprobs.CHUNK_BYTES", 4 * V * (chunk_rows or 100))
    model = Bare(nn.Linear(32, V))
    if "bf16" in way:
        model = model.bfloat16()
    torch.manual_seed(0)
    nn.init.normal_(model.lm_head.weight)
    hidden, (_, labels) = torch.randn(3, 11, 32, dtype=model.lm_head.weight.dtype), rows()
    request = asked(labels)
    expected = long_way(model(hidden), labels, request, temperature)
    expected_gradients = gradients(model, weighted(expected))
    if way == "full logits":
        found = outputs_from_logits(model(hidden), labels, request, temperature=temperature)
    else:
        head = Head.install(model)
        head.temperature = temperature
        head.set(labels, request=request)
        model(hidden)
        head.temperature = 1.0
        found = head.take()
    assert_same(found, expected, tolerance=1e-5)
    found_gradients = gradients(model, weighted(found))
    tolerance = 2e-2 if "bf16" in way else 2e-5
    assert_same_gradients(found_gradients, expected_gradients, tolerance=tolerance)


def test_hand_worked():
    """Logits [0, ln 3]: p = 1/4, 3/4; entropy ln 4 - 3/4 ln 3, logsumexp ln 4; d entropy / dx =
    -p (log p + entropy)."""
    model = Bare(nn.Linear(1, 2, bias=False))
    model.lm_head.weight.data = torch.tensor([[0.0], [math.log(3.0)]])
    head = Head.install(model)
    request = HeadRequest(entropy=True, logsumexp=True, top_k=1, given=torch.tensor([[1, 0, 1]]))
    head.set(torch.tensor([[0, 0]]), request=request)
    model(torch.ones(1, 2, 1))
    found = head.take()
    entropy = math.log(4) - 0.75 * math.log(3)
    torch.testing.assert_close(found.logps, torch.log(torch.tensor([[0.25]])))
    torch.testing.assert_close(found.entropy, torch.tensor([[entropy]]))
    torch.testing.assert_close(found.logsumexp, torch.tensor([[math.log(4)]]))
    torch.testing.assert_close(found.topk_logps, torch.log(torch.tensor([[0.75]])))
    assert found.topk_ids.tolist() == [[1]]
    torch.testing.assert_close(found.given_logps, torch.log(torch.tensor([[0.75, 0.25, 0.75]])))
    found.entropy.sum().backward()
    expected = [[-p * (math.log(p) + entropy)] for p in (0.25, 0.75)]
    torch.testing.assert_close(model.lm_head.weight.grad, torch.tensor(expected))


def test_impossible_tokens_and_far_apart_logits_stay_finite():
    """A logit of -inf, as of a padded vocabulary, has probability 0 and no gradient."""
    logits = torch.tensor([[[0.0, 1.0, -math.inf, -500.0]] * 2], requires_grad=True)
    request = HeadRequest(entropy=True, logsumexp=True, top_k=2)
    found = outputs_from_logits(logits, torch.tensor([[0, 1]]), request)
    p = 1 / (1 + math.exp(-1.0))
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert found.entropy.item() == pytest.approx(expected, abs=1e-6)
    (found.entropy + found.logsumexp + found.topk_logps.sum()).sum().backward()
    assert logits.grad.isfinite().all()


def test_only_what_was_asked_is_there_and_it_is_given_away_once():
    model = tiny_llama()
    ids, labels = rows()
    head = Head.install(model)
    head.set(labels, request=HeadRequest(entropy=True))
    model(ids)
    found = head.take()
    assert found.entropy.shape == found.logps.shape == (1, 16)
    assert found.logsumexp is found.topk_logps is found.topk_ids is found.given_logps is None
    with pytest.raises(RuntimeError, match="were taken"):
        head.take()
    head.set(labels)
    plain = model(ids).logits
    torch.testing.assert_close(plain, found.logps, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="was not given a request"):
        head.take()


def test_flat_given_ids_are_those_of_a_teachers_top_k():
    """What a teacher's head gives for the same labels goes to the student's as it is."""
    teacher, student = tiny_llama(), tiny_llama()
    ids, labels = rows()
    theirs, ours = Head.install(teacher), Head.install(student, chunk_rows=3)
    theirs.set(labels, request=HeadRequest(top_k=K))
    teacher(ids)
    top = theirs.take()
    ours.set(labels, request=HeadRequest(given=top.topk_ids))
    student(ids)
    torch.testing.assert_close(ours.take().given_logps, top.topk_logps)
    ours.set(labels, request=HeadRequest(given=top.topk_ids[:3]))
    with pytest.raises(ValueError, match="given ids for 3 rows, 16 rows are supervised"):
        student(ids)


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
def test_nothing_supervised_still_reaches_every_parameter(wrapped):
    model = tiny_llama()
    if wrapped:
        model.set_output_embeddings(Wrapped(model.lm_head))
    ids, labels = rows()
    request = asked(labels)
    head = Head.install(model)
    head.set(torch.full_like(labels, -100), request=request)
    model(ids)
    found = head.take()
    assert found.entropy.shape == (1, 0) and found.topk_logps.shape == (0, K)
    weighted(found).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_all_ranks_call_a_sharded_head_equally_often():
    model = tiny_llama()
    module = Wrapped(model.lm_head)
    model.set_output_embeddings(module)
    ids = torch.arange(8).view(2, 4)
    labels = ids.clone()
    labels[1], labels[0, 0] = -100, -100
    request = asked(labels)
    expected = long_way(model(ids).logits, labels, request)
    module.calls = 0
    head = Head.install(model, chunk_rows=2, agree_on_chunks=lambda count: 6)
    head.set(labels, request=request)
    model(ids)
    assert module.calls == 6
    assert_same(head.take(), expected)


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
def test_one_chunk_of_logits_at_a_time(wrapped):
    torch.manual_seed(0)
    module = nn.Linear(4, 5000, bias=False)
    model = Bare(Wrapped(module) if wrapped else module)
    hidden, labels = torch.randn(1, 65, 4, requires_grad=True), torch.randint(0, 5000, (1, 65))
    head = Head.install(model, chunk_rows=16)
    head.set(labels, request=HeadRequest(entropy=True, logsumexp=True, top_k=K))
    with LargestTensor() as seen:
        model(hidden)
        found = head.take()
        (found.entropy.sum() + found.topk_logps.sum() + found.logsumexp.sum()).backward()
    assert seen.elements <= 16 * 5000


def one_shard(sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """On one of two ranks, each with its part of the vocabulary."""
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def reduced(operation):
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=operation)
            return tensor

        return apply

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=1)

    full, hidden, labels = _shard_case()
    offset = sizes[0] * dist.get_rank()
    shard = nn.Linear(8, sizes[dist.get_rank()], bias=False)
    shard.weight.data = full.weight.data[offset : offset + shard.out_features].clone()
    collective = VocabCollective(
        offset, reduced(dist.ReduceOp.MAX), reduced(dist.ReduceOp.SUM), gather
    )
    head = Head.install(Bare(shard), collective=collective, chunk_rows=4)
    head.temperature = 0.8
    head.set(labels, request=asked(labels))
    hidden.requires_grad_()
    shard(hidden)
    found = head.take()
    weighted(found).sum().backward()
    return {
        **{name: getattr(found, name).detach() for name in (*FIELDS, "topk_ids")},
        "weight": shard.weight.grad,
        "hidden": hidden.grad,
    }


def _shard_case() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    labels = torch.randint(0, V, (2, 7))
    labels[0, :3] = -100
    labels[1, 1:3] = torch.tensor([249, 250])  # either side of the cut
    return nn.Linear(8, V, bias=False), torch.randn(2, 7, 8), labels


@pytest.mark.parametrize("sizes", [(250, 134), (381, 3)], ids=["halves", "a shard narrower than k"])
def test_vocabulary_split_over_two_processes(sizes):
    """The same outputs on both ranks, each rank's share of the gradients."""
    full, hidden, labels = _shard_case()
    hidden.requires_grad_()
    expected = long_way(full(hidden), labels, asked(labels), temperature=0.8)
    weighted(expected).sum().backward()
    first, second = run(2, "tests.models.test_head_outputs:one_shard", sizes)
    for name in (*FIELDS, "topk_ids"):
        torch.testing.assert_close(
            first[name], getattr(expected, name).detach(), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(first[name], second[name])
    torch.testing.assert_close(
        torch.cat([first["weight"], second["weight"]]), full.weight.grad, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        first["hidden"] + second["hidden"], hidden.grad, rtol=1e-4, atol=1e-5
    )
