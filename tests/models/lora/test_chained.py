"""Adapters trained on adapters: saved as one that plain peft reads, trained on to the bit."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoModelForCausalLM

from coati.models.loading import adapter_base, load_causal_lm, trained_from
from coati.models.lora.adapter_files import load_lora, read_lora, save_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from tests.tiny import tiny_llama

IDS = torch.arange(3, 40)[None]
PLAIN = {"linear_lora_dropout": 0.0}


def randomized(model, seed: int):
    """Trained, in a way: every adapter tensor is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or (parameter.requires_grad and "bias" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def trained_on(path, target, seed: int, **config):
    settings = LoraConfig(**PLAIN | config)
    model = randomized(apply_lora(load_causal_lm(path), settings, seed=seed), seed)
    save_lora(model, target)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


OTHER = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
CHAINS = {
    "same layers": ({"r": 4}, {"r": 4}),
    "other rank and scale": ({"r": 2, "lora_alpha": 7}, {"r": 5, "lora_alpha": 16}),
    "other layers": ({"r": 3, "target_modules": ["down_proj", "q_proj"]}, {"r": 4} | OTHER),
    "embeddings below": ({"r": 3} | OTHER, {"r": 2, "target_modules": ["v_proj"]}),
    "PiSSA on top": ({"r": 3}, {"r": 4, "lora_initialization_method": "PiSSA"}),
    "PiSSA below": ({"r": 3, "lora_initialization_method": "PiSSA"}, {"r": 4}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_plain_peft_gives_the_logits_of_both_adapters(base, tmp_path, name):
    below, top = CHAINS[name]
    trained_on(base, tmp_path / "c1", 1, **below)
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, **top)
    wanted = logits(model)
    alone = logits(load_causal_lm(tmp_path / "c1"))
    assert (wanted - alone).abs().max() > 0.01  # both count
    plain = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "c2"))
    torch.testing.assert_close(plain, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "c2")), wanted, rtol=0, atol=2e-5)
    # One rank and one scale for all layers: other programs read no patterns.
    config = json.loads((tmp_path / "c2" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert adapter_base(tmp_path / "c2") == str(base)
    assert trained_from(tmp_path / "c2") == str(tmp_path / "c1")


@pytest.mark.parametrize("name", CHAINS)
def test_training_goes_on_from_the_joined_file_to_the_bit(base, tmp_path, name):
    below, top = CHAINS[name]
    trained_on(base, tmp_path / "c1", 1, **below)
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, **top)
    fresh = apply_lora(load_causal_lm(tmp_path / "c1"), LoraConfig(**PLAIN | top), seed=9).eval()
    load_lora(fresh, tmp_path / "c2")
    mine = fresh.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, mine[key]), key
    assert torch.equal(logits(fresh), logits(model))


def test_three_stages_are_one_adapter_too(base, tmp_path):
    trained_on(base, tmp_path / "c1", 1, r=2)
    trained_on(tmp_path / "c1", tmp_path / "c2", 2, r=3)
    model = trained_on(tmp_path / "c2", tmp_path / "c3", 3, r=4)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "c3")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "c3" / "adapter_config.json").read_text())
    assert config["r"] == 9 and adapter_base(tmp_path / "c3") == str(base)


def test_directories_of_earlier_releases_with_the_adapter_as_base_are_still_read(base, tmp_path):
    trained_on(base, tmp_path / "c1", 1, r=2)
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, r=3)
    # As it was written before: the last adapter alone, whose base is the directory of the first.
    alone = read_lora(model, tmp_path / "c2")
    model.coati_earlier = None
    save_lora(model, tmp_path / "old")
    assert adapter_base(tmp_path / "old") == str(tmp_path / "c1")
    assert not (tmp_path / "old" / "lora_chain.json").exists()
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "old")), logits(model))
    again = read_lora(model, tmp_path / "old")
    assert all(torch.equal(again[key], tensor) for key, tensor in alone.items())
    # And a third stage on top of such a directory joins all three.
    top = trained_on(tmp_path / "old", tmp_path / "c3", 3, r=2)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "c3")
    torch.testing.assert_close(logits(plain), logits(top), rtol=0, atol=2e-5)


def test_an_adapter_of_plain_peft_below_counts_with_its_patterns(base, tmp_path):
    config = PeftLoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
        task_type="CAUSAL_LM",
    )
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomized(plain, 5).save_pretrained(tmp_path / "c1")
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, r=3)
    read = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "c2")
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=2e-5)


def dora(base, folder):
    config = PeftLoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomized(model, 5).save_pretrained(folder)


def biases(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = PeftLoraConfig(r=4, bias="all", target_modules=["q_proj"], task_type="CAUSAL_LM")
    randomized(get_peft_model(model, config), 5).save_pretrained(folder)


def whole_head(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = PeftLoraConfig(
        r=4, modules_to_save=["lm_head"], target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    randomized(get_peft_model(model, config), 5).save_pretrained(folder)


@pytest.mark.parametrize("make, said", [(dora, "use_dora"), (biases, "biases")])
def test_what_cannot_be_joined_is_saved_as_before_and_said(base, tmp_path, caplog, make, said):
    make(base, tmp_path / "c1")
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, r=3)
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "c2")), logits(model))
    readme = (tmp_path / "c2" / "README.md").read_text()
    assert said in readme and "coati merge" in readme and "Plain peft would read" in readme
    assert adapter_base(tmp_path / "c2") == str(tmp_path / "c1")


def test_a_head_that_an_adapter_below_saved_whole_is_carried_on(base, tmp_path):
    whole_head(base, tmp_path / "c1")
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, r=3)
    read = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "c2")
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=2e-5)
    over = trained_on(tmp_path / "c1", tmp_path / "c3", 2, r=3, target_modules=["lm_head"])
    assert "saved whole" in (tmp_path / "c3" / "README.md").read_text()
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "c3")), logits(over))


def test_a_reward_model_trained_on_a_reward_adapter_keeps_both(base, tmp_path):
    def stage(source, target, seed, new_head=False):
        torch.manual_seed(seed)
        model = RewardModel.from_pretrained(source, new_head=new_head)
        model = randomized(apply_lora(model, LoraConfig(r=3, **PLAIN), seed=seed), seed)
        with torch.no_grad():
            model.get_base_model().score.weight.normal_()
        save_lora(model, target)
        return model

    stage(base, tmp_path / "r1", 1, new_head=True)
    model = stage(tmp_path / "r1", tmp_path / "r2", 2)
    with torch.no_grad():
        wanted = model(IDS)
        read = RewardModel.from_pretrained(tmp_path / "r2").eval()(IDS)
    torch.testing.assert_close(read, wanted, rtol=0, atol=2e-5)
    assert adapter_base(tmp_path / "r2") == str(base)


def test_the_base_below_alone_gives_other_logits(base, tmp_path):
    """What went wrong before: peft takes the last adapter alone."""
    trained_on(base, tmp_path / "c1", 1, r=2)
    model = trained_on(tmp_path / "c1", tmp_path / "c2", 2, r=3)
    model.coati_earlier = None
    save_lora(model, tmp_path / "old")
    old = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "old")
    assert (logits(old) - logits(model)).abs().max() > 0.01
