"""Tokens that a run adds: their ids, rows, and adapters that plain peft reads."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from coati.dataset.chat.conversation import setup_conversation_template
from coati.models.added_tokens import add_tokens, grow_embeddings, vocabulary_modules
from coati.models.loading import load_causal_lm
from coati.models.lora.adapter_files import load_lora, save_lora
from coati.models.lora.lora import LoraConfig, apply_lora, merge_lora
from tests.tiny import tiny_llama, tiny_tokenizer

NEW = ("<think>", "</think>")


def pair(spare: int = 0, tie: bool = False):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    return tiny_llama(vocab_size=len(tokenizer) + spare, tie=tie), tokenizer


@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize("tie", [False, True])
def test_new_rows_are_the_mean_of_the_old_ones_and_old_logits_stay(spare, tie):
    model, tokenizer = pair(spare, tie)
    ids = torch.arange(3, 40)[None]
    known = len(tokenizer)
    before = model(ids).logits[..., :known].detach()
    mean = model.get_input_embeddings().weight[:known].mean(0)
    head = model.get_output_embeddings().weight[:known].mean(0)
    new = add_tokens(tokenizer, ["<think>", "</think>", "<think>", "<|im_end|>"])
    assert new == NEW  # not twice, and not what was there
    grow_embeddings(model, tokenizer, new)
    rows = model.get_input_embeddings().weight
    assert len(rows) == max(known + 2, known + spare) == model.config.vocab_size
    for row in tokenizer.convert_tokens_to_ids(list(NEW)):
        torch.testing.assert_close(rows[row], mean)
        torch.testing.assert_close(model.get_output_embeddings().weight[row], head)
    torch.testing.assert_close(model(ids).logits[..., :known], before)
    assert (model.get_output_embeddings().weight is rows) == tie


def test_a_conversation_holds_the_new_tokens_as_one_id_each():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    add_tokens(tokenizer, NEW)
    conversation = setup_conversation_template(tokenizer, {})
    dialogue = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>a</think>b"},
        {"role": "user", "content": "hello"},
    ]
    ids = conversation.encode_prompt(dialogue).input_ids
    first, last = tokenizer.convert_tokens_to_ids(list(NEW))
    assert ids.count(first) == ids.count(last) == 1
    # Part of the answer: decoding without control tokens keeps them.
    assert "<think>a</think>b" in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tie", [False, True])
def test_an_adapter_with_new_tokens_is_what_plain_peft_reads(tmp_path, tie):
    model, tokenizer = pair(tie=tie)
    model.save_pretrained(tmp_path / "base")
    new = add_tokens(tokenizer, NEW)

    def start():
        base = load_causal_lm(tmp_path / "base")
        grow_embeddings(base, tokenizer, new)
        config = LoraConfig(r=4, modules_to_save=vocabulary_modules(base), linear_lora_dropout=0.0)
        return apply_lora(base, config)

    adapted = start().eval()
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert any("embed_tokens" in name for name in trained)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    save_lora(adapted, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 40, *tokenizer.convert_tokens_to_ids(list(NEW)), 7]])
    wanted = adapted(ids).logits.detach()
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(ids).logits, wanted, rtol=0, atol=2e-5)
    ours = load_causal_lm(tmp_path / "adapter").eval()
    torch.testing.assert_close(ours(ids).logits, wanted, rtol=0, atol=2e-5)
    one = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert one == tie == ours.config.tie_word_embeddings
    again = start().eval()
    load_lora(again, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, wanted)
    merged = merge_lora(adapted).eval()
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=2e-5)
    # A second stage on top: the vocabulary is carried on, into one adapter of the same base.
    second = apply_lora(load_causal_lm(tmp_path / "adapter"), LoraConfig(r=2)).eval()
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    save_lora(second, tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    torch.testing.assert_close(plain(ids).logits, second(ids).logits, rtol=0, atol=2e-5)


def test_modules_to_save_are_trained_whole_and_a_wrong_name_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, modules_to_save=["norm", "lm_head"])
    adapted = apply_lora(load_causal_lm(tmp_path / "base"), config).eval()
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    whole = {name for name in trained if ".lora_" not in name}
    assert whole == {"base_model.model.model.norm.weight", "base_model.model.lm_head.weight"}
    with torch.no_grad():
        for name in whole:
            adapted.get_parameter(name).mul_(1.5)
    save_lora(adapted, tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="'normm' matches no module.*lm_head"):
        apply_lora(load_causal_lm(tmp_path / "base"), LoraConfig(r=2, modules_to_save=["normm"]))
