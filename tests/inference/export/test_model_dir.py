"""Merging and exporting: the same logits, the same answers in plain transformers, a card that tells
what is known."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from coati.cli.export import parse_export, parse_merging
from coati.inference.export.model_card import fingerprint, model_card
from coati.inference.export.model_dir import export, fresh_folder, merge
from coati.inference.model_loading import load
from coati.models.lora.adapter_files import save_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.models.reward_model import RewardModel
from tests.inference.test_model_loading import IDS, write
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer


def adapter(place):
    """A base and a trained adapter with a template of its own; the adapted model."""
    write(place / "base")
    model = apply_lora(AutoModelForCausalLM.from_pretrained(place / "base"), LoraConfig(r=2)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model, place / "adapter")
    return model


def verb(name):
    return importlib.import_module(f"coati.recipes.verbs.{name}")


def test_a_merged_directory_has_the_adapters_logits(tmp_path, capsys):
    model = adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    argv = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    verb("merge").main(parse_merging(argv))
    assert (
        "logits with the adapter beside and inside the weights differ by at most"
        in capsys.readouterr().out
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-5)
    assert not torch.allclose(plain(IDS).logits, base(IDS).logits, atol=0.1)
    assert plain.generation_config.eos_token_id == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tiny_tokenizer())


def test_only_adapters_are_merged_and_nothing_is_written_over(tmp_path):
    write(tmp_path / "base")
    with pytest.raises(ValueError, match="no LoRA adapter"):
        merge(tmp_path / "base", tmp_path / "merged")
    with pytest.raises(ValueError, match="base: exists already"):
        export(tmp_path / "base", tmp_path / "base", lambda *_: "")
    assert not (tmp_path / "merged").exists()


def test_an_export_answers_as_transformers_does_and_says_so(tmp_path, capsys):
    write(tmp_path / "run" / "modeling", system="Be brief.")
    (tmp_path / "run" / "arguments.json").write_text(
        json.dumps({"pretrain": "org/base", "dataset": [], "lr": 0.1})
    )
    argv = [
        "--model_path",
        str(tmp_path / "run"),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_new_tokens",
        "8",
    ]
    verb("export").main(parse_export(argv))
    assert "equal to plain transformers': 4 of 4" in capsys.readouterr().out
    assert "4 questions are those of" in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert load(tmp_path / "out", device="cpu").conversation.system_message == "Be brief."


def test_other_programs_get_the_arguments_of_the_template_too(tmp_path):
    """transformers knows the template alone."""
    write(tmp_path / "model")
    args = {"style": 'it\'s "brief"\n', "mood": None, "on": False, "list": [1, {"a": True}]}
    text = "  {{ style }}{{ mood }}{{ on }}{{ list }}" + CHATML
    config = {"chat_template": text, "template_args": args}
    (tmp_path / "model" / "conversation_template.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "out", lambda *_: "", max_new_tokens=2)
    asked = [{"role": "user", "content": "Hi"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = tokenizer.apply_chat_template(asked, tokenize=False)
    assert found == load(tmp_path / "out", device="cpu").conversation.render(asked)
    assert found.startswith("  it's \"brief\"\nNoneFalse[1, {'a': True}]<|im_start|>user")
    assert tokenizer.apply_chat_template(asked, tokenize=False, style="long").startswith("  long")


def test_an_export_that_transformers_answers_otherwise_is_not_left(tmp_path, monkeypatch):
    write(tmp_path / "model")
    told = AutoModelForCausalLM.from_pretrained

    def other(folder, **options):
        return (
            told(folder, **options)
            if "output_loading_info" in options
            else tiny_llama(seed=7, layers=1)
        )

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", other)
    with pytest.raises(ValueError, match="generates otherwise than this library"):
        export(tmp_path / "model", tmp_path / "out", lambda *_: "", max_new_tokens=4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]


def test_a_fault_of_transformers_own_cache_is_named_and_the_model_exported(
    tmp_path, monkeypatch, capfd
):
    """Sliding caches of transformers 4.51 lose a token: what is generated without a cache
    decides."""
    write(tmp_path / "model")
    whole = GenerationMixin.generate
    asked = []

    def losing(self, prompt, use_cache=True, **options):
        asked.append(use_cache)
        made = whole(self, prompt, use_cache=use_cache, **options)
        return torch.cat([made[:, :-1], made[:, -1:] ^ 1], 1) if use_cache else made

    monkeypatch.setattr(GenerationMixin, "generate", losing)
    found = export(tmp_path / "model", tmp_path / "out", lambda *_: "", max_new_tokens=4)
    assert found.same == found.asked == 4 and asked == [True, False] * 4
    said = capfd.readouterr().err
    assert said.count("with its own key-value cache than without one") == 1


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(OSError), fresh_folder(tmp_path / "new") as folder:
        (folder / "part").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"), [("drop", "the adapter lacks"), ("add", "no use for")]
)
def test_an_adapter_with_other_tensors_than_its_settings_say_is_refused(tmp_path, change, message):
    adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name.replace("layers.0", "layers.9")] = (
        tensors.pop(name) if change == "drop" else tensors[name].clone()
    )
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "adapter", device="cpu")


def test_a_reward_model_is_not_taken_for_a_language_model(tmp_path):
    model = RewardModel(backbone=tiny_llama(layers=1, tie=True).model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write(tmp_path)  # configuration and tokenizer
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no use for \d+ weights .*score.*: coati score "):
        load(tmp_path, device="cpu")


def test_the_card_tells_what_the_run_wrote(tmp_path):
    data = tmp_path / "data" / "part-00000"
    data.mkdir(parents=True)
    (data / "data.arrow").write_bytes(b"rows")
    run = tmp_path / "sft"
    (run / "modeling").mkdir(parents=True)
    arguments = {
        "pretrain": "/models/some-base",
        "dataset": [str(data)],
        "lr": 5e-05,
        "use_wandb": False,
    }
    (run / "arguments.json").write_text(json.dumps(arguments))
    rows = [{"step": 0, "eval/loss": 3.5}, {"step": 9, "eval/loss": 2.25, "lr": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = model_card(run, "It was tested.")
    assert (
        "# sft" in card
        and "`some-base`" in card
        and "--lr 5e-05" in card
        and "use_wandb" not in card
    )
    assert (
        f"| `{tmp_path.name}/data/part-00000`".split("/")[-1] in card and fingerprint(data) in card
    )
    assert "| eval/loss | 3.5 (step 0) | 2.25 (step 9) |" in card and "## Limits" in card
    assert str(tmp_path) not in card
    before = fingerprint(data)
    (data / "data.arrow").write_bytes(b"rowz")
    assert fingerprint(data) != before


def test_a_merged_directory_knows_the_run_that_its_adapter_is_of(tmp_path):
    adapter(tmp_path / "run")
    arguments = {"pretrain": "org/base", "dataset": [], "lr": 0.25}
    (tmp_path / "run" / "arguments.json").write_text(json.dumps(arguments))
    (tmp_path / "run" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "eval/loss": 2.0}) + "\n"
    )
    merge(tmp_path / "run" / "adapter", tmp_path / "merged")
    export(
        tmp_path / "merged",
        tmp_path / "out",
        lambda *_: model_card(tmp_path / "merged", "It was tested."),
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`org/base`" in card and "--lr 0.25" in card and "eval/loss" in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_card_of_a_run_on_prompts_names_them(tmp_path):
    (tmp_path / "arguments.json").write_text(
        json.dumps({"pretrain": "org/base", "prompt_dataset": ["out/sums.jsonl"]})
    )
    assert "| `out/sums.jsonl` |" in model_card(tmp_path, "It was tested.")


def test_what_is_not_known_is_not_made_up(tmp_path):
    card = model_card(tmp_path, "It was tested.")
    assert card.count("Not known") == 3 and "None: no metrics.jsonl" in card


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output_dir", "x"], "--model_path is required"),
        (["--model_path", "x"], "--output_dir is required"),
        (["--model_path", "x", "--output_dir", "y", "--gguf", "q2"], "--gguf"),
        (["--model_path", "x", "--output_dir", "y", "--dtype", "int3"], "--dtype"),
    ],
)
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_export(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_adapter_without_its_base_is_named(tmp_path):
    adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="base .* is not there; put it back"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_at_once_never_write_into_one_output(tmp_path):
    """The second is told of the first, which loses nothing."""
    with fresh_folder(tmp_path / "new") as folder:
        (folder / "weights").write_text("whole")
        with pytest.raises(ValueError, match=r"the output .*/new is in use by"):
            with fresh_folder(tmp_path / "new"):
                pytest.fail("both write")
    assert (tmp_path / "new" / "weights").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
