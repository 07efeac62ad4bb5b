"""QLoRA: what is stored is what bitsandbytes stores, gradients are those of LoRA on the dequantized
base, and what is saved, merged and resumed has the values that were trained."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from coati.models.loading import adapted, load_causal_lm
from coati.models.lora.adapter_files import load_lora, save_lora
from coati.models.lora.lora import LoraConfig, apply_lora, merge_lora, merged
from coati.models.lora.quantized_base import (
    QuantizedLinear,
    dequantize,
    quantizable_layers,
    quantize_base,
    quantized_layers,
    round_base,
)
from coati.models.quantization_registry import BASES, stored_bytes
from coati.models.reward_model import RewardModel
from tests.models.families import tiny_gpt2, tiny_qwen2
from tests.models.lora.test_lora import IDS, logits, trained
from tests.tiny import tiny_llama

KINDS = tuple(BASES)


def layer_of(rows=6, columns=130, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias)


def test_nf4_is_the_quantization_of_bitsandbytes():
    from bitsandbytes import functional

    layer = layer_of(7, 130)  # 910 weights: the last block of 64 is not full
    codes, state = functional.quantize_4bit(
        layer.weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    stored = QuantizedLinear(layer, "nf4")
    assert torch.equal(stored.codes, codes.flatten())
    assert torch.equal(stored.weight, functional.dequantize_4bit(codes, state))


def test_int8_is_the_row_wise_quantization_of_llm_int8():
    from bitsandbytes import functional

    layer = layer_of()
    layer.weight.data[2] = 0  # a row without a scale
    stored = QuantizedLinear(layer, "int8")
    expected = functional.int8_vectorwise_quant(layer.weight.detach().half())[0]
    difference = (stored.codes.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02  # fp16's rounding
    scales = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    assert ((stored.weight - layer.weight).abs() <= scales / 2 + 1e-8).all()
    assert not stored.weight[2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_takes_what_the_registry_says_and_no_cast_changes_it(kind):
    stored = QuantizedLinear(layer_of(64, 192, bias=False), kind)
    size = sum(p.numel() * p.element_size() for p in stored.parameters())
    assert size == stored_bytes(kind, 64, 192)
    before = {name: tensor.clone() for name, tensor in stored.state_dict().items()}
    weight = stored.weight
    stored.to(torch.bfloat16).half().float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.state_dict().items())
    assert torch.equal(stored.weight, weight)
    assert stored.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_the_gradient_is_that_of_lora_on_the_dequantized_base(kind, dora, make):
    config = LoraConfig(r=4, linear_lora_dropout=0.0, use_dora=dora)
    quantized = apply_lora(quantize_base(make(), kind), config)
    plain = make()
    round_base(plain, kind)
    plain = apply_lora(plain, config)
    for model in (quantized, plain):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_magnitude" not in name:
                parameter.data.normal_(std=0.1, generator=generator)
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad for n, p in quantized.named_parameters() if p.requires_grad}
    others = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert gradients.keys() == others.keys() and len(gradients) >= 28
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, others[name], rtol=1e-5, atol=1e-5), name


def test_dropout_of_dora_on_a_quantized_base_drops_what_peft_drops():
    config = LoraConfig(r=4, linear_lora_dropout=0.5, use_dora=True)
    outputs = []
    for kind in (None, "nf4"):
        model = tiny_llama()
        round_base(model, "nf4")
        if kind:
            quantize_base(model, kind)
        model = trained_start(apply_lora(model, config)).train()
        torch.manual_seed(3)
        outputs.append(model(input_ids=IDS).logits)
    assert torch.allclose(*outputs, atol=2e-2) and outputs[0].std() > 0.1


def trained_start(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise)
    return model


def test_nothing_is_kept_for_the_backward_pass_but_the_input_of_adapters():
    layer = QuantizedLinear(layer_of(64, 64, bias=False), "nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert not any(tensor.numel() == 64 * 64 for tensor in saved)


def test_under_autocast_the_product_has_its_type():
    layer = QuantizedLinear(layer_of(), "nf4")
    x = torch.randn(2, 130, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert torch.allclose(x.grad[0], layer.weight.sum(dim=0), atol=0.05)


@pytest.mark.parametrize("mapped", [False, True], ids=["memory", "file"])
def test_who_holds_a_weight_of_the_base_still_reads_it(tmp_path, mapped):
    """Pages of a file are given back, and come again; other memory is somebody else's."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    if mapped:
        values = model[0].weight.detach().clone()
        values.numpy().tofile(tmp_path / "weights")
        held = torch.from_file(str(tmp_path / "weights"), size=256 * 256).view(256, 256)
        model[0].weight = nn.Parameter(held)
    weight = model[0].weight
    before = weight.detach().clone()
    quantize_base(model, "int8")
    assert torch.equal(weight, before)


def test_heads_routers_and_other_kinds_of_layers_stay_as_they_are():
    model = tiny_llama()
    model.model.layers[0].gate = nn.Linear(4, 4)
    names = quantizable_layers(model)
    assert len(names) == 14 and not any("lm_head" in n or n.endswith(".gate") for n in names)
    reward = RewardModel(backbone=tiny_llama())
    assert "score" not in quantizable_layers(reward) and len(quantizable_layers(reward)) == 14
    with pytest.raises(ValueError, match="--quantize_base nf4: GPT2LMHeadModel has no linear"):
        quantize_base(tiny_gpt2(), "nf4")
    with pytest.raises(ValueError, match="must be one of nf4, int8, not 'int3'"):
        quantize_base(tiny_llama(), "int3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_directory_is_quantized_as_it_is_loaded_and_stays_mapped_in_order(kind, stored, tmp_path):
    tiny_llama(tie=True).to(getattr(torch, stored)).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype="fp32", quantize_base=kind)
    expected = load_causal_lm(tmp_path, dtype="fp32")
    round_base(expected, kind)
    assert len(quantized_layers(model)) == 14
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_and_merged_into_the_values_that_were_trained(kind, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, linear_lora_dropout=0.0)
    model = apply_lora(load_causal_lm(tmp_path / "base", quantize_base=kind), config)
    expected = logits(trained(model))
    save_lora(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/lora_config.json").read_text())["quantize_base"] == kind
    # Training goes on to the bit ...
    again = apply_lora(load_causal_lm(tmp_path / "base", quantize_base=kind), config)
    load_lora(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    # ... a loader and a merge give whole weights of the same values ...
    whole = load_causal_lm(tmp_path / "adapter")
    assert not quantized_layers(whole)
    assert torch.allclose(logits(whole), expected, atol=1e-5)
    beside = adapted(load_causal_lm(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(beside), expected, atol=1e-5)
    # ... and on the unquantized base the adapter is another function.
    (tmp_path / "adapter/lora_config.json").unlink()
    assert not torch.allclose(logits(load_causal_lm(tmp_path / "adapter")), expected, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_merging_for_a_while_leaves_every_bit_as_it_was(dora):
    config = LoraConfig(r=4, linear_lora_dropout=0.0, use_dora=dora)
    model = trained(apply_lora(quantize_base(tiny_llama(), "nf4"), config))
    expected = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
        assert not quantized_layers(model)
        names = {n.replace(".base_layer", "") for n in model.state_dict() if ".lora_" not in n}
        assert {n.removeprefix("base_model.model.") for n in names} == set(
            tiny_llama().state_dict()
        )
    assert torch.equal(logits(model), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    whole = merge_lora(model)
    assert not quantized_layers(whole) and torch.allclose(logits(whole), expected, atol=1e-5)


def test_dequantizing_says_what_rounding_changes(capsys):
    model = quantize_base(tiny_llama().bfloat16(), "nf4")
    dequantize(model)
    assert "rounding those to bfloat16 changes them by 0.1" in capsys.readouterr().err


def test_an_adapter_that_was_trained_on_another_base_is_told_of(tmp_path, capsys):
    config = LoraConfig(r=4)
    save_lora(apply_lora(quantize_base(tiny_llama(), "int8"), config), tmp_path)
    load_lora(apply_lora(tiny_llama(), config), tmp_path)
    assert "trained on a base of int8, this one is of whole weights" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["quantized on plain", "plain on quantized"])
def test_adapters_on_adapters_are_not_joined_over_a_quantized_base(order, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    kinds = [None, "nf4"] if order == "quantized on plain" else ["nf4", None]
    config = LoraConfig(r=2, linear_lora_dropout=0.0)
    place = tmp_path / "base"
    for number, kind in enumerate(kinds):
        model = trained(apply_lora(load_causal_lm(place, quantize_base=kind), config))
        expected = logits(model)
        place = tmp_path / f"adapter{number}"
        save_lora(model, place)
    assert not (place / "lora_chain.json").exists() and (place / "README.md").is_file()
    assert torch.allclose(logits(load_causal_lm(place)), expected, atol=1e-4)


def test_modules_of_few_bits_cannot_be_trained_whole():
    model = quantize_base(tiny_llama(), "int8")
    with pytest.raises(ValueError, match="stored in few bits by --quantize_base"):
        apply_lora(model, LoraConfig(r=2, modules_to_save=["o_proj"]))
    adapted_model = apply_lora(model, LoraConfig(r=2, modules_to_save=["lm_head", "norm"]))
    assert adapted_model.coati_lora.quantize_base == "int8"


def test_a_damaged_setting_of_an_adapter_is_named(tmp_path):
    save_lora(apply_lora(tiny_llama(), LoraConfig(r=2)), tmp_path)
    file = tmp_path / "lora_config.json"
    file.write_text(file.read_text().replace('"quantize_base": null', '"quantize_base": "int3"'))
    with pytest.raises(ValueError, match=r"lora_config.json: quantize_base is 'int3'; expected"):
        adapted(tiny_llama(), tmp_path)


def test_a_reward_model_is_quantized_below_its_head(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = RewardModel.from_pretrained(tmp_path, new_head=True, dtype="fp32", quantize_base="nf4")
    assert len(quantized_layers(model)) == 14 and model.score.weight.dtype == torch.float32
    config = LoraConfig(r=2, linear_lora_dropout=0.0)
    model = apply_lora(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, torch.ones_like(IDS)).sum().backward()
    optimizer.step()
    expected = model.eval()(IDS, torch.ones_like(IDS))
    save_lora(model, tmp_path / "adapter")
    again = RewardModel.from_pretrained(tmp_path / "adapter", dtype="fp32")
    assert torch.allclose(again(IDS, torch.ones_like(IDS)), expected, atol=1e-5)


LOAD = """
import sys
from pathlib import Path
from coati.models.loading import load_causal_lm
from coati.models.lora import quantized_base
import torch, bitsandbytes
quantized_base.QuantizedLinear(torch.nn.Linear(64, 64), "nf4").weight

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

load_causal_lm(sys.argv[2], quantize_base="nf4")
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
model = load_causal_lm(sys.argv[1], dtype="fp32", quantize_base="nf4")
print("bytes", held("VmHWM") - before, held("VmRSS") - before)
"""


@pytest.mark.slow  # a process of its own
def test_loading_never_holds_the_weights_whole(tmp_path):
    big = tiny_llama(layers=8, hidden=768, vocab_size=512)
    big.save_pretrained(tmp_path / "big")
    tiny_llama().save_pretrained(tmp_path / "tiny")
    whole = sum(p.numel() for p in big.parameters()) * 4
    call = [sys.executable, "-c", LOAD, str(tmp_path / "big"), str(tmp_path / "tiny")]
    # Freed blocks go back at once, so that the peak is what was held.
    give_back = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    environment = os.environ | give_back
    run = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    peak = next(int(line.split()[1]) for line in run.stdout.splitlines() if "bytes" in line)
    assert peak < 0.42 * whole  # 0.13 is what they take in the end
