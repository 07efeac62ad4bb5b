"""LoRA: the settings mean what they say, nothing of the base is lost, what is saved comes back."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from coati.models.lora.adapter_files import load_lora, read_lora, save_lora
from coati.models.lora.lora import (
    LoraConfig,
    apply_lora,
    convert_to_lora_module,
    merge_lora,
    merged,
    target_names,
)
from tests.models.families import tiny_gpt2, tiny_opt, tiny_qwen2
from tests.tiny import tiny_llama

IDS = torch.tensor([[5, 17, 300, 42, 9, 11], [1, 2, 3, 4, 5, 6]])


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, steps=3, lr=0.05):
    """The adapted model after a few steps, so that A, B and trainable biases are all off their
    start."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_opt, tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("bias", ["none", "all", "lora"])
def test_at_the_start_the_output_is_the_base_models(make, bias):
    expected = logits(make())
    adapted = apply_lora(make(), LoraConfig(r=4, lora_train_bias=bias))
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_opt, lambda: tiny_llama(tie=True)])
def test_pissa_starts_at_the_base_model_and_leaves_it_alone(make):
    expected = logits(make())
    adapted = apply_lora(
        make(), LoraConfig(r=4, lora_initialization_method="PiSSA", linear_lora_dropout=0.0)
    )
    assert torch.allclose(logits(adapted), expected, atol=1e-5)
    trained(adapted)
    assert not torch.allclose(logits(adapted), expected, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected)


def test_pissa_with_dropout_starts_at_the_base_model_in_training_too():
    expected = logits(tiny_llama())
    adapted = apply_lora(tiny_llama(), LoraConfig(r=4, lora_initialization_method="PiSSA"))
    assert any(module.p > 0 for module in adapted.modules() if isinstance(module, nn.Dropout))
    adapted.train()
    assert torch.allclose(logits(adapted), expected, atol=1e-5)


def test_pissa_starts_from_the_largest_singular_values():
    layer = nn.Linear(6, 4, bias=False)
    u, v = torch.linalg.qr(torch.randn(4, 4))[0], torch.linalg.qr(torch.randn(6, 6))[0][:, :4]
    layer.weight.data = u @ torch.diag(torch.tensor([9.0, 4.0, 0.5, 0.1])) @ v.T
    model = nn.ModuleDict({"layer": layer})
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["layer"], lora_initialization_method="PiSSA"
    )
    adapted = apply_lora(model, config).base_model.model["layer"]
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    principal = u[:, :2] @ torch.diag(torch.tensor([9.0, 4.0])) @ v[:, :2].T
    assert torch.allclose(3 * b @ a, principal, atol=1e-4)  # scale = 6 / 2
    assert torch.allclose(
        a.norm(dim=1), torch.tensor([3.0, 4.0 / 3]).sqrt(), atol=1e-4
    )  # sqrt(S / scale) on each side
    assert torch.allclose(b.norm(dim=0), torch.tensor([3.0, 4.0 / 3]).sqrt(), atol=1e-4)


def test_every_rank_draws_the_same_adapter_and_the_runs_random_state_is_untouched():
    states = []
    for seed in (1, 2):
        model = tiny_llama()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        adapted = apply_lora(model, LoraConfig(r=4, lora_initialization_method="PiSSA"))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(adapted.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_alpha_scales_the_update():
    layer = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    adapted = apply_lora(layer, LoraConfig(r=2, lora_alpha=6, target_modules=["layer"])).eval()
    inner = adapted.base_model.model["layer"]
    inner.lora_A["default"].weight.data = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    inner.lora_B["default"].weight.data = torch.tensor([[1.0, 0], [0, 2.0]])
    x = torch.tensor([[5.0, 7.0, 9.0]])
    assert torch.allclose(
        inner(x) - inner.get_base_layer()(x), torch.tensor([[15.0, 42.0]])
    )  # 3 * [5, 2 * 7]


def test_dropout_of_linear_and_embedding_layers_is_their_own_and_acts_only_in_training():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up = nn.Embedding(50, 8), nn.Linear(8, 8)

    config = LoraConfig(
        r=2, linear_lora_dropout=0.0, embedding_lora_dropout=0.5, target_modules=["embed", "up"]
    )
    net = apply_lora(Net(), config).base_model.model
    nn.init.ones_(net.embed.lora_embedding_A["default"])
    nn.init.ones_(net.embed.lora_embedding_B["default"])
    x, words = torch.randn(100, 8), torch.arange(50).repeat(20)
    nn.init.ones_(net.up.lora_B["default"].weight)
    assert torch.equal(net.train().up(x), net.eval().up(x))
    nn.init.zeros_(net.embed.get_base_layer().weight)
    in_training, at_rest = net.train().embed(words), net.eval().embed(words)
    assert (at_rest == 2 * 32 / 2).all()  # r ones times alpha / r
    assert set(in_training.flatten().tolist()) == {
        0.0,
        32.0,
        64.0,
    }  # 0, 1 or 2 of the r = 2 kept, at double weight
    assert abs((in_training[:, 0] == 0).float().mean().item() - 0.25) < 0.06


def test_linear_dropout_is_the_configured_one():
    adapted = apply_lora(
        tiny_llama(), LoraConfig(r=2, linear_lora_dropout=0.3, target_modules=["q_proj"])
    )
    assert {m.p for m in adapted.modules() if isinstance(m, nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("none", set()), ("lora", {"q_proj"}), ("all", {"q_proj", "k_proj", "v_proj"})],
)
def test_biases_are_trained_as_asked_and_none_is_added(mode, expected):
    before = {n for n, _ in tiny_qwen2().named_parameters() if n.endswith("bias")}
    adapted = apply_lora(
        tiny_qwen2(), LoraConfig(r=2, lora_train_bias=mode, target_modules=["q_proj"])
    )
    biases = {n: p.requires_grad for n, p in adapted.named_parameters() if n.endswith("bias")}
    assert len(biases) == len(before)
    assert {
        part for n, on in biases.items() if on for part in n.split(".") if part.endswith("_proj")
    } == expected


def test_targets_are_endings_of_names():
    model = tiny_llama()
    assert target_names(model, ["layers.1.self_attn.o_proj"]) == ["model.layers.1.self_attn.o_proj"]
    assert len(target_names(model, ["o_proj", "up_proj"])) == 4
    with pytest.raises(ValueError, match=r"\['o'\].*there are: down_proj, embed_tokens"):
        target_names(model, ["o", "q_proj"])  # not every name that contains an "o"
    with pytest.raises(ValueError, match="nearest: q_proj"):
        apply_lora(model, LoraConfig(r=2, target_modules=["q_project"]))


def test_by_default_every_linear_layer_but_the_head():
    endings = {name.rsplit(".", 1)[-1] for name in target_names(tiny_llama())}
    assert endings == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rsplit(".", 1)[-1] for name in target_names(tiny_gpt2())} == {
        "c_attn",
        "c_proj",
        "c_fc",
    }


CASES = {
    "plain": (tiny_llama, LoraConfig(r=4)),
    "PiSSA": (
        tiny_llama,
        LoraConfig(r=4, lora_initialization_method="PiSSA", linear_lora_dropout=0.0),
    ),
    "biases of adapted layers": (
        tiny_opt,
        LoraConfig(r=4, lora_train_bias="lora", target_modules=["q_proj", "fc1"]),
    ),
    "all biases": (tiny_opt, LoraConfig(r=4, lora_train_bias="all", target_modules=["v_proj"])),
    "transposed layers": (tiny_gpt2, LoraConfig(r=4)),
    "tied embedding": (
        lambda: tiny_llama(tie=True),
        LoraConfig(
            r=4,
            lora_initialization_method="PiSSA",
            target_modules=["embed_tokens", "q_proj", "down_proj"],
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_base_and_saved_adapter_give_identical_logits_in_plain_peft(case, tmp_path):
    make, config = CASES[case]
    adapted = trained(apply_lora(make(), config))
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(make()), atol=1e-4)
    save_lora(adapted, tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(logits(again), expected, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_a_saved_adapter_to_the_bit(case, tmp_path):
    make, config = CASES[case]
    adapted = trained(apply_lora(make(), config))
    save_lora(adapted, tmp_path)
    resumed = apply_lora(make(), config, seed=7)  # another start, to be overwritten
    load_lora(resumed, tmp_path)
    before, after = adapted.state_dict(), resumed.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("case", CASES)
def test_merging_gives_a_plain_model_with_the_same_logits(case, tmp_path):
    make, config = CASES[case]
    adapted = trained(apply_lora(make(), config))
    expected = logits(adapted)
    plain = merge_lora(adapted)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name or "pissa" in name]
    assert torch.allclose(logits(plain), expected, atol=2e-5)
    plain.save_pretrained(tmp_path)
    assert torch.allclose(logits(type(plain).from_pretrained(tmp_path)), expected, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_merging_for_a_while_leaves_every_bit_as_it_was(case):
    make, config = CASES[case]
    adapted = trained(apply_lora(make(), config))
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    expected = logits(adapted)
    with merged(adapted):
        changed = [
            key
            for key, tensor in adapted.state_dict().items()
            if not torch.equal(tensor, before[key])
        ]
        assert changed and all("base_layer" in key or "lm_head" in key for key in changed)
        assert torch.allclose(logits(adapted), expected, atol=2e-5)
    assert [
        key for key, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[key])
    ] == []
    assert torch.equal(logits(adapted), expected)


def test_eval_and_train_never_change_weights():
    adapted = trained(apply_lora(tiny_llama(), LoraConfig(r=4)))
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    adapted.eval()
    adapted.train()
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapted.state_dict().items())


def test_an_adapter_of_other_settings_is_refused(tmp_path):
    save_lora(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(ValueError, match="trained with r 4, this run has 8"):
        read_lora(apply_lora(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(ValueError, match=r"no tensor for .*k_proj"):
        read_lora(
            apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "k_proj"])), tmp_path
        )
    (tmp_path / "lora_config.json").unlink()
    with pytest.raises(ValueError, match="r is 4, expected 2"):
        read_lora(apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)


def test_the_file_of_settings(tmp_path):
    file = tmp_path / "lora.json"
    file.write_text(
        json.dumps({"r": 8, "lora_initialization_method": "PiSSA", "target_modules": ["q_proj"]})
    )
    assert LoraConfig.from_file(file) == LoraConfig(
        8, lora_initialization_method="PiSSA", target_modules=["q_proj"]
    )
    for content, message in [
        ('{"rank": 8, "r": 8}', "unknown key 'rank'.*did you mean"),
        ('{"lora_aplha": 8}', "did you mean 'lora_alpha'"),
        (
            '{"lora_train_bias": "lora_only"}',
            "lora_train_bias must be one of none, all, lora, not 'lora_only'",
        ),
        ('{"lora_initialization_method": "pissa"}', "kaiming_uniform, PiSSA, not 'pissa'"),
        ('{"r": 2.5}', "whole number"),
        ('{"linear_lora_dropout": 1}', "below 1"),
        ('{"target_modules": "q_proj"}', "list of layer names"),
        ("[1]", "JSON object"),
        ('{"r": 8,}', "lora.json:1"),
    ]:
        file.write_text(content)
        with pytest.raises(
            ValueError, match=f"lora.json.*{message}" if "json:1" not in message else message
        ):
            LoraConfig.from_file(file)


def test_the_sample_settings_fit_a_llama():
    from pathlib import Path

    config = LoraConfig.from_file(Path(__file__).parents[3] / "config" / "lora_config.json")
    assert apply_lora(tiny_llama(), config).coati_lora.r == config.r


def test_the_older_name_takes_a_rank_too():
    assert convert_to_lora_module(tiny_qwen2(), 4, "lora").coati_lora == LoraConfig(
        r=4, lora_train_bias="lora"
    )
    model = tiny_llama()
    assert convert_to_lora_module(model, 0) is model


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="at least 1"):
        apply_lora(tiny_llama(), LoraConfig())
    with pytest.raises(ValueError, match=r"PiSSA cannot start from .*c_attn.*Conv1D"):
        apply_lora(tiny_gpt2(), LoraConfig(r=2, lora_initialization_method="PiSSA"))
    with pytest.raises(ValueError, match=r"r at most 32 for .*k_proj"):
        apply_lora(tiny_llama(), LoraConfig(r=40, lora_initialization_method="PiSSA"))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        merge_lora(tiny_llama())
