"""Loading models and tokenizers: what works, and what the message says when it does not."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from coati.models.attention_choice import choose_attention
from coati.models.loading import (
    disable_dropout,
    find_model,
    get_model_numel,
    has_weights,
    is_bare,
    load_causal_lm,
)
from coati.models.lora.adapter_files import save_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.tokenizer import load_tokenizer
from tests.models.families import tiny_opt
from tests.models_table.families import BY_TYPE, known, tiny_model
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 17, 300, 42, 9, 11]])


@pytest.fixture
def directory(tmp_path):
    """A whole Hugging Face directory: tiny Llama, fp32, tied, with its tokenizer."""
    path = tmp_path / "model"
    tiny_llama(layers=1, tie=True).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}, indent=2))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_directory_is_loaded_in_the_type_asked_for(directory, dtype, expected):
    assert {
        parameter.dtype for parameter in load_causal_lm(directory, dtype=dtype).parameters()
    } == {expected}


def test_auto_is_the_type_of_the_files(directory):
    tiny_llama(layers=1).to(torch.bfloat16).save_pretrained(directory)
    assert load_causal_lm(directory, dtype="auto").dtype == torch.bfloat16
    assert (
        load_causal_lm(str(directory), dtype="fp32", attn_implementation="eager").dtype
        == torch.float32
    )


def test_an_unknown_type_is_refused(directory):
    with pytest.raises(ValueError, match="fp32, bf16, fp16, auto, not 'int8'"):
        load_causal_lm(directory, dtype="int8")


def test_a_directory_with_an_adapter_alone_is_the_base_with_the_adapter(directory, tmp_path):
    adapted = apply_lora(load_causal_lm(directory), LoraConfig(r=2))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(adapted, tmp_path / "adapter")
    loaded = load_causal_lm(tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(adapted), atol=1e-5)
    assert type(loaded) is type(load_causal_lm(directory))
    file = tmp_path / "adapter" / "adapter_config.json"
    edit(file, base_model_name_or_path="../model")  # beside the adapter, wherever both were moved
    assert torch.allclose(logits(load_causal_lm(tmp_path / "adapter")), logits(adapted), atol=1e-5)
    edit(file, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(
        ValueError, match=r"adapter_config.json: the base model .*gone is not there"
    ):
        load_causal_lm(tmp_path / "adapter")


def test_an_adapter_on_top_of_an_adapter_has_both(directory, tmp_path):
    base = directory
    for name in ("first", "second"):
        adapted = apply_lora(load_causal_lm(base), LoraConfig(r=2), seed=len(name))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        save_lora(adapted, tmp_path / name)
        base = tmp_path / name
    assert torch.allclose(logits(load_causal_lm(tmp_path / "second")), logits(adapted), atol=1e-5)


@pytest.mark.parametrize("loader", [load_causal_lm, load_tokenizer])
def test_a_missing_directory_is_said_without_asking_a_hub(loader, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such directory"):
        loader(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.bin is a file"):
        loader(tmp_path / "model.bin")


def test_a_directory_of_something_else_is_said_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no config.json.*it holds notes.txt"):
        load_causal_lm(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer files.*it holds notes.txt"):
        load_tokenizer(tmp_path)


def test_the_directory_of_a_run_is_told_from_its_model(directory):
    run = directory.parent / "run"
    run.mkdir()
    (run / "modeling").symlink_to(directory)
    for loader, kind in ((load_causal_lm, "model"), (load_tokenizer, "tokenizer")):
        said = f"{run} is the directory of a run; its {kind} is in {run}/modeling"
        with pytest.raises(ValueError, match=said):
            loader(run)
    tiny_tokenizer().save_pretrained(run)
    assert len(load_tokenizer(run)) == len(tiny_tokenizer())


NO_SDPA = [name for name in ("gemma2", "gptj", "bloom", "gpt_oss") if known(BY_TYPE[name])]


@pytest.mark.parametrize("family", NO_SDPA)
def test_attention_that_sdpa_cannot_do_is_eager(family, tmp_path, capfd):
    """Gemma 2 caps its scores, which sdpa leaves out; the others have none."""
    tiny_model(BY_TYPE[family]).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, attn_implementation="sdpa")
    assert model.config._attn_implementation == "eager"
    assert "eager attention is used" in capfd.readouterr().err
    if family == "gemma2":
        ids = torch.arange(3, 15)[None]
        with torch.no_grad():
            capped = model.eval()(input_ids=ids).logits
            model.config._attn_implementation = "sdpa"
            assert not torch.allclose(model(input_ids=ids).logits, capped, atol=1e-6)


def test_a_head_that_is_loaded_apart_is_not_reported(tmp_path, capfd):
    from coati.models import RewardModel

    save_file(
        RewardModel(backbone=tiny_llama()).state_dict(),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    RewardModel(backbone=tiny_llama()).config.save_pretrained(tmp_path)
    RewardModel.from_pretrained(tmp_path)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_a_family_with_sdpa_keeps_it(directory):
    model = load_causal_lm(directory, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_missing_weights_are_said(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights \(model.safetensors"):
        load_causal_lm(directory)


def test_a_truncated_file_of_weights_is_named(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors: not readable as weights, truncated"):
        load_causal_lm(directory)


def test_weights_that_the_files_lack_are_never_random(directory):
    edit(directory / "config.json", num_hidden_layers=2)
    with pytest.raises(
        ValueError, match=r"9 weights of LlamaForCausalLM are not in the files \(model.layers.1"
    ):
        load_causal_lm(directory)


def test_broken_configuration_is_said(directory):
    (directory / "config.json").write_text("{,}")
    with pytest.raises(ValueError, match="model.*not a valid JSON|model.*not valid JSON"):
        load_causal_lm(directory)


@pytest.mark.parametrize("loader", [load_causal_lm, load_tokenizer])
def test_remote_code_is_not_run_and_its_flag_is_named(loader, directory):
    ran = directory / "ran"
    (directory / "custom.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    auto_map = {name: "custom.Config" for name in ("AutoConfig", "AutoModelForCausalLM")}
    edit(directory / "config.json", model_type="unheard_of", auto_map=auto_map)
    edit(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["custom.Config", None]},
        tokenizer_class="X",
    )
    with pytest.raises(ValueError, match="--trust_remote_code"):
        loader(directory)
    assert not ran.exists()


def test_flash_attention_or_what_replaces_it(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flash_attn" else find(name)
    )
    assert choose_attention(False, "bf16", on_gpu=True) == "sdpa"
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert choose_attention(True, "bf16", on_gpu=True) == "sdpa"
    assert capsys.readouterr().err.count("flash-attn is not installed") == 1
    assert choose_attention(True, "bf16", on_gpu=False) == "sdpa"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert choose_attention(True, "bf16", on_gpu=True) == "flash_attention_2"
    assert choose_attention(True, "fp32", on_gpu=True) == "sdpa"
    assert "it has no fp32" in capsys.readouterr().err


def test_dropout_is_off_everywhere():
    for model in (tiny_opt(), tiny_llama(attention_dropout=0.5)):
        for (
            module
        ) in model.modules():  # OPT keeps probabilities as plain attributes, Llama in its attention
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.5
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        disable_dropout(model)
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_parameters_are_counted_once():
    tied, loose = tiny_llama(tie=True), tiny_llama(tie=False)
    assert get_model_numel(loose) - get_model_numel(tied) == 384 * 64


def test_a_model_is_found_where_training_writes_it(tmp_path):
    """Itself, its modeling/, a part's modeling/; bare weights too; a hub name is left as it is."""
    assert find_model("some/model") == "some/model"
    tiny_llama(layers=1).save_pretrained(tmp_path / "run" / "critic" / "modeling")
    with pytest.raises(ValueError, match=r"run holds no model .*it holds critic"):
        find_model(tmp_path / "run")
    place = tmp_path / "run" / "critic" / "modeling"
    assert find_model(tmp_path / "run", "actor", "critic") == find_model(place) == str(place)
    assert not is_bare(place) and has_weights(place)
    (place / "config.json").unlink()
    assert is_bare(place) and find_model(place.parent) == str(place)
    (tmp_path / "run" / "epoch-0_step-20").mkdir()
    with pytest.raises(ValueError, match="but checkpoints.*epoch-0_step-20"):
        find_model(tmp_path / "run")


@pytest.mark.parametrize(
    "saved_with, command",
    [
        ("9.1.0.dev0", "pip install -U 'transformers>=9.1.0'"),
        (None, "pip install -U transformers"),
        ("4.30.0", "code of its own (--trust_remote_code), or a misspelled model_type"),
    ],
)
def test_a_family_newer_than_transformers_is_named_with_the_command(tmp_path, saved_with, command):
    config = {"model_type": "llama99", "architectures": ["Llama99ForCausalLM"]}
    config |= {"transformers_version": saved_with} if saved_with else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="does not know the model family 'llama99'") as error:
        load_causal_lm(tmp_path)
    assert command in str(error.value) and "config.json" in str(error.value)
