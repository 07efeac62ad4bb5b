"""One loader for what training writes."""

import copy
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from coati.cli.compare import parse_compare
from coati.cli.inference import parse_inference
from coati.cli.serve import parse_server
from coati.dataset.chat.conversation import Conversation
from coati.inference.model_loading import conversation_of, load
from coati.models.loading import find_model
from coati.models.lora.adapter_files import save_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.recipes.verbs import chat, serve
from coati.utils.logging import forget_warnings
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 17, 300, 42]])


def write(directory, system=None):
    model = tiny_llama(layers=1)
    model.save_pretrained(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    if system:
        Conversation.from_config(tokenizer, {"system_message": system}).save(
            directory / "conversation_template.json"
        )
    return model


@pytest.mark.parametrize("place", ["", "modeling", "actor/modeling"])
def test_a_model_is_found_in_its_directory_a_checkpoint_and_an_output_directory(tmp_path, place):
    write(tmp_path / "epoch-1_step-20" / place)
    assert (
        Path(find_model(tmp_path / "epoch-1_step-20", "actor")).resolve()
        == (tmp_path / "epoch-1_step-20" / place).resolve()
    )


def test_an_unfinished_output_directory_names_its_checkpoints(tmp_path):
    write(tmp_path / "epoch-0_step-20" / "modeling")
    with pytest.raises(ValueError, match="no final model here, but checkpoints.*epoch-0_step-20"):
        load(tmp_path)


def test_the_template_beside_the_weights_is_used(tmp_path):
    expected = write(tmp_path / "modeling", system="Be brief.")
    model, tokenizer, conversation = load(tmp_path, device="cpu")
    assert torch.equal(model(IDS).logits, expected.eval()(IDS).logits)
    assert not model.training and model.dtype == torch.float32 and tokenizer.is_fast
    assert conversation.system_message == "Be brief." and conversation.stop_ids == [[2]]


def test_without_one_the_tokenizers_own_template_serves(tmp_path):
    write(tmp_path)
    conversation = load(tmp_path, device="cpu").conversation
    assert conversation.chat_template == CHATML and conversation.end_of_assistant == "<|im_end|>"


def test_a_given_template_goes_first_and_is_left_as_it_is(tmp_path):
    write(tmp_path / "model", system="Be brief.")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"system_message": "Be long."}))
    assert conversation_of(tmp_path / "model", tiny_tokenizer(), file).system_message == "Be long."
    assert json.loads(file.read_text()) == {"system_message": "Be long."}
    with pytest.raises(ValueError, match="gone.json: no such file"):
        conversation_of(tmp_path / "model", tiny_tokenizer(), tmp_path / "gone.json")


WORDY = CHATML.replace("{% for", "{{ style }}{{ mood }}{% for", 1)


def test_arguments_of_the_template_go_before_those_that_the_model_keeps(tmp_path, capsys):
    write(tmp_path)
    kept = {"chat_template": WORDY, "template_args": {"style": "brief", "mood": "kind"}}
    (tmp_path / "conversation_template.json").write_text(json.dumps(kept))

    def args(given=None, template=None):
        forget_warnings()
        capsys.readouterr()
        found = conversation_of(tmp_path, deepcopy(tiny_tokenizer()), template, given).template_args
        return found, "".join(re.findall("--template_args.*", capsys.readouterr().err))

    assert args() == (kept["template_args"], "")
    found, said = args({"style": "long"})
    assert found == {"style": "long", "mood": "kind"}
    assert said.count('--template_args: {"style": "long"} instead of {"style": "brief"}') == 1
    assert args({"style": "brief"}) == (kept["template_args"], "")
    assert args({"mood": "odd"}, {"chat_template": WORDY})[0] == {"mood": "odd"}
    with pytest.raises(ValueError, match="^--template_args the chat template reads no 'tone'; it "):
        args({"tone": 1})
    assert json.loads((tmp_path / "conversation_template.json").read_text()) == kept


def test_chat_serve_and_compare_take_arguments_of_the_template(tmp_path, capsys):
    write(tmp_path)
    kept = {"chat_template": WORDY, "template_args": {"style": "brief"}}
    (tmp_path / "conversation_template.json").write_text(json.dumps(kept))
    words = ["--model_path", str(tmp_path), "--template_args", '{"style": "long"}']
    session = chat.open_session(parse_inference(words))
    assert session.conversation.render([]) == "long"
    engine = serve.open_engine(parse_server(words))
    engine.close()
    assert engine.loaded.conversation.render([]) == "long"
    assert (
        parse_compare([*words, "--input", "x", "--rm_path", "y"]).template_args
        == '{"style": "long"}'
    )
    wrong = [*words[:3], '{"tone": 1}']
    with pytest.raises(ValueError, match="^--template_args the chat template reads no 'tone'"):
        chat.open_session(parse_inference(wrong))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_is_loaded_with_its_base(tmp_path, with_tokenizer, capsys):
    from transformers import AutoModelForCausalLM

    write(tmp_path / "base")
    adapted = apply_lora(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2)
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(adapted, tmp_path / "adapter")
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", device="cpu")
    assert torch.allclose(loaded.model(IDS).logits, adapted(IDS).logits, atol=1e-5)
    assert len(loaded.tokenizer) == len(tiny_tokenizer())
    assert ("holds no tokenizer" in capsys.readouterr().err) is not with_tokenizer


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path)
    other = tmp_path / "other"
    larger = copy.deepcopy(tiny_tokenizer())
    larger.add_tokens([f"<extra_{i}>" for i in range(120)])
    larger.save_pretrained(other)
    with pytest.raises(ValueError, match="model's vocabulary 384"):
        load(tmp_path, tokenizer_path=other, device="cpu")
