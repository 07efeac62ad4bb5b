"""Reward models and critics: what a score depends on, where heads come from, what is on disk."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from coati.models import (
    Critic,
    LoraConfig,
    RewardModel,
    apply_lora,
    load_scalar_model,
    merge_lora,
    save_lora,
)
from coati.models.lora.adapter_files import load_lora
from coati.models.padding_free import PaddingFree
from coati.models.scalar_loading import load_scalar_weights
from tests.models.families import tiny_bloom, tiny_gpt2, tiny_opt, tiny_qwen2
from tests.tiny import tiny_llama

FAMILIES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "opt": tiny_opt,
    "gpt2": tiny_gpt2,
    "bloom": tiny_bloom,
}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def rows(lengths=(5, 9, 1), side="right", extra=0, seed=0) -> dict[str, torch.Tensor]:
    """The same rows, padded on a side with 2, which they also hold themselves."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    ids, mask = (
        torch.full((len(lengths), width), 2),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.randint(2, 60, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def reward_model(seed=0) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(backbone=tiny_llama()).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_depend_on_the_row_alone(family):
    """Neither on the padding's side and amount, nor on batch mates; positions of GPT-2 and OPT are
    absolute."""
    torch.manual_seed(0)
    model = RewardModel(backbone=FAMILIES[family]()).eval()
    batch = rows()
    expected = torch.cat(
        [
            model(batch["input_ids"][i : i + 1, :n], torch.ones(1, n, dtype=torch.long))
            for i, n in enumerate((5, 9, 1))
        ]
    )
    for variant in ({}, {"side": "left"}, {"extra": 4}, {"side": "left", "extra": 3}):
        assert_close(model(**rows(**variant)), expected, **EXACT)
    assert expected.dtype == torch.float32 and len(set(expected.tolist())) == 3


@torch.no_grad()
def test_values_stand_at_their_tokens():
    torch.manual_seed(0)
    model = Critic(backbone=tiny_llama()).eval()
    model.score.weight.normal_()
    right, left = rows(), rows(side="left", extra=2)
    expected = model(**right)[right["attention_mask"].bool()]
    assert_close(model(**left)[left["attention_mask"].bool()], expected, **EXACT)
    assert expected.shape == (15,)


@torch.no_grad()
@pytest.mark.parametrize("kind", [RewardModel, Critic])
def test_rows_laid_end_to_end_give_the_same_numbers(kind):
    torch.manual_seed(0)
    model = kind(backbone=tiny_llama()).eval()
    model.score.weight.normal_()
    batch = rows()
    packed = model(**PaddingFree.of(model).unpad(batch).inputs)
    expected = model(**batch)
    assert_close(
        packed,
        expected if kind is RewardModel else expected[batch["attention_mask"].bool()][None],
        **EXACT,
    )


def test_heads_start_as_they_should():
    torch.manual_seed(0)
    model = RewardModel(backbone=tiny_llama(hidden=1024, layers=1))
    assert float(model.score.weight.std()) == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert float(model.score.bias) == 0
    critic = Critic(backbone=tiny_llama())
    assert not critic.score.weight.any() and not critic.score.bias.any()


def test_the_head_stays_in_fp32_arithmetic():
    model = reward_model().bfloat16()
    with torch.no_grad():
        scores = model(**rows())
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def saved(model, folder):
    """What the trainers write: ordinary weights and configuration."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    model.config.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_saved_and_loaded_with_the_head(tmp_path):
    model = reward_model()
    model.score.bias.fill_(0.25)
    again = load_scalar_model(RewardModel, saved(model, tmp_path / "rm")).eval()
    assert_close(again(**rows()), model(**rows()), **EXACT)
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


@torch.no_grad()
def test_a_padding_token_is_learned_as_before_the_model_was_saved():
    """Its row of the embedding has a gradient, though the configuration names it; but for one that
    stands for nothing."""
    for zero in (False, True):
        backbone = tiny_llama()  # pad 2, which is eos
        assert backbone.get_input_embeddings().padding_idx == 2
        backbone.get_input_embeddings().weight.data[2] = 0.0 if zero else 0.1
        model = RewardModel(backbone=backbone)
        ids = torch.tensor([[5, 2, 7]])
        with torch.enable_grad():
            model(ids, torch.ones_like(ids)).sum().backward()
        assert bool(model.get_input_embeddings().weight.grad[2].any()) != zero


def test_a_model_made_on_the_meta_device_says_nothing_of_its_padding_yet():
    with torch.device("meta"):
        model = RewardModel(config=tiny_llama().config)
    assert model.get_input_embeddings().padding_idx == 2


def test_plain_transformers_loads_the_directory(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = reward_model()
    model.config.pad_token_id = 0
    plain = AutoModelForSequenceClassification.from_pretrained(saved(model, tmp_path / "rm")).eval()
    batch = rows()
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    assert type(plain).__name__ == "LlamaForSequenceClassification"
    assert_close(plain(**batch).logits[:, 0], model(**batch), **EXACT)


@torch.no_grad()
def test_a_critic_takes_the_head_of_a_reward_model(tmp_path):
    model = reward_model()
    critic = load_scalar_model(Critic, saved(model, tmp_path / "rm")).eval()
    batch = rows()
    last = batch["attention_mask"].sum(1) - 1
    assert_close(critic(**batch)[torch.arange(3), last], model(**batch), **EXACT)
    with pytest.raises(ValueError, match="is a critic"):
        load_scalar_model(RewardModel, saved(critic, tmp_path / "critic"))


def test_a_language_model_is_refused_or_taken_as_a_base(tmp_path, capfd):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no scalar head.*coati rm"):
        load_scalar_model(RewardModel, tmp_path)
    model = load_scalar_model(RewardModel, tmp_path, new_head=True)
    assert "taken as the base, and a new head is drawn" in capfd.readouterr().err
    assert torch.equal(model.backbone.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)


@pytest.mark.parametrize(
    "head, said", [(torch.zeros(2, 64), "2 numbers"), (torch.zeros(1, 32), r"\(1, 32\).*width 64")]
)
def test_heads_of_another_shape_are_refused(tmp_path, head, said):
    folder = saved(reward_model(), tmp_path / "rm")
    state = load_file(folder / "model.safetensors") | {"score.weight": head}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        load_scalar_model(RewardModel, folder)


@torch.no_grad()
def test_a_directory_of_colossalchat_is_read(tmp_path):
    """Its backbone is `model`, its head `value_head`, its files are .bin."""
    model = reward_model()
    model.config.save_pretrained(tmp_path)
    state = {
        name.replace("score.", "value_head."): tensor for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_close(
        load_scalar_model(RewardModel, tmp_path).eval()(**rows()), model(**rows()), **EXACT
    )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_without_a_configuration_take_another_directorys(tmp_path, family):
    """As ColossalChat's checkpoints: `model.` and `value_head.`, however the family calls its
    backbone."""
    torch.manual_seed(0)
    model = RewardModel(backbone=FAMILIES[family]()).eval()
    other = FAMILIES[family]()
    other.config.save_pretrained(tmp_path / "base")
    state = {f"model.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    state |= {f"value_head.{part}": tensor for part, tensor in model.score.state_dict().items()}
    names, files = (
        sorted(state),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    )
    places = {name: files[index % 2] for index, name in enumerate(names)}
    (tmp_path / "rm").mkdir()
    for file in files:
        torch.save(
            {name: state[name] for name in names if places[name] == file}, tmp_path / "rm" / file
        )
    (tmp_path / "rm" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": places})
    )
    loaded = load_scalar_weights(RewardModel, tmp_path / "base", tmp_path / "rm").eval()
    assert_close(loaded(**rows()), model(**rows()), **EXACT)
    assert (
        load_scalar_weights(RewardModel, tmp_path / "base", tmp_path / "rm", dtype="bf16").dtype
        == torch.bfloat16
    )


def test_weights_that_are_not_the_architectures(tmp_path):
    tiny_llama(layers=3).config.save_pretrained(tmp_path / "deeper")
    folder = saved(reward_model(), tmp_path / "rm")
    with pytest.raises(ValueError, match="rm: not the weights of .*deeper .*Missing key"):
        load_scalar_weights(RewardModel, tmp_path / "deeper", folder)
    tiny_llama().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="lm: no scalar head"):
        load_scalar_weights(RewardModel, tmp_path / "lm", tmp_path / "lm")


def trained_adapters(base, seed=1):
    adapted = apply_lora(base, LoraConfig(r=4, linear_lora_dropout=0.0))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return adapted.eval()


def test_lora_trains_adapters_and_the_whole_head():
    adapted = apply_lora(reward_model(), LoraConfig(r=4))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {
        "base_model.model.score.weight",
        "base_model.model.score.bias",
    }
    assert not any("score" in name for name in trained if ".lora_" in name)


@torch.no_grad()
def test_an_adapter_on_disk_holds_the_head(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = trained_adapters(load_scalar_model(RewardModel, tmp_path / "base", new_head=True))
    save_lora(adapted, tmp_path / "adapter")
    expected = adapted(**rows())
    assert_close(
        load_scalar_model(RewardModel, tmp_path / "adapter").eval()(**rows()), expected, **EXACT
    )
    fresh = apply_lora(
        load_scalar_model(RewardModel, tmp_path / "base", new_head=True), adapted.coati_lora
    )
    load_lora(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.eval()(**rows()), expected)
    merged = merge_lora(adapted)
    assert isinstance(merged, RewardModel)
    assert_close(merged(**rows()), expected, **EXACT)


def test_one_source_and_one_only():
    with pytest.raises(ValueError, match="one of pretrained, config and backbone"):
        RewardModel()


def test_the_references_keyword_form(tmp_path):
    """A directory's backbone, or a configuration's, below a new head."""
    tiny_llama().save_pretrained(tmp_path)
    model = RewardModel(pretrained=tmp_path, dtype="bf16")
    assert torch.equal(model.backbone.norm.weight, tiny_llama().model.norm.weight.bfloat16())
    assert model.score.weight.any() and model.dtype == torch.bfloat16
    assert not Critic(config=tiny_llama().config).score.weight.any()


# The vocabulary head beside the scalar one


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [RewardModel, Critic])
def test_the_vocabulary_head_may_be_kept(tmp_path, family, kind):
    """Its logits are the language model's, scores are as without it, and both are saved."""
    language_model = FAMILIES[family]().eval()
    torch.manual_seed(0)
    model = kind(backbone=language_model, keep_lm_head=True).eval()
    model.score.weight.normal_()
    batch = rows()
    head = model.get_output_embeddings()
    assert head is language_model.get_output_embeddings()
    hidden, _ = model.states(**batch)
    assert_close(head(hidden), language_model(**batch).logits, **EXACT)
    plain = kind(backbone=language_model.base_model).eval()
    plain.score.load_state_dict(model.score.state_dict())
    assert plain.get_output_embeddings() is None
    assert_close(model(**batch), plain(**batch), **EXACT)
    names = {name for name, _ in model.named_parameters()} - {"score.weight", "score.bias"}
    assert names == {name for name, _ in language_model.named_parameters()}
    folder = tmp_path / "saved"
    folder.mkdir()
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    again = kind.from_pretrained(folder, keep_lm_head=True).eval()
    assert_close(again(**batch), model(**batch), **EXACT)
    assert torch.equal(again.get_output_embeddings().weight, head.weight)
    without = kind.from_pretrained(folder).eval()
    assert without.get_output_embeddings() is None
    assert_close(without(**batch), model(**batch), **EXACT)


def test_a_kept_head_gives_log_probs_and_scores_in_one_forward():
    """What a model with value and vocabulary heads trains on: one forward of the backbone."""
    from coati.models.head import Head, logprobs_from_logits

    language_model = tiny_llama(tie=True)
    model = Critic(backbone=language_model, keep_lm_head=True)
    batch = rows()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = logprobs_from_logits(language_model(**batch).logits, labels)
    head = Head.install(model)
    head.set(labels)
    hidden, _ = model.states(**batch)
    logps = model.get_output_embeddings()(hidden)
    assert_close(logps, expected)
    (logps.sum() + model.score(hidden).sum()).backward()
    assert model.backbone.embed_tokens.weight.grad.any()  # tied: it is the head's weight
    assert model.get_output_embeddings().weight is model.backbone.embed_tokens.weight


def test_a_kept_head_needs_one_to_keep(tmp_path):
    with pytest.raises(ValueError, match="keep_lm_head: LlamaModel has no vocabulary head"):
        RewardModel(backbone=tiny_llama().model, keep_lm_head=True)
    saved(reward_model(), tmp_path / "rm")
    with pytest.raises(ValueError, match=r"1 weights of LlamaForCausalLM .*\(lm_head.weight\)"):
        RewardModel.from_pretrained(tmp_path / "rm", keep_lm_head=True)


@torch.no_grad()
def test_an_adapter_leaves_a_kept_head_alone(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = RewardModel.from_pretrained(tmp_path / "base", new_head=True, keep_lm_head=True)
    adapted = trained_adapters(base)
    assert not any("lm_head" in name for name, p in adapted.named_parameters() if p.requires_grad)
    save_lora(adapted, tmp_path / "adapter")
    again = RewardModel.from_pretrained(tmp_path / "adapter", keep_lm_head=True).eval()
    assert_close(again(**rows()), adapted(**rows()), **EXACT)
    assert torch.equal(again.get_output_embeddings().weight, base.get_output_embeddings().weight)
