"""``coati ilql`` in this process: what it writes, resumes, decodes by and leaves to others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coati.inference import load
from coati.models.generation.value_guidance import ValueGuidance
from coati.models.ilql_heads import FILE, NAME
from coati.utils.logging import forget_warnings
from tests.distributed.spawn import run
from tests.end_to_end.inputs import metrics
from tests.end_to_end.malformed import ended
from tests.end_to_end.worker import Run
from tests.tiny import tiny_llama, tiny_tokenizer

CPU = {"CUDA_VISIBLE_DEVICES": ""}
COMMON = ("--plugin", "ddp", "--mixed_precision", "fp32", "--max_length", "96", "--lr", "1e-3")
COMMON += ("--batch_size", "4", "--accumulation_steps", "1", "--save_interval", "2")
COMMON += ("--target_interval", "1", "--target_alpha", "0.5")


def talk(number: int) -> dict:
    """The score is that of the last word."""
    said = "there" if number % 2 else "today"
    texts = (f"hello {number % 5}", "how are", "you", said)
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    return {"messages": messages, "score": float(number % 2) * 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ilql")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = "".join(json.dumps(talk(number)) + "\n" for number in range(24))
    (folder / "rows.jsonl").write_text(rows)
    return folder


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    forget_warnings()


def words(place: Path, save_dir: str, *more: str) -> list[str]:
    rows = ["--dataset", str(place / "rows.jsonl"), "--save_dir", str(place / save_dir)]
    return ["--pretrain", str(place / "model"), *rows, *COMMON, *more]


def trained(place: Path, save_dir: str, *more: str, verb: str = "ilql") -> Path:
    code, error = ended(verb, words(place, save_dir, *more))
    assert code == 0, error
    return place / save_dir / "modeling"


@pytest.fixture(scope="module")
def whole(place) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return trained(place, "whole", "--max_steps", "4", "--eval_ratio", "0.3")


@pytest.fixture(scope="module")
def adapter(place) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return trained(place, "lora", "--max_steps", "4", "--lora_rank", "4")


def same(first: Path, second: Path, name: str) -> bool:
    one, other = load_file(first / name), load_file(second / name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def guided(model) -> ValueGuidance | None:
    own = model.get_output_embeddings().__dict__.get("forward")
    return getattr(own, "__self__", None)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_a_resumed_run_ends_with_the_same_bits(place, whole, adapter, lora):
    """Weights, heads and targets: those of the first steps count for the later ones."""
    done = adapter if lora else whole
    more = ("--lora_rank", "4") if lora else ("--eval_ratio", "0.3")
    (saved,) = done.parent.glob("epoch-*_step-2")
    again = f"again{lora}"
    shutil.copytree(saved, place / again / saved.name)
    if (done.parent / "run.json").exists():
        shutil.copy(done.parent / "run.json", place / again)
    words = ("--max_steps", "4", *more, "--checkpoint_path", str(place / again / saved.name))
    resumed = trained(place, again, *words)
    assert same(done, resumed, FILE)
    assert same(done, resumed, "adapter_model.safetensors" if lora else "model.safetensors")
    heads = load_file(done / FILE)
    assert not torch.equal(heads["q1.2.weight"], heads["target.q1.2.weight"])


@pytest.mark.matrix
def test_two_processes_that_shard_the_optimizer_do_the_same(place):
    """zero2 on half of each batch, through the script: weights, heads and targets to rounding."""
    alone = trained(place, "one", "--max_steps", "3")
    shared = ("--max_steps", "3", "--batch_size", "2", "--plugin", "zero2")
    runs = {"ilql": Run(words(place, "two", *shared), script="train_ilql.py")}
    run(2, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=300)
    for name in (FILE, "model.safetensors"):
        one, two = (load_file(folder / name) for folder in (alone, place / "two" / "modeling"))
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)


def test_without_its_heads_a_checkpoint_is_refused(place, whole):
    (saved,) = whole.parent.glob("epoch-*_step-2")
    (place / "lost").mkdir()
    shutil.copytree(saved, place / "lost" / saved.name)
    (place / "lost" / saved.name / "modeling" / FILE).unlink()
    more = ("--max_steps", "4", "--eval_ratio", "0.3")
    more += ("--checkpoint_path", str(place / "lost" / saved.name))
    code, error = ended("ilql", words(place, "lost", *more))
    assert code == 1 and "Traceback" not in error and FILE in error


def test_the_metrics(whole):
    lines = metrics(whole.parent)
    last = [line for line in lines if "eval/loss" in line][-1]
    names = {"q_loss", "v_loss", "cql_loss", "awac_loss", "q_value", "target_q_value"}
    names |= {"state_value", "value_advantage", "q_gap", "value_correlation", "loss"}
    assert {name.removeprefix("eval/") for name in last if name != "step"} == names
    assert any("train/actions" in line and "train/q_loss" in line for line in lines)


def test_plain_transformers_loads_the_model_and_samples_by_the_policy(whole):
    config = json.loads((whole / "config.json").read_text())
    assert config[NAME] == FILE
    theirs, said = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not said["unexpected_keys"] and not said["missing_keys"]
    ours = load(whole, beta_gen=0).model
    ids = torch.tensor([[5, 6, 7]])
    assert guided(ours) is None
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_it_decodes_by_the_saved_targets(whole, adapter, capsys, lora):
    directory = adapter if lora else whole
    model = load(directory).model
    assert "decodes by the values of ILQL: log pi + 1 (min Q - V)" in capsys.readouterr().err
    guidance = guided(model)
    assert isinstance(guidance, ValueGuidance) and guidance.beta == 1
    stored = load_file(directory / FILE)
    assert torch.equal(guidance.heads.targets["q2.2.bias"], stored["target.q2.2.bias"])
    ids = torch.tensor([[5, 6, 7]])
    plain = load(directory, beta_gen=0).model
    with torch.no_grad():
        states = plain.model(input_ids=ids)[0]
        wanted = plain(ids).logits.log_softmax(-1) + 3 * guidance.heads.advantages(states)
        found = load(directory, beta_gen=3.0).model(ids).logits
    kept = found > -torch.inf
    assert (kept.sum(-1) == 20).all()
    torch.testing.assert_close(found[kept], wanted[kept], atol=1e-4, rtol=1e-4)


def test_chat_says_how_it_decodes(place, whole):
    ask = ["--prompt", "hello", "--max_new_tokens", "4", "--io", "simple"]
    code, error = ended("chat", ["--model_path", str(whole), *ask, "--beta_gen", "2"])
    assert code == 0 and "log pi + 2 (min Q - V)" in error
    code, error = ended("chat", ["--model_path", str(whole), *ask, "--beta_gen", "0"])
    assert code == 0 and "values of ILQL" not in error
    code, error = ended("chat", ["--model_path", str(place / "model"), *ask, "--beta_gen", "2"])
    assert code == 1 and f"--beta_gen 2: {place / 'model'} has no {FILE}" in error


def test_merging_takes_the_heads_along(place, adapter):
    code, error = ended(
        "merge", ["--model_path", str(adapter), "--output_dir", str(place / "merged")]
    )
    assert code == 0, error
    assert same(adapter, place / "merged", FILE)
    assert json.loads((place / "merged" / "config.json").read_text())[NAME] == FILE
    assert guided(load(place / "merged").model) is not None


def test_what_other_methods_make_of_it_names_no_heads(place, whole):
    more = ["--pretrain", str(whole), "--dataset", str(place / "rows.jsonl"), "--max_steps", "1"]
    more += ["--plugin", "ddp", "--mixed_precision", "fp32", "--max_length", "96"]
    code, error = ended("sft", [*more, "--batch_size", "2", "--save_dir", str(place / "sft")])
    assert code == 0, error
    assert NAME not in json.loads((place / "sft" / "modeling" / "config.json").read_text())
    assert guided(load(place / "sft" / "modeling").model) is None


def test_a_named_file_that_is_not_there(place, whole):
    copy = place / "without"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(FILE))
    with pytest.raises(ValueError, match="its config.json names ilql_heads.st"):
        load(copy)
    assert guided(load(copy, beta_gen=0).model) is None
    (copy / FILE).write_bytes(b"not it")
    code, error = ended("chat", ["--model_path", str(copy), "--prompt", "hi", "--io", "simple"])
    assert code == 1 and "Traceback" not in error and f"{copy / FILE}: not readable" in error


def test_it_goes_on_from_the_heads_of_another_run(place, whole):
    more = ["--pretrain", str(whole), "--dataset", str(place / "rows.jsonl"), "--max_steps", "1"]
    code, error = ended("ilql", [*more, *COMMON, "--save_dir", str(place / "on"), "--lr", "1e-9"])
    assert code == 0 and "it goes on from them" in error
    now, before = (load_file(folder / FILE) for folder in (place / "on" / "modeling", whole))
    torch.testing.assert_close(now["q1.2.weight"], before["q1.2.weight"], atol=1e-6, rtol=0)


def test_prepared_rows_of_another_type_and_rows_without_scores(place):
    bad = place / "bad.jsonl"
    bad.write_text(json.dumps({"messages": talk(0)["messages"]}) + "\n")
    given = [*words(place, "none"), "--dataset", str(bad)]
    code, error = ended("ilql", given)
    assert code == 1 and "no_score" in error and "Traceback" not in error
