"""The step by joint weights is the model's own forward, and is taken only where it is."""

import pytest
import torch
from torch import nn

from coati.models.generation.decoder import Decoder
from coati.models.generation.llama_step import LlamaStep, decodes_like_llama
from coati.models.generation.loop import generate
from coati.models.generation.prepacked_linear import LAYOUTS, Prepacked
from coati.utils.logging import forget_warnings, take_warnings
from tests.tiny import tiny_llama

pytestmark = pytest.mark.skipif(
    not LAYOUTS["onednn"].available(), reason="this PyTorch has no oneDNN"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    monkeypatch.setattr(Prepacked, "_fastest", lambda self, rows: "onednn")


def family(name, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases that change something
        for each in model.parameters():
            if each.dim() == 1:
                each.add_(0.3 * torch.randn_like(each))
    return model


@pytest.fixture
def steps(monkeypatch):
    """Rows of each call of a step."""
    calls, call = [], LlamaStep.__call__

    def counting(self, tokens, *others):
        calls.append(len(tokens))
        return call(self, tokens, *others)

    monkeypatch.setattr(LlamaStep, "__call__", counting)
    return calls


def sampled(model, rows=3, **keywords):
    torch.manual_seed(1)
    ids = torch.randint(3, 380, (rows, 6))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # unlike lengths
    return generate(
        model,
        ids,
        mask,
        stop_sequences=[[5], [9]],
        max_new_tokens=20,
        noise=torch.rand(rows, 20, dtype=torch.float64),
        return_logprobs=True,
        **keywords,
    )


@pytest.mark.parametrize(
    "name, changes",
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 16, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"num_key_value_heads": 4}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_tokens_and_logprobs_are_those_of_the_models_own_forward(steps, monkeypatch, name, changes):
    model = family(name, **changes)
    found = sampled(model)
    assert len(steps) > 10
    taken = len(steps)
    monkeypatch.setattr(Prepacked, "_fastest", lambda self, rows: None)
    own = sampled(model)
    assert len(steps) == taken
    assert torch.equal(found.sequences, own.sequences)
    torch.testing.assert_close(found.logprobs, own.logprobs, atol=1e-5, rtol=1e-5)


def refused(model):
    plain = [each for each in model.modules() if type(each) is nn.Linear]
    return not decodes_like_llama(model, plain)


def test_models_that_compute_something_else_are_refused():
    assert not refused(tiny_llama().eval())
    assert refused(family("Mistral", sliding_window=8))
    assert refused(family("Llama", hidden_act="gelu"))
    assert refused(family("Llama").double())
    assert refused(tiny_llama())  # in training mode: dropout


def test_a_hook_a_replaced_forward_and_a_foreign_layer_are_refused():
    hooked = tiny_llama().eval()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    replaced = tiny_llama().eval()
    replaced.model.layers[0].self_attn.forward = lambda *a, **k: None
    adapted = tiny_llama().eval()

    class Adapted(nn.Linear):
        pass

    adapted.model.layers[0].self_attn.q_proj = Adapted(32, 32)
    assert refused(hooked) and refused(replaced) and refused(adapted)


def test_a_model_that_differs_from_its_kind_decodes_by_its_own_forward_and_says_so(steps):
    from transformers.models.llama import modeling_llama

    class Louder(modeling_llama.LlamaMLP):
        """Looks like what it inherits from."""

        def forward(self, x):
            return 2 * super().forward(x)

    model = family("Llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = Louder
    forget_warnings()
    found = sampled(model)
    assert len(steps) == 1
    (said,) = [text for text in take_warnings() if "own forward" in text]
    assert "LlamaForCausalLM" in said
    logits = model(
        found.sequences,
        attention_mask=torch.cat(
            [torch.tensor([[0] * 4 + [1] * 2, [1] * 6, [1] * 6]), torch.ones(3, 20).long()], dim=1
        )[:, : found.sequences.shape[1]],
        position_ids=(
            torch.arange(found.sequences.shape[1])[None] - torch.tensor([[4], [0], [0]])
        ).clamp(min=0),
    ).logits[:, 5:-1]
    logps = logits.log_softmax(-1).gather(2, found.sequences[:, 6:, None])[..., 0]
    inside = torch.arange(logps.shape[1]) < found.lengths[:, None]
    torch.testing.assert_close(found.logprobs[inside], logps[inside], atol=1e-4, rtol=1e-4)


def test_a_step_goes_on_where_rows_leave_and_the_cache_grows(steps, monkeypatch):
    from coati.models.generation import kv_cache

    monkeypatch.setattr(kv_cache, "GROWTH", 4)
    model = family("Llama")
    limits = [3, 20, 11]
    found = sampled(model, limits=limits).responses()
    for row, limit in enumerate(limits):
        assert len(found[row]) <= limit
    taken = list(steps)
    monkeypatch.setattr(Prepacked, "_fastest", lambda self, rows: None)
    assert found == sampled(model, limits=limits).responses()
    assert taken[0] == 3 and taken[-1] == 1


def test_an_error_in_the_check_leaves_no_column_behind():
    """The check runs a token twice, in one column."""
    model = family("Llama")
    ids = torch.randint(3, 380, (2, 5))
    from coati.models.generation.sampling import Sampling

    decoder = Decoder(model, ids, torch.ones_like(ids), Sampling(False))
    with torch.no_grad(), Prepacked(model) as prepacked:
        decoder.prepacked = prepacked
        for shown in (5, 6, 7):
            decoder.step()
            prepacked.use(2)
            assert decoder.cache.get_seq_length() == shown
        assert prepacked.step.checked


def test_a_wrapper_that_computes_in_another_precision_keeps_its_own_forward(steps):
    class Autocast(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **keywords):
            with torch.autocast("cpu", torch.bfloat16):
                return self.module(*args, **keywords)

    forget_warnings()
    model = Autocast(family("Llama")).eval()
    sampled(model)
    assert not steps and not [text for text in take_warnings() if "own forward" in text]
