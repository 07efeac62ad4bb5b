"""Parameter groups: what has a learning rate of its own."""

from dataclasses import replace

import pytest

from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from coati.parallel.optimizer import OptimizerSettings, build_optimizer
from coati.parallel.plugins import ParallelOptions
from tests.tiny import tiny_llama

OWN = OptimizerSettings(lr=1e-3, embedding_lr=1e-4)


def groups(model, settings=OWN) -> list[dict]:
    return build_optimizer(model, ParallelOptions(plugin="ddp"), settings).param_groups


@pytest.mark.parametrize("tie", [False, True])
def test_embedding_and_head_are_one_group(tie):
    model = tiny_llama(tie=tie)
    rest, own = groups(model)
    assert (rest["lr"], own["lr"]) == (1e-3, 1e-4)
    vocabulary = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert set(own["params"]) == vocabulary and len(own["params"]) == (1 if tie else 2)
    assert set(rest["params"]) | vocabulary == set(model.parameters())
    assert not set(rest["params"]) & vocabulary
    assert rest["weight_decay"] == own["weight_decay"] and rest["betas"] == own["betas"]
    (all_of_them,) = groups(model, OptimizerSettings(lr=1e-3))
    assert set(all_of_them["params"]) == set(model.parameters())


def test_the_schedule_is_that_of_the_others():
    optimizer = build_optimizer(tiny_llama(), ParallelOptions(plugin="ddp"), OWN)
    schedule = OWN.schedule.bind(optimizer, 10)
    for _ in range(7):
        schedule.step()
        rest, own = schedule.get_last_lr()
        assert own == pytest.approx(rest / 10)
    assert rest < 1e-3


def test_adapters_leave_embedding_and_head_frozen():
    targets = ["q_proj", "v_proj"]
    frozen = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=targets))
    with pytest.raises(ValueError, match="--embedding_lr: embedding and head are not trained"):
        groups(frozen)
    whole = LoraConfig(r=4, target_modules=targets, modules_to_save=["embed_tokens", "lm_head"])
    rest, own = groups(apply_lora(tiny_llama(), whole))
    assert sorted(tuple(p.shape) for p in own["params"]) == [(384, 64), (384, 64)]
    assert all(4 in parameter.shape for parameter in rest["params"])
    adapted = LoraConfig(r=4, target_modules=[*targets, "embed_tokens"])
    rest, own = groups(apply_lora(tiny_llama(), adapted))
    assert sorted(tuple(p.shape) for p in own["params"]) == [(4, 384), (64, 4)]


def test_a_reward_model_has_both_its_head_and_its_embedding_apart():
    model = RewardModel(config=tiny_llama().config)
    rest, head, own = groups(model, replace(OWN, head_lr=1e-2))
    assert (rest["lr"], head["lr"], own["lr"]) == (1e-3, 1e-2, 1e-4)
    assert set(head["params"]) == set(model.score.parameters())
    assert [id(one) for one in own["params"]] == [id(model.get_input_embeddings().weight)]
    parts = [id(one) for group in (rest, head, own) for one in group["params"]]
    assert sorted(parts) == sorted(id(one) for one in model.parameters())
