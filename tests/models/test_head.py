"""The head's log-probs and gradients against log_softmax over the model's own full logits."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coati.models.head import (
    Head,
    VocabCollective,
    head_unsupported,
    logprobs_from_logits,
    next_token_targets,
    scatter_token_logprobs,
)
from tests.distributed.spawn import run
from tests.tiny import tiny_llama

V = 384


class Wrapped(nn.Module):
    """An output embedding that is not a plain linear layer, as PEFT's and ColossalAI's are not."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls, self.most_rows = inner, 0, 0

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, hidden):
        self.calls += 1
        self.most_rows = max(self.most_rows, hidden.shape[:-1].numel())
        return self.inner(hidden)


class Bare(nn.Module):
    """Only a head: what :meth:`Head.install` needs of a model."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.lm_head = head

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, hidden):
        return self.lm_head(hidden)


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 11) ids and labels: one row without supervision, one with a prompt, one supervised
    throughout."""
    ids = torch.randint(0, V, (3, 11), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0], labels[1, :5] = -100, -100
    return ids, labels


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, S - 1) log-probs by the long way, zero where unsupervised."""
    logps = logits[:, :-1].float().log_softmax(-1)
    wanted = labels[:, 1:].clamp(min=0)
    return logps.gather(-1, wanted[..., None])[..., 0] * (labels[:, 1:] != -100)


def gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum, so that every token's weight differs."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, logps.numel()).view_as(logps)
    (logps * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
@pytest.mark.parametrize("chunk_rows", [None, 7, 1])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_equals_full_logits(tie, chunk_rows, wrapped):
    """Values to 1e-6, gradients to 1e-5, whether everything fits into one chunk (None) or not; a
    tied embedding gets the gradient of both its uses."""
    model = tiny_llama(tie=tie)
    ids, labels = rows()
    expected = reference(model(ids).logits, labels)
    expected_gradients = gradients(model, expected)
    if wrapped:
        model.set_output_embeddings(Wrapped(model.lm_head))
    head = Head.install(model, chunk_rows=chunk_rows)
    head.set(labels)
    flat = model(ids).logits
    head.clear()
    assert flat.shape == (1, 16) and flat.dtype == torch.float32
    found = scatter_token_logprobs(flat, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found_gradients = {
        name.replace("lm_head.inner", "lm_head"): g for name, g in gradients(model, found).items()
    }
    assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("way", ["linear", "linear with bias in bf16", "any module", "full logits"])
@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_temperature_divides_the_logits(chunk_rows, temperature, way, monkeypatch):
    """Values and gradients are those of log_softmax(logits / temperature), chunks formed again in
    the backward too, whatever the temperature has become by then."""
    monkeypatch.setattr("coati.models.logprobs.CHUNK_BYTES", 4 * V * (chunk_rows or 100))
    model = Bare(nn.Linear(32, V, bias="bias" in way))
    if "bf16" in way:
        model = model.bfloat16()
    torch.manual_seed(0)
    nn.init.normal_(model.lm_head.weight)
    hidden, (_, labels) = torch.randn(3, 11, 32, dtype=model.lm_head.weight.dtype), rows()
    expected = reference(model(hidden).float() / temperature, labels)
    expected_gradients = gradients(model, expected)
    assert (expected - reference(model(hidden), labels)).abs().max() > 0.1
    if way == "full logits":
        flat = logprobs_from_logits(model(hidden), labels, temperature=temperature)
    else:
        if way == "any module":
            model.lm_head = Wrapped(model.lm_head)
        head = Head.install(model)
        head.temperature = temperature
        head.set(labels)
        flat = model(hidden)
        head.temperature = 1.0
    found = scatter_token_logprobs(flat, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    found_gradients = {
        name.replace("lm_head.inner", "lm_head"): g for name, g in gradients(model, found).items()
    }
    assert_same_gradients(
        found_gradients, expected_gradients, tolerance=2e-2 if "bf16" in way else 1e-5
    )


def test_without_labels_the_model_is_as_before():
    model = tiny_llama()
    ids, labels = rows()
    expected = model(ids).logits
    head = Head.install(model)
    assert torch.equal(model(ids).logits, expected)
    head.set(labels)
    head.clear()
    assert torch.equal(model(ids).logits, expected)


def test_installing_again_replaces_and_removing_restores():
    model = tiny_llama()
    ids, labels = rows()
    first, second = Head.install(model), Head.install(model)
    first.set(labels)
    assert model(ids).logits.shape == (3, 11, V)  # the first is no longer in place
    second.set(labels)
    assert model(ids).logits.shape == (1, 16)
    second.remove()
    assert model(ids).logits.shape == (3, 11, V)


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
@pytest.mark.parametrize("width", [1, 11])
def test_nothing_supervised_still_reaches_every_parameter(width, wrapped):
    """Data-parallel ranks must all run the same backward; a row of one token predicts nothing."""
    model = tiny_llama()
    if wrapped:
        model.set_output_embeddings(Wrapped(model.lm_head))
    ids = rows()[0][:, :width]
    labels = ids if width == 1 else torch.full_like(ids, -100)
    head = Head.install(model)
    head.set(labels)
    flat = model(ids).logits
    assert flat.shape == (1, 0)
    assert scatter_token_logprobs(flat, labels).shape == (3, width - 1)
    flat.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
@pytest.mark.parametrize("supervised", [True, False])
def test_nan_in_unselected_rows_stays_there(supervised, wrapped):
    torch.manual_seed(0)
    module = nn.Linear(8, V, bias=False)
    model = Bare(Wrapped(module) if wrapped else module)
    hidden = torch.randn(1, 4, 8)
    hidden[0, [0, 1, 3]] = math.nan
    hidden.requires_grad_()
    labels = torch.tensor([[5, -100, -100, 7 if supervised else -100]])
    head = Head.install(model)
    head.set(labels)
    flat = model(hidden)
    flat.sum().backward()
    assert (
        flat.isfinite().all()
        and module.weight.grad.isfinite().all()
        and hidden.grad.isfinite().all()
    )
    assert flat.shape == (1, int(supervised))


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
def test_low_precision_takes_its_log_softmax_in_fp32(wrapped):
    """bf16 logits, fp32 log-softmax: as good as log_softmax(logits.float()), unlike
    log_softmax(logits)."""
    torch.manual_seed(0)
    module = nn.Linear(32, V, bias=True).bfloat16()
    model = Bare(Wrapped(module) if wrapped else module)
    hidden = torch.randn(2, 9, 32).bfloat16()
    labels = torch.randint(0, V, (2, 9))
    expected = reference(module(hidden), labels)
    expected_gradients = gradients(model, expected)
    for chunk_rows in (None, 5):
        head = Head.install(model, chunk_rows=chunk_rows)
        head.set(labels)
        found = scatter_token_logprobs(model(hidden), labels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert_same_gradients(gradients(model, found), expected_gradients, tolerance=2e-2)


def test_autocast_forms_low_precision_logits():
    model = tiny_llama()
    ids, labels = rows()
    head = Head.install(model, chunk_rows=5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(model(ids).logits, labels)
        head.set(labels)
        found = scatter_token_logprobs(model(ids).logits, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model, found).values())


def test_frozen_head_and_no_grad():
    model = tiny_llama()
    ids, labels = rows()
    model.lm_head.requires_grad_(False)
    head = Head.install(model, chunk_rows=5)
    head.set(labels)
    model(ids).logits.sum().backward()
    assert (
        model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad.abs().max() > 0
    )
    with torch.no_grad():
        flat = model(ids).logits
    head.clear()
    torch.testing.assert_close(
        scatter_token_logprobs(flat, labels), reference(model(ids).logits, labels)
    )


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_backward_twice(chunk_rows):
    """PPO and its kin may keep the graph: a second backward gives the same gradient."""
    model = tiny_llama()
    ids, labels = rows()
    head = Head.install(model, chunk_rows=chunk_rows)
    head.set(labels)
    loss = model(ids).logits.sum()
    loss.backward(retain_graph=True)
    once = model.lm_head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 2 * once)


def test_under_gradient_checkpointing():
    model = tiny_llama()
    ids, labels = rows()
    expected = gradients(model, reference(model(ids).logits, labels))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    head = Head.install(model, chunk_rows=3)
    head.set(labels)
    assert_same_gradients(
        gradients(model, scatter_token_logprobs(model(ids).logits, labels)), expected
    )


def test_lora_on_the_head_itself():
    from peft import LoraConfig, get_peft_model

    ids, labels = rows()
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(reference(model(ids).logits, labels).sum(), trained)
    head = Head.install(model, chunk_rows=4)
    head.set(labels)
    found = torch.autograd.grad(model(ids).logits.sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_all_ranks_call_a_sharded_head_equally_often():
    """A rank with 3 chosen tokens beside one with 12 runs as many chunks, some of them blank."""
    model = tiny_llama()
    module = Wrapped(model.lm_head)
    model.set_output_embeddings(module)
    ids = torch.arange(8).view(2, 4)
    labels = ids.clone()
    labels[1], labels[0, 0] = -100, -100
    expected = reference(model(ids).logits, labels)
    asked = []
    module.calls = 0
    head = Head.install(model, chunk_rows=2, agree_on_chunks=lambda count: asked.append(count) or 6)
    head.set(labels)
    found = scatter_token_logprobs(model(ids).logits, labels)
    assert asked == [2] and module.calls == 6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.sum().backward()
    assert module.weight.grad.isfinite().all()


def test_any_module_sees_no_more_than_a_chunk():
    model = tiny_llama()
    module = Wrapped(model.lm_head)
    model.set_output_embeddings(module)
    ids, labels = rows()
    head = Head.install(model, chunk_rows=3)
    head.set(labels)
    model(ids).logits.sum().backward()
    assert (
        module.most_rows == 3 and module.calls == 2 * 6
    )  # 16 rows in 6 chunks, each again in the backward


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation produced."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "any module"])
def test_full_logits_never_exist(wrapped):
    """64 supervised tokens, 16 at a time: nothing as large as 17 rows of logits, no logits kept for
    the backward."""
    torch.manual_seed(0)
    module = nn.Linear(4, 5000, bias=False)
    model = Bare(Wrapped(module) if wrapped else module)
    hidden, labels = torch.randn(1, 65, 4, requires_grad=True), torch.randint(0, 5000, (1, 65))
    kept = []
    head = Head.install(model, chunk_rows=16)
    head.set(labels)
    keep = saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    )
    with LargestTensor() as seen, keep:
        flat = model(hidden)
        if not wrapped:
            assert max(kept) == module.weight.numel()
        flat.sum().backward()
    assert seen.elements <= 16 * 5000


def test_kept_for_the_backward_when_it_fits_into_a_chunk():
    """One matrix product with the vocabulary in the forward pass, two in the backward: nothing is
    formed twice."""
    module = nn.Linear(4, 5000, bias=False)
    model = Bare(module)
    head = Head.install(model, chunk_rows=64)
    head.set(torch.randint(0, 5000, (1, 65)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.randn(1, 65, 4, requires_grad=True)).sum().backward()
    assert (
        sum(
            event.count
            for event in profile.key_averages()
            if event.key in ("aten::mm", "aten::addmm_")
        )
        == 3
    )


def test_labels_of_another_batch_are_refused():
    model = tiny_llama()
    head = Head.install(model)
    head.set(torch.zeros(3, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(3, 9\).*\(3, 11, 64\).*Head.clear"):
        model(rows()[0])


def test_no_output_embedding():
    """A pipeline stage that is not the last."""
    model = nn.Module()
    model.get_output_embeddings = lambda: None
    head = Head.install(model)
    head.set(torch.zeros(1, 2, dtype=torch.long))
    head.clear()
    head.remove()


def test_hand_worked():
    """Logits [0, ln 3] at both positions: p = 1/4 and 3/4. Only the second of two labels is left
    after the shift."""
    model = Bare(nn.Linear(1, 2, bias=False))
    model.lm_head.weight.data = torch.tensor([[0.0], [math.log(3.0)]])
    head = Head.install(model)
    head.set(torch.tensor([[0, 0, 1]]))
    found = model(torch.ones(1, 3, 1))
    torch.testing.assert_close(found, torch.log(torch.tensor([[0.25, 0.75]])))
    found.sum().backward()
    # d/dw of log p(0) is (3/4, -3/4), of log p(1) (-1/4, 1/4)
    torch.testing.assert_close(model.lm_head.weight.grad, torch.tensor([[0.5], [-0.5]]))


def test_far_apart_logits_stay_finite():
    model = Bare(nn.Linear(1, 3, bias=False))
    model.lm_head.weight.data = torch.tensor([[0.0], [500.0], [-500.0]])
    head = Head.install(model)
    head.set(torch.tensor([[0, 0, 1, 2]]))
    found = model(torch.ones(1, 4, 1))
    torch.testing.assert_close(found, torch.tensor([[-500.0, 0.0, -1000.0]]))
    found.sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_targets_shift_by_one():
    assert next_token_targets(torch.tensor([[1, 2, 3], [4, -100, 6]])).tolist() == [
        [2, 3, -100],
        [-100, 6, -100],
    ]
    assert next_token_targets(torch.tensor([[1]])).tolist() == [[-100]]


def test_full_logits_path_equals_the_head(monkeypatch):
    """For models whose logits change after the head; in chunks too."""
    monkeypatch.setattr("coati.models.logprobs.CHUNK_BYTES", 4 * V * 3)
    model = tiny_llama()
    ids, labels = rows()
    expected = reference(model(ids).logits, labels)
    expected_gradients = gradients(model, expected)
    flat = logprobs_from_logits(model(ids).logits, labels)
    assert flat.shape == (1, 16)
    found = scatter_token_logprobs(flat, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert_same_gradients(gradients(model, found), expected_gradients)
    assert logprobs_from_logits(model(ids).logits, torch.full_like(labels, -100)).shape == (1, 0)


def test_models_that_change_their_logits_are_named():
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    assert "final_logit_softcapping=30.0" in head_unsupported(Gemma2Config())
    assert "logit_scale=0.0625" in head_unsupported(CohereConfig())
    assert head_unsupported(GraniteConfig(logits_scaling=8.0)) is not None
    assert head_unsupported(GraniteConfig(logits_scaling=1.0)) is None
    assert head_unsupported(LlamaConfig()) is None


@pytest.mark.parametrize(
    "field", ["logits_soft_cap", "output_logit_soft_cap", "unpadded_vocab_size"]
)
def test_other_names_of_a_change_of_logits(field):
    config = tiny_llama().config
    setattr(config, field, 1)
    assert f"{field}=1" in head_unsupported(config)


def one_shard() -> dict[str, torch.Tensor]:
    """On one of two ranks, which hold 250 and 134 of the 384 vocabulary entries: log-probs and
    gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def reduced(operation):
        def run(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=operation)
            return tensor

        return run

    full, hidden, labels = _shard_case()
    offset, size = ((0, 250), (250, 134))[dist.get_rank()]
    shard = nn.Linear(8, size, bias=False)
    shard.weight.data = full.weight.data[offset : offset + size].clone()
    collective = VocabCollective(offset, reduced(dist.ReduceOp.MAX), reduced(dist.ReduceOp.SUM))
    head = Head.install(Bare(shard), collective=collective, chunk_rows=4)
    head.set(labels)
    hidden.requires_grad_()
    flat = shard(hidden)
    (flat * torch.arange(flat.numel())).sum().backward()
    return {"flat": flat.detach(), "weight": shard.weight.grad, "hidden": hidden.grad}


def _shard_case() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    labels = torch.randint(0, V, (2, 7))
    labels[0, :3] = -100
    labels[1, 1:3] = torch.tensor([249, 250])  # either side of the cut
    return nn.Linear(8, V, bias=False), torch.randn(2, 7, 8), labels


def test_vocabulary_split_over_two_processes():
    """The same log-probs on both ranks; each rank's share of the weight gradient; hidden gradients
    that add up."""
    full, hidden, labels = _shard_case()
    hidden.requires_grad_()
    head = Head.install(Bare(full))
    head.set(labels)
    expected = full(hidden)
    (expected * torch.arange(expected.numel())).sum().backward()
    first, second = run(2, "tests.models.test_head:one_shard")
    torch.testing.assert_close(first["flat"], expected.detach(), rtol=0, atol=1e-6)
    assert torch.equal(first["flat"], second["flat"])
    torch.testing.assert_close(
        torch.cat([first["weight"], second["weight"]]), full.weight.grad, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        first["hidden"] + second["hidden"], hidden.grad, rtol=1e-4, atol=1e-5
    )
