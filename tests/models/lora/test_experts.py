"""LoRA on mixtures of experts: by default their experts stay as they are; with lora_experts the
adapters of experts are saved, loaded by peft, and merged."""

import pytest
import torch

from coati.models.loading import adapted
from coati.models.lora.lora import LoraConfig, apply_lora, expert_parameters, merged
from coati.parallel.weights import ModelAssets, save_model
from tests.distributed.spawn import run
from tests.models_table.families import BY_TYPE, known, tiny_model

MIXTURES = [name for name in ("mixtral", "qwen3_moe", "glm4_moe") if known(BY_TYPE[name])]


def joined(model) -> bool:
    """Whether experts are one parameter (transformers 5)."""
    return bool(expert_parameters(model))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_left_alone_unless_asked_for(name, caplog):
    model = tiny_model(BY_TYPE[name])
    if not joined(model):
        with pytest.raises(ValueError, match="no experts that are parameters"):
            apply_lora(model, LoraConfig(r=2, linear_lora_dropout=0.0, lora_experts=True))
        return
    adapters = [n for n, _ in apply_lora(model, LoraConfig(r=2)).named_parameters() if "lora_" in n]
    assert adapters and not any("experts" in n for n in adapters)
    with pytest.raises(ValueError, match="no dropout before experts"):
        apply_lora(tiny_model(BY_TYPE[name]), LoraConfig(r=2, lora_experts=True))


def train_and_save(name, folder) -> torch.Tensor:
    """In a worker: one step with adapters of experts, saved under ``folder``; the logits then."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.options import ParallelOptions
    from tests.models_table.cells import _CrossEntropy, rows

    launch(seed=0, timeout_s=60)
    base = tiny_model(BY_TYPE[name])
    base.save_pretrained(folder / "base")
    assets = ModelAssets.of(base)
    model = apply_lora(base, LoraConfig(r=2, linear_lora_dropout=0.0, lora_experts=True))
    engine = boost(model, ParallelOptions(plugin="zero2", lora=True), lr=1e-1, total_steps=4)
    for step in (0, 1):
        engine.train_step([rows(step, 0)], _CrossEntropy())
    save_model(engine, folder / "adapter", assets)
    engine.module.eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = engine.module(input_ids=ids).logits
        with merged(engine.module):
            torch.testing.assert_close(engine.module(input_ids=ids).logits, logits)
    return logits


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_experts_are_saved_for_peft(name, tmp_path):
    from transformers import AutoModelForCausalLM

    if not joined(tiny_model(BY_TYPE[name])):
        return
    (logits,) = run(1, "tests.models.lora.test_experts:train_and_save", name, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        again = adapted(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(again, logits)
    assert not torch.allclose(before, logits, atol=1e-3)
