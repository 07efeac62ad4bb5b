"""Multimodal checkpoints: their language model is trained, the rest is kept bit for bit."""

import json

import pytest
import torch
from safetensors import safe_open

from coati.models.base import without_head
from coati.models.composite import is_composite
from coati.models.loading import load_backbone, load_causal_lm
from coati.parallel.weights import ModelAssets, save_model
from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
LLAMA_VISION = VISION | {
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "gemma3": (TEXT, VISION),
    "mistral3": (TEXT, VISION),
    "llama4": (TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 64}, LLAMA_VISION),
    "llava": (TEXT, VISION),
    "gemma4": (TEXT, VISION),
    "qwen3_5": (TEXT | HYBRID, QWEN_VISION),
    "qwen3_5_moe": (
        TEXT
        | HYBRID
        | {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts_per_tok": 2,
        },
        QWEN_VISION,
    ),
}


def known_families() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # transformers 4.51 cannot run Llama 4 on a CPU: its experts stay in bf16 whatever is asked.
    broken = {"llama4"} if transformers_major() < 5 else set()
    return [name for name in FAMILIES if name in CONFIG_MAPPING_NAMES and name not in broken]


def write(name: str, folder):
    """A random multimodal model in bf16, saved by transformers."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text, vision = FAMILIES[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](text_config=dict(text), vision_config=dict(vision))
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Kept"}')
    return folder


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            found |= {name: held.get_tensor(name) for name in held.keys()}
    return found


@pytest.mark.parametrize("name", known_families())
def test_the_language_model_alone_gives_the_whole_ones_logits(name, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = write(name, tmp_path / "whole")
    model = load_causal_lm(folder, dtype="fp32")
    whole = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.isfinite(expected).all()
    assert not is_composite(model.config)
    assert not any("vis" in parameter for parameter, _ in model.named_parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        states = load_backbone(folder, dtype="fp32")(input_ids=ids)[0]
        assert torch.equal(states, without_head(model)(input_ids=ids)[0])


def train_and_save(source, target, plugin, lora) -> None:
    """In a worker: one step on text, then the whole model under ``target``."""
    from coati.models.lora.lora import LoraConfig, apply_lora
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.objective import Objective
    from coati.parallel.options import ParallelOptions

    class CrossEntropy(Objective):
        def loss(self, logps, batch):
            return -logps.sum(), {}

    launch(seed=0, timeout_s=60)
    model = load_causal_lm(source, dtype="bf16")
    assets = ModelAssets.of(model)
    if lora:
        model = apply_lora(model, LoraConfig(r=4))
    options = ParallelOptions(plugin=plugin, precision="bf16", lora=lora)
    engine = boost(model, options, lr=1e-2, total_steps=4, warmup_steps=0)
    ids = torch.arange(3, 19)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    engine.train_step([batch], CrossEntropy())
    save_model(engine, target, assets, merge_lora=lora)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", known_families())
def test_it_is_saved_whole_with_the_other_weights_as_they_were(name, lora, tmp_path):
    from transformers import AutoModelForImageTextToText

    source = write(name, tmp_path / "source")
    target = tmp_path / "target"
    run(1, "tests.models.test_composite:train_and_save", source, target, "zero2", lora)
    before = tensors_of(source)
    after = tensors_of(target)
    assert set(after) == set(before)
    changed = {each for each in before if not torch.equal(before[each], after[each])}
    vision = {each for each in before if "vis" in each or "multi_modal" in each}
    assert vision and changed and not changed & vision
    assert {each: t.dtype for each, t in after.items()} == {
        each: t.dtype for each, t in before.items()
    }
    assert json.loads((target / "preprocessor_config.json").read_text()) == {
        "image_processor_type": "Kept"
    }
    model, report = AutoModelForImageTextToText.from_pretrained(
        target, output_loading_info=True, torch_dtype="auto"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = load_causal_lm(target)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def save_without_source(source, target) -> None:
    """In a worker: the source vanishes between loading and saving."""
    import shutil

    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.options import ParallelOptions

    launch(seed=0, timeout_s=60)
    model = load_causal_lm(source, dtype="fp32")
    assets = ModelAssets.of(model)
    engine = boost(model, ParallelOptions(plugin="ddp"), lr=1e-2, total_steps=4)
    shutil.rmtree(source)
    save_model(engine, target, assets)


def test_without_its_source_the_language_model_is_saved_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    source = write("llava", tmp_path / "source")
    expected = load_causal_lm(source, dtype="fp32")
    run(1, "tests.models.test_composite:save_without_source", source, tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert type(model) is type(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_text_part_that_transformers_has_no_model_for_is_named(tmp_path):
    source = write("llava", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["UnknownForConditionalGeneration"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no model class 'UnknownForConditionalGeneration'"):
        load_causal_lm(source)
