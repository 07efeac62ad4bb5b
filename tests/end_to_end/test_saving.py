"""What is trained is saved, whatever the base's settings are, and read by plain transformers and
peft; what cannot be saved is noticed before training, and never lost."""

from pathlib import Path

import pytest
import torch

from tests.distributed.spawn import run
from tests.end_to_end.saving import PUBLISHED, tensors
from tests.tiny import tiny_tokenizer

CPU = {"CUDA_VISIBLE_DEVICES": ""}


def worker(name: str, folder: Path, timeout: float = 300):
    return run(1, f"tests.end_to_end.saving:{name}", str(folder), env=CPU, timeout=timeout)[0]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return worker("families", tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_generation_settings_load_train_save_and_export(families, name):
    if name not in families:
        pytest.skip("the installed transformers does not have the family")
    found = families[name]
    assert found["code"] == 0, found["err"]
    _, given, _ = PUBLISHED[name]
    saved, exported = found["saved"], found["exported"]
    for key in ("temperature", "top_p", "top_k", "repetition_penalty", "max_length"):
        if key in given:
            assert saved[key] == exported[key] == given[key]
    if {"temperature", "top_p", "top_k"} & set(given):
        assert saved["do_sample"] is exported["do_sample"] is True
        said = "do_sample -> true" in found["err"]
        assert said == ("do_sample" not in given)
    ends = given.get("eos_token_id")
    if isinstance(ends, list):  # exactly, in this order
        assert saved["eos_token_id"] == ends
        assert exported["eos_token_id"] == ends
    else:  # what the tokenizer ends with is in it too
        for settings in (saved, exported):
            held = settings["eos_token_id"]
            assert 2 in (held if isinstance(held, list) else [held])


def test_settings_of_the_model_configuration_are_moved(families):
    said = families["LLaMA, early conversion"]["err"]
    assert "pad_token_id -1 -> none" in said and "do_sample -> true" in said
    assert families["LLaMA, early conversion"]["saved"]["temperature"] == 0.7
    assert "pad_token_id" not in families["LLaMA, early conversion"]["saved"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, worker("stages", folder)


def test_every_stage_ends_well_and_new_tokens_are_refused_where_nothing_learns_them(stages):
    _, ended = stages
    code, said = ended["no ppo"]
    assert code and "--add_tokens" in said and "coati sft" in said
    for name, (code, err) in ended.items():
        assert code == 0 or name == "no ppo", err


@pytest.mark.parametrize("name", ["grown", "grown_lora", "c2", "grown_dpo"])
def test_a_resumed_run_is_the_same_to_the_bit(stages, name):
    folder, _ = stages
    file = "model.safetensors" if name == "grown" else "adapter_model.safetensors"
    first = tensors(folder / f"{name}-modeling-first" / file)
    again = tensors(folder / name / "modeling" / file)
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())


@torch.no_grad()
def logits_of(model):
    return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("name", ["c2", "grown_lora", "grown_dpo"])
def test_plain_peft_gives_the_logits_of_this_library(stages, name):
    from peft import AutoPeftModelForCausalLM

    from coati.models.loading import load_causal_lm

    folder, _ = stages
    ours = logits_of(load_causal_lm(folder / name / "modeling"))
    theirs = logits_of(AutoPeftModelForCausalLM.from_pretrained(folder / name / "modeling"))
    assert theirs.shape[-1] == len(tiny_tokenizer()) + (2 if "grown" in name else 0)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["grown", "grown_lora"])
def test_weights_are_as_open_to_others_as_the_files_beside_them(stages, name):
    folder, _ = stages
    modes = {oct(file.stat().st_mode) for file in (folder / name / "modeling").iterdir()}
    assert len(modes) == 1


def test_the_new_rows_are_trained(stages):
    folder, _ = stages
    known = len(tiny_tokenizer())
    for name, key in (
        ("grown", "model.embed_tokens.weight"),
        ("grown_lora", "base_model.model.model.embed_tokens.weight"),
    ):
        (file,) = (folder / name / "modeling").glob("*model.safetensors")
        rows = tensors(file)[key]
        assert len(rows) == known + 2 and not torch.equal(rows[known], rows[known + 1])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_transformers_gives_the_scores_of_the_reward_model(stages, side):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from coati.models.reward_model import RewardModel

    place = stages[0] / "rm" / "modeling"
    assert tiny_tokenizer().pad_token_id == tiny_tokenizer().eos_token_id  # what was hard
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side=side)
    dialogues = [
        [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "yes"}]
        for n in (1, 9, 4)
    ]
    texts = [tokenizer.apply_chat_template(each, tokenize=False).rstrip() for each in dialogues]
    assert all(text.endswith("<|im_end|>") for text in texts)
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    plain = AutoModelForSequenceClassification.from_pretrained(place).eval()
    ours = RewardModel.from_pretrained(place).eval()
    torch.testing.assert_close(plain(**batch).logits[:, 0], ours(**batch), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    return folder, worker("failing", folder)


@pytest.mark.parametrize("name", ["at the start", "a dry run"])
def test_what_cannot_be_saved_is_refused_before_the_first_step(failing, name):
    folder, ended = failing
    code, said = ended[name]
    place = folder / name.replace(" ", "_")
    assert code == 1 and "nothing was trained" in said and "Traceback" not in said
    assert "tokenizer_config.json: TypeError: Object of type Undefined" in said
    assert "neither disk nor rights are at fault" in said and "free space" not in said
    assert not (place / "metrics.jsonl").exists() and not list(place.glob(".rehearsal-*"))


@pytest.mark.parametrize(
    "name, file",
    [
        ("at the end", "model.safetensors"),
        ("an adapter's", "adapter_model.safetensors"),
        ("no space", "model.safetensors"),
    ],
)
def test_a_failed_final_save_leaves_the_weights_and_says_where(failing, name, file):
    folder, ended = failing
    code, said = ended[name]
    place = folder / {"no space": "full"}.get(name, name.replace(" ", "_"))
    rescued = place / "modeling.rescued"
    assert code == 1 and str(rescued) in said and not (place / "modeling").exists()
    found = tensors(rescued / file)
    if name == "no space":
        assert "No space left" in said and "GiB free" in said and "free space" in said
    else:
        assert "neither disk nor rights are at fault" in said and "free space" not in said
        assert "without what cannot be written there either: tokenizer_config.json" in said
    if file == "model.safetensors":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(rescued)
        before = tensors(folder / "base" / file)
        assert all(torch.equal(found[key], each) for key, each in model.state_dict().items())
        assert any(not torch.equal(found[key], each) for key, each in before.items())  # trained
    else:
        from peft import AutoPeftModelForCausalLM

        AutoPeftModelForCausalLM.from_pretrained(rescued)
        assert any(".lora_B" in key and each.any() for key, each in found.items())


def test_without_a_place_beside_it_the_weights_go_to_the_temporary_directory(failing):
    folder, ended = failing
    code, said = ended["no place beside"]
    (place,) = (folder / "elsewhere").glob("coati-rescued-*")
    assert code == 1 and f"weights are in {place}" in said
    assert (place / "config.json").is_file() and tensors(place / "model.safetensors")


def test_a_save_dir_that_cannot_be_made_is_named(failing):
    code, said = failing[1]["a file in the way"]
    assert code and "file" in said and "Traceback" not in said
