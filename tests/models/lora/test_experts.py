"""LoRA on mixtures of experts: by default their experts stay as they are; with lora_experts the
adapters of experts are saved, loaded by peft, and merged."""

import pytest
import torch

from coati.models.loading import adapted
from coati.models.lora.adapter_files import load_lora, save_lora
from coati.models.lora.lora import LoraConfig, apply_lora, merged
from coati.parallel.weights import ModelAssets, save_model
from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run
from tests.models_table.families import BY_TYPE, known, tiny_model

MIXTURES = [name for name in ("mixtral", "qwen3_moe", "glm4_moe") if known(BY_TYPE[name])]


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


if transformers_major() >= 5:

    @pytest.mark.parametrize("name", MIXTURES)
    def test_experts_are_left_alone_unless_asked_for(name):
        model = apply_lora(tiny_model(BY_TYPE[name]), LoraConfig(r=2))
        adapters = [n for n, _ in model.named_parameters() if "lora_" in n]
        assert adapters and not any("experts" in n for n in adapters)
        with pytest.raises(ValueError, match="no dropout before experts"):
            apply_lora(tiny_model(BY_TYPE[name]), LoraConfig(r=2, lora_experts=True))
        settings = LoraConfig(
            r=2,
            linear_lora_dropout=0.0,
            lora_experts=True,
            lora_initialization_method="PiSSA",
        )
        with pytest.raises(ValueError, match="cannot start from principal singular vectors"):
            apply_lora(tiny_model(BY_TYPE[name]), settings)

    def test_layers_named_as_experts_are_refused_rather_than_swapped_for_them():
        for target in ("shared_experts.down_proj", "layers.0.mlp.up_proj"):
            with pytest.raises(ValueError, match="named as an expert of Glm4Moe.*--lora_experts"):
                apply_lora(
                    tiny_model(BY_TYPE["glm4_moe"]), LoraConfig(r=2, target_modules=[target])
                )

    @pytest.mark.parametrize("name", MIXTURES)
    def test_adapters_of_experts_are_saved_for_peft(name, tmp_path):
        from transformers import AutoModelForCausalLM

        (logits,) = run(1, "tests.models.lora.test_experts:train_and_save", name, tmp_path)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            before = base(input_ids=ids).logits
            again = adapted(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        torch.testing.assert_close(again, logits)
        assert not torch.allclose(before, logits, atol=1e-3)

    def test_training_goes_on_from_adapters_of_experts(tmp_path):
        def fresh():
            settings = LoraConfig(r=2, linear_lora_dropout=0.0, lora_experts=True)
            return apply_lora(tiny_model(BY_TYPE["qwen3_moe"]), settings)

        model = fresh()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter)
        save_lora(model, tmp_path)
        again = fresh()
        load_lora(again, tmp_path)
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())

else:

    def test_experts_that_are_layers_of_their_own_are_adapted_as_such():
        with pytest.raises(ValueError, match="no experts that are parameters"):
            config = LoraConfig(r=2, linear_lora_dropout=0.0, lora_experts=True)
            apply_lora(tiny_model(BY_TYPE["mixtral"]), config)
        model = apply_lora(tiny_model(BY_TYPE["mixtral"]), LoraConfig(r=2))
        assert any("experts.0.w1.lora_A" in n for n, _ in model.named_parameters())
