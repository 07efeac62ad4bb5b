"""DoRA, rank-stabilized LoRA and LoRA+: their formulas, their files as peft reads and writes them,
and targets by name."""

import json
import math

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from coati.models.loading import load_causal_lm
from coati.models.lora.adapter_files import load_lora, save_lora
from coati.models.lora.lora import LoraConfig, apply_lora, merge_lora, merged, target_names
from coati.parallel.optimizer import OptimizerSettings, build_optimizer
from coati.parallel.options import ParallelOptions
from tests.models.families import tiny_gpt2, tiny_qwen2
from tests.models.lora.test_lora import logits, trained
from tests.tiny import tiny_llama

VARIANTS = [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}]


def one_layer(config):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(3, 2, bias=False)})
    model["layer"].weight.data = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    adapted = apply_lora(model, config).eval()
    inner = adapted.base_model.model["layer"]
    inner.lora_A["default"].weight.data = torch.tensor([[1.0, 0.0, 0.0]])
    inner.lora_B["default"].weight.data = torch.tensor([[2.0], [0.0]])
    return inner


def test_rslora_scales_by_the_root_of_the_rank():
    config = LoraConfig(r=16, lora_alpha=8, use_rslora=True)
    assert config.scale == 2.0 and LoraConfig(r=16, lora_alpha=8).scale == 0.5
    adapted = apply_lora(tiny_llama(), config)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_turns_the_direction_and_keeps_the_magnitude(quantized):
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=["layer"], linear_lora_dropout=0.0, use_dora=True
    )
    if quantized:
        config.quantize_base = "int8"
    layer = one_layer(config)
    # W + BA = [[5, 4, 0], [0, 0, 2]] with rows of norm sqrt(41) and 2; the magnitudes, 5 and 2, are
    # those of W.
    assert torch.allclose(
        layer.lora_magnitude_vector["default"].weight, torch.tensor([5.0, 2.0]), atol=2e-2
    )
    found = layer(torch.tensor([[1.0, 1.0, 1.0]]))
    assert torch.allclose(found, torch.tensor([[9 * 5 / math.sqrt(41), 2.0]]), atol=3e-2)


@pytest.mark.parametrize("more", VARIANTS)
@pytest.mark.parametrize("make", [lambda: tiny_llama(tie=True), tiny_qwen2])
def test_plain_peft_computes_the_same_from_what_is_saved(more, make, tmp_path):
    make().save_pretrained(tmp_path / "base")
    model = trained(apply_lora(load_causal_lm(tmp_path / "base"), LoraConfig(r=4, **more)))
    expected = logits(model)
    save_lora(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for name in ("use_dora", "use_rslora"):
        assert written[name] is more.get(name, False)
    theirs = PeftModel.from_pretrained(load_causal_lm(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    assert torch.allclose(logits(load_causal_lm(tmp_path / "adapter")), expected, atol=1e-5)


@pytest.mark.parametrize("more", VARIANTS)
def test_what_peft_saved_is_read(more, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = PeftLoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **more
    )
    model = trained(get_peft_model(load_causal_lm(tmp_path / "base"), settings), lr=0.5)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(load_causal_lm(tmp_path / "adapter")), expected, atol=1e-5)
    assert not torch.allclose(logits(load_causal_lm(tmp_path / "base")), expected, atol=1e-3)


@pytest.mark.parametrize("more", VARIANTS)
def test_training_goes_on_to_the_bit_and_merging_leaves_no_trace(more, tmp_path):
    config = LoraConfig(r=4, **more)
    model = trained(apply_lora(tiny_llama(), config))
    expected = logits(model)
    save_lora(model, tmp_path)
    again = apply_lora(tiny_llama(), config, seed=7)
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), expected)
    with merged(again):
        assert torch.allclose(logits(again), expected, atol=1e-5)
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(tiny_llama()))
    assert torch.allclose(logits(merge_lora(again)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="the adapter was trained with use_"):
        load_lora(apply_lora(tiny_llama(), LoraConfig(r=4)), tmp_path)


@pytest.mark.parametrize("first", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("second", [{"use_rslora": True}, {}])
def test_rank_stabilized_adapters_are_joined_as_others_are(first, second, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    place = tmp_path / "base"
    for number, more in enumerate((first, second)):
        config = LoraConfig(r=3 + number, linear_lora_dropout=0.0, **more)
        model = trained(apply_lora(load_causal_lm(place), config))
        expected = logits(model)
        place = tmp_path / f"adapter{number}"
        save_lora(model, place)
    assert (place / "lora_chain.json").is_file()
    plain = PeftModel.from_pretrained(load_causal_lm(tmp_path / "base"), place)
    assert torch.allclose(logits(plain), expected, atol=1e-4)
    again = apply_lora(load_causal_lm(tmp_path / "adapter0"), config)
    load_lora(again, place)
    assert torch.equal(logits(again), logits(model))


def test_pissa_with_rank_stabilization_is_an_adapter_of_twice_the_rank(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_initialization_method="PiSSA", use_rslora=True, linear_lora_dropout=0.0
    )
    model = trained(apply_lora(load_causal_lm(tmp_path / "base"), config))
    save_lora(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(load_causal_lm(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)


def test_dora_on_an_adapter_is_not_joined_with_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    place = tmp_path / "base"
    for number, dora in enumerate((False, True)):
        config = LoraConfig(r=2, linear_lora_dropout=0.0, use_dora=dora)
        model = trained(apply_lora(load_causal_lm(place), config))
        place = tmp_path / f"adapter{number}"
        save_lora(model, place)
    assert not (place / "lora_chain.json").exists()
    assert torch.allclose(logits(load_causal_lm(place)), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"use_dora": True, "lora_initialization_method": "PiSSA"}, "goes with neither PiSSA"),
        ({"use_dora": True, "lora_experts": True}, "nor lora_experts"),
        ({"quantize_base": "nf4", "lora_initialization_method": "PiSSA"}, "PiSSA starts from"),
        ({"quantize_base": "int3"}, "quantize_base must be one of nf4, int8, not 'int3'"),
        ({"use_dora": "yes"}, "use_dora must be true or false, not 'yes'"),
        ({"target_modules": "q_proj"}, "a list of layer names, 'all-linear', 'attention' or null"),
        ({"modules_to_save": "attention"}, "modules_to_save must be a list of layer names or null"),
    ],
)
def test_what_excludes_each_other_is_refused(settings, said, tmp_path):
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"r": 2, **settings}))
    with pytest.raises(ValueError, match="lora.json: ") as error:
        LoraConfig.from_file(file)
    assert said in str(error.value)


def test_attention_and_all_linear_name_their_layers():
    model = tiny_llama()
    names = target_names(model, "attention")
    assert len(names) == 8 and all(".self_attn." in name for name in names)
    assert {name.rsplit(".")[-1] for name in target_names(tiny_gpt2(), "attention")} == {
        *("c_attn", "c_proj")
    }
    everything = LoraConfig(r=2, target_modules="all-linear")
    assert everything.target_modules is None and len(target_names(model, None)) == 14
    with pytest.raises(ValueError, match="'attention': ModuleDict has no module of that name"):
        target_names(nn.ModuleDict({"layer": nn.Linear(2, 2)}), "attention")


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    settings = OptimizerSettings(lr=1e-3, lora_plus_ratio=16)
    groups = build_optimizer(model, ParallelOptions(plugin="ddp"), settings).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [group["lr"] for group in groups] == [1e-3, 1e-3 * 16]
    a, b = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert len(a) == len(b) == 3
    assert all("_A" in name for name in a) and all("_B" in name for name in b)
    with pytest.raises(ValueError, match="--lora_plus_ratio: the model has no LoRA adapters"):
        build_optimizer(tiny_llama(), ParallelOptions(plugin="ddp"), settings)
