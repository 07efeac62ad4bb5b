"""Divergences of a student from a teacher: worked by hand, TRL's numbers, and the chunked head
against full logits, values and gradients."""

import math

import pytest
import torch

from coati.models.distillation import (
    ListedTeacher,
    WholeTeacher,
    after_head,
    divergence,
)
from coati.models.head import Head, HeadRequest, VocabCollective
from coati.models.head_outputs import outputs_from_logits
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
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
# Logits of two positions, and what generalized_jsd_loss of TRL 1.16 makes of them: the mean over
# positions, and its gradient.
STUDENT = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -0.5, 0.25]]
TEACHER = [[1.5, 0.0, -1.0, 0.5], [-2.0, 0.75, 0.0, 1.0]]
TRL = {
    0.0: (
        0.7473887205123901,
        (-0.219625041, -0.049004968, 0.330519021, -0.061889015),
        (0.174161136, 0.008209720, -0.042353995, -0.140016824),
    ),
    0.1: (
        0.06722799688577652,
        (-0.018182443, -0.004057050, 0.027925290, -0.005685797),
        (0.015762189, 4.279055e-05, -0.003784872, -0.012020108),
    ),
    0.5: (
        0.20023703575134277,
        (-0.043497805, -0.009705671, 0.070635721, -0.017432252),
        (0.048924495, -0.007787202, -0.010751784, -0.030385509),
    ),
    0.9: (
        0.09227770566940308,
        (-0.017639324, -0.003935865, 0.029959813, -0.008384621),
        (0.025373363, -0.008456316, -0.004757133, -0.012159912),
    ),
    1.0: (
        1.1944684982299805,
        (-0.228829846, -0.051058840, 0.394655645, -0.114766933),
        (0.364887684, -0.145222470, -0.063445590, -0.156219676),
    ),
}


def whole(theirs: torch.Tensor, beta: float) -> HeadRequest:
    """A teacher whose "hidden states" are its logits."""
    return HeadRequest(teacher=WholeTeacher(theirs, lambda rows: rows.clone(), beta))


def test_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2); with beta 1/2 m = (5/8, 3/8)."""
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    of_p = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    of_q = 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    expected = {0.0: forward, 1.0: reverse, 0.5: (of_p + of_q) / 2}
    for beta, value in expected.items():
        assert float(divergence(q, p, beta)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_are_the_limits_of_the_inside(beta):
    """D_beta / (beta (1 - beta)) tends to the KL of the end."""
    p, q = (torch.tensor(x).double().log_softmax(-1) for x in (TEACHER, STUDENT))
    near = abs(beta - 1e-6)
    scaled = divergence(q, p, near) / (near * (1 - near))
    torch.testing.assert_close(scaled, divergence(q, p, beta), rtol=1e-5, atol=0)


def test_it_is_zero_for_equal_distributions_and_symmetric_at_one_half():
    p, q = (torch.tensor(x).log_softmax(-1) for x in (TEACHER, STUDENT))
    for beta in BETAS:
        assert float(divergence(q, q, beta).abs().max()) < 1e-6
        torch.testing.assert_close(divergence(q, p, beta), divergence(p, q, 1 - beta))


@pytest.mark.parametrize("beta", BETAS)
def test_equals_trl(beta):
    logits = torch.tensor(STUDENT, requires_grad=True)
    teacher = WholeTeacher(torch.tensor(TEACHER), lambda rows: rows.clone(), beta)
    _, found, _ = teacher.outputs(logits, torch.tensor([1, 2]), teacher.hidden)
    found.mean().backward()
    value, *gradient = TRL[beta]
    assert float(found.detach().mean()) == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-7)


def sums(found, weights: torch.Tensor) -> torch.Tensor:
    """Divergences and label log-probs, each row with a weight of its own."""
    return (weights * found[1] + weights.flip(0) * 0.3 * found[0]).sum()[None, None]


def long_way(logits, theirs, labels, beta: float):
    """The same by log_softmax of full logits and autograd, in fp64."""
    chosen = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    log_q = logits.double()[chosen].log_softmax(-1)
    log_p = theirs.double().log_softmax(-1)
    wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1))[chosen]
    at = [x.gather(1, wanted[:, None])[:, 0] for x in (log_q, log_p)]
    return at[0], divergence(log_q, log_p, beta), at[1]


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
@pytest.mark.parametrize("chunk_rows", [None, 7, 1])
@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_head_equals_full_logits(beta, chunk_rows, wrapped):
    model = tiny_llama(tie=True)
    ids, labels = rows()
    count = int((labels[:, 1:] != -100).sum())
    theirs = 3 * torch.randn(count, V, generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(-1, 2, count)
    expected = long_way(model(ids).logits, theirs, labels, beta)
    expected_gradients = gradients(model, sums(expected, weights).float())
    if wrapped:
        model.set_output_embeddings(Wrapped(model.lm_head))
    head = Head.install(model, chunk_rows=chunk_rows)
    head.set(labels, request=whole(theirs, beta))
    logps = model(ids).logits
    head.clear()
    outputs = head.take()
    found = (outputs.logps[0], outputs.divergence[0], outputs.teacher_logps[0])
    assert torch.equal(logps, outputs.logps) and not found[2].requires_grad
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(model, sums(found, weights)), expected_gradients, 1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_listed_ids_and_the_rest_as_one_cell(beta):
    """Against K + 1 probabilities added up, with autograd through them."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    theirs = (2 * torch.randn(6, 20, generator=generator).double()).log_softmax(-1)
    logps, ids = theirs.topk(4, dim=-1)
    plain = logits.clone().requires_grad_()
    q = plain.softmax(-1)
    cells = torch.cat([q.gather(1, ids), q.scatter(1, ids, 0.0).sum(1, keepdim=True)], 1)
    p_cells = torch.cat([logps.exp(), 1 - logps.exp().sum(1, keepdim=True)], 1)
    expected = divergence(cells.log(), p_cells.log(), beta)
    weights = torch.linspace(-1, 2, 6).double()
    (weights * expected).sum().backward()
    asked = logits.float().requires_grad_()
    teacher = ListedTeacher(ids, logps.float(), beta)
    _, found, unknown = teacher.outputs(asked, ids[:, 0], *teacher.rows())
    (weights * found).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(asked.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)
    assert unknown.isnan().all()


@pytest.mark.parametrize("beta", BETAS)
def test_all_ids_listed_is_the_whole_vocabulary(beta):
    logits = torch.tensor(STUDENT)
    theirs = torch.tensor(TEACHER).log_softmax(-1)
    logps, ids = theirs.sort(dim=-1, descending=True)
    grads, values = [], []
    for teacher in (
        WholeTeacher(theirs, lambda rows: rows.clone(), beta),
        ListedTeacher(ids, logps, beta),
    ):
        asked = logits.clone().requires_grad_()
        logps_of_labels, found, _ = teacher.outputs(asked, torch.tensor([0, 3]), *teacher.rows())
        (found.sum() - logps_of_labels.sum()).backward()
        grads.append(asked.grad)
        values.append(found.detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_is_nan_where_a_model_excludes_tokens(beta):
    """Logits of -inf, of one or of both; a student that is certain, a teacher that is."""
    low = float("-inf")
    logits = torch.tensor([[0.0, low, 1.0], [low, low, 0.0], [90.0, 0.0, 0.0]])
    theirs = torch.tensor([[low, low, 1.0], [0.0, low, 1.0], [0.0, 95.0, 0.0]])
    asked = logits.clone().requires_grad_()
    teacher = WholeTeacher(theirs, lambda rows: rows.clone(), beta)
    _, found, _ = teacher.outputs(asked, torch.tensor([2, 2, 0]), theirs)
    found.sum().backward()
    assert found.isfinite().all() and asked.grad.isfinite().all()


def test_vocabularies_of_other_widths_are_compared_over_what_both_have():
    """Embedding rows that no token has (Qwen2.5: 151,936 and 152,064)."""
    logits = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    teacher = WholeTeacher(theirs, lambda rows: rows.clone(), 0.5)
    _, found, _ = teacher.outputs(logits, torch.zeros(5, dtype=torch.long), theirs)
    found.sum().backward()
    expected = divergence(logits[:, :20].log_softmax(-1), theirs.log_softmax(-1), 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (logits.grad[:, 20:] == 0).all() and (logits.grad[:, :20] != 0).any()


def test_a_model_whose_logits_are_formed_whole():
    """outputs_from_logits, for heads that Head cannot serve, gives the same."""
    model = tiny_llama()
    ids, labels = rows()
    count = int((labels[:, 1:] != -100).sum())
    theirs = torch.randn(count, V, generator=torch.Generator().manual_seed(2))
    found = outputs_from_logits(model(ids).logits, labels, whole(theirs, 0.5))
    expected = long_way(model(ids).logits, theirs, labels, 0.5)
    torch.testing.assert_close(found.divergence[0].double(), expected[1], rtol=1e-5, atol=1e-6)


def test_hidden_states_in_place_of_logits():
    model = tiny_llama()
    ids, labels = rows()
    chosen = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    expected = model.model(ids).last_hidden_state[chosen]
    head = Head.install(model)
    head.set(labels, request=HeadRequest(hidden=True))
    model(ids)
    torch.testing.assert_close(head.take().hidden, expected)


def test_no_matrix_of_all_rows_and_the_vocabulary(monkeypatch):
    """Neither model's logits exist whole, forward or backward."""
    model = Bare(torch.nn.Linear(16, V))
    hidden = torch.randn(1, 65, 16, requires_grad=True)
    labels = torch.randint(0, V, (1, 65))
    teacher_states = torch.randn(64, 8)
    weight = torch.randn(V, 8)
    head = Head.install(model, chunk_rows=8)
    asked = WholeTeacher(teacher_states, lambda rows: rows @ weight.T, 0.5)
    head.set(labels, request=HeadRequest(teacher=asked))
    with LargestTensor() as largest:
        model(hidden)
        head.take().divergence.sum().backward()
    assert largest.elements <= max(8 * V, V * 16)  # a chunk, or the weight


@pytest.mark.parametrize("rows_of_teacher", [3, 7])
def test_a_teacher_of_other_rows_is_refused(rows_of_teacher):
    request = whole(torch.zeros(rows_of_teacher, V), 0.5)
    logits, labels = torch.zeros(1, 6, V), torch.tensor([[-100, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match=f"{rows_of_teacher} rows, 5 rows are supervised"):
        outputs_from_logits(logits, labels, request)


def test_logits_split_over_ranks_are_refused():
    model = Bare(torch.nn.Linear(16, V))
    head = Head.install(model, collective=VocabCollective(offset=1))
    labels = torch.tensor([[-100, 1, 2]])
    head.set(labels, request=whole(torch.zeros(2, V), 0.5))
    with pytest.raises(ValueError, match="whole logits"):
        model(torch.zeros(1, 3, 16))


FAMILIES = {
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_models_do_with_the_logits_of_their_head(family):
    """Their head alone, then after_head, is their forward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        states = model.model(ids).last_hidden_state
        bare = model.lm_head(states)
        expected = model(ids).logits
    assert not torch.allclose(bare, expected)
    torch.testing.assert_close(after_head(model.config)(bare), expected)
