"""Teachers of coati gkd, from its command: which are taken and which refused by name, and a run
from end to end."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import coati
from coati.models.loading import load_causal_lm
from coati.models.lora.quantized_base import quantized_layers
from coati.parallel.options import ParallelOptions
from coati.recipes import teacher_model
from coati.recipes.teacher_model import teacher_options
from coati.trainer.run_report.metric_panels import panels_of
from tests.dataset.stream.streams import write_lines
from tests.end_to_end.inputs import metrics, write_model
from tests.end_to_end.malformed import ended
from tests.experience_maker.rollout_servers import serving
from tests.tiny import tiny_llama, tiny_tokenizer

TALKS = [{"prompt": f"q{n}", "response": f"so {n}"} for n in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher"), intermediate_size=48)


@pytest.fixture
def words(model, tmp_path, monkeypatch):
    """``words(more...)``: two steps of four rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_lines(tmp_path / "rows.jsonl", TALKS)
    given = {
        "pretrain": model,
        "dataset": str(tmp_path / "rows.jsonl"),
        "plugin": "ddp",
        "mixed_precision": "fp32",
        "batch_size": "2",
        "accumulation_steps": "2",
        "max_length": "64",
        "max_new_tokens": "8",
        "max_steps": "2",
        "log_interval": "1",
        "save_dir": str(tmp_path / "run"),
    }
    asked = [word for name, value in given.items() for word in (f"--{name}", value)]
    return lambda *more: [*asked, *more]


def test_a_student_on_a_base_of_few_bits_has_a_whole_teacher(words, teacher, tmp_path, monkeypatch):
    """Whatever stores the student's base, the teacher's distribution is that of its own weights."""
    held = []
    monkeypatch.setattr(
        teacher_model,
        "load_causal_lm",
        lambda *a, **k: held.append(load_causal_lm(*a, **k)) or held[-1],
    )
    student = ("--lora_rank", "4", "--quantize_base", "int8", "--lora_plus_ratio", "8")
    code, error = ended("gkd", words("--teacher", teacher, *student, "--optim", "lion"))
    assert code == 0, error
    (frozen,) = held
    whole = load_causal_lm(teacher).state_dict()
    assert quantized_layers(frozen) == {}
    for name, weight in frozen.state_dict().items():
        assert torch.equal(weight, whole[name]), name
    saved = tmp_path / "run" / "modeling"
    assert json.loads((saved / "lora_config.json").read_text())["quantize_base"] == "int8"
    assert len([line for line in metrics(tmp_path / "run") if "train/divergence" in line]) == 2


def test_a_run_tells_how_far_the_student_is(words, teacher, tmp_path):
    more = ("--teacher", teacher, "--eval_ratio", "0.3", "--gkd_lambda", "0.6")
    code, error = ended("gkd", words(*more))
    assert code == 0, error
    found = metrics(tmp_path / "run")
    first = found[0]
    assert {"eval/divergence", "eval/nll", "eval/teacher_nll", "eval/perplexity"} <= set(first)
    assert first["eval/loss"] == pytest.approx(first["eval/divergence"], rel=1e-6)
    steps = [line for line in found if "train/loss" in line]
    assert len(steps) == 2 and 0 < sum(line["train/on_policy"] for line in steps) < 2
    panels = panels_of({name for line in found for name in line} - {"step"})
    assert [panel.title for panel, _ in panels["Distillation"]] == [
        "Divergence from the teacher",
        "... of the student's responses",
        "Rows that the student answered",
    ]
    titles = [panel.title for panel, _ in panels["Loss"]]
    assert "Negative log-likelihood" in titles  # which a run with --sft_loss dft has as well
    assert "Other metrics" not in panels, panels["Other metrics"]
    assert "knowledge distillation" in (tmp_path / "run" / "report.html").read_text()


def test_a_student_that_is_its_teacher_has_nothing_to_learn(words, model, tmp_path):
    code, error = ended("gkd", words("--teacher", model, "--gkd_beta", "0"))
    assert code == 0, error
    line = next(line for line in metrics(tmp_path / "run") if "train/loss" in line)
    assert abs(line["train/loss"]) < 1e-6 and line["train/nll"] == line["train/teacher_nll"]


def test_packs_are_distilled_as_their_rows_are(words, teacher, tmp_path):
    own = ("--teacher", teacher, "--gkd_lambda", "0", "--max_steps", "1")
    given = [word for word in words(*own) if word != "--max_new_tokens"]
    given.remove("8")
    rows = [*given, "--batch_size", "12", "--accumulation_steps", "1"]
    code, error = ended("gkd", rows)
    assert code == 0, error
    packs = [*given, "--packing", "--batch_size", "1", "--accumulation_steps", "1"]
    packs += ["--max_length", "400", "--save_dir", str(tmp_path / "packs")]
    code, error = ended("gkd", packs)
    assert code == 0, error
    losses = [
        next(line["train/loss"] for line in metrics(tmp_path / name) if "train/loss" in line)
        for name in ("run", "packs")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_trial_counts_the_teacher_in_its_memory(words, teacher, tmp_path):
    code, error = ended("gkd", words("--teacher", teacher, "--dry_run"))
    assert code == 0, error
    assert "teacher" in error and "Nothing was kept" in error
    assert not (tmp_path / "run" / "modeling").exists()


def test_adapters_of_a_student_and_of_a_teacher(words, model, teacher, tmp_path):
    """A teacher that is an adapter is taken with its base; the student's adapters are trained."""
    lora = ("--lora_rank", "4", "--teacher", teacher, "--lr", "1e-2")
    code, error = ended("gkd", words(*lora))
    assert code == 0, error
    adapter = tmp_path / "run" / "modeling"
    assert (adapter / "adapter_config.json").is_file()
    again = ("--teacher", str(tmp_path / "run"), "--save_dir", str(tmp_path / "again"))
    code, error = ended("gkd", words(*again))
    assert code == 0, error
    line = next(line for line in metrics(tmp_path / "again") if "train/loss" in line)
    assert line["train/loss"] > 1e-7  # the teacher is not its base, which the student is


def test_a_vocabulary_padded_to_another_width(words, tmp_path):
    """Rows of the embedding that no token has."""
    wide = tiny_llama(3, vocab_size=448)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    code, error = ended("gkd", words("--teacher", str(tmp_path / "wide")))
    assert code == 0, error


def other_tokenizer(teacher: str, folder: Path, change) -> str:
    shutil.copytree(teacher, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_another_tokenizer_is_refused_before_weights_are_read(
    words, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_model.build, "frozen", None)

    def swap(content):
        vocabulary = content["model"]["vocab"]
        one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    def split_otherwise(content):
        content["model"]["merges"] = content["model"]["merges"][:2]

    for name, change, said in (
        ("swapped", swap, r"the student's token '.+' of id \d+ has the id \d+ there"),
        ("merges", split_otherwise, "the same tokens, but 'The answer is 12, not 3.' is"),
    ):
        place = other_tokenizer(teacher, tmp_path / name, change)
        code, error = ended("gkd", words("--teacher", place))
        assert code == 1 and f"--teacher {place} has another tokenizer: " in error
        assert re.search(said, error), error


def test_a_token_that_only_the_student_has(words, teacher):
    code, error = ended("gkd", words("--teacher", teacher, "--add_tokens", "<new>"))
    assert code == 1 and re.search(r"token '<new>' of id \d+ is none there", error)


def test_a_server_as_teacher(words, teacher, tmp_path):
    """The numbers of the same model in this process, over the ids that it lists: all of them."""
    losses = []
    with serving(coati.load_causal_lm(teacher)) as [server]:
        for name, more in {
            "here": ("--teacher", teacher),
            "there": ("--teacher_url", f"{server.url}/v1", "--teacher_top_k", "384"),
        }.items():
            code, error = ended("gkd", words(*more, "--save_dir", str(tmp_path / name)))
            assert code == 0, error
            lines = [line for line in metrics(tmp_path / name) if "train/loss" in line]
            losses.append([line["train/loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_server_that_is_not_there(words, monkeypatch):
    monkeypatch.setattr("coati.trainer.teachers.CHECK_S", 0.1)
    code, error = ended("gkd", words("--teacher_url", "http://127.0.0.1:9"))
    assert code == 1 and "--teacher_url http://127.0.0.1:9/v1/completions cannot be" in error


def test_from_python(model, teacher, tmp_path, monkeypatch):
    """A stage's result as teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {"plugin": "ddp", "mixed_precision": "fp32", "batch_size": 2, "max_steps": 1}
    given |= {"accumulation_steps": 1, "max_length": 64}
    wise = coati.sft(teacher, TALKS, **given)
    student = coati.gkd(model, TALKS, teacher=wise, max_new_tokens=8, **given)
    assert Path(student.path) == Path("output/gkd/001/modeling") and student.generate("q1")
    assert json.loads(Path("output/gkd/001/arguments.json").read_text())["teacher"] == str(
        Path(wise.path).resolve()
    )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"plugin": "gemini", "tp": 2, "precision": "bf16"}, ("ddp", 1, "bf16")),
        ({"plugin": "3d", "tp": 2, "precision": "fp32"}, ("3d", 2, "fp32")),
        ({"plugin": "3d", "zero_stage": 1, "precision": "bf16"}, ("ddp", 1, "bf16")),
        ({"plugin": "zero2_cpu", "precision": "fp16"}, ("ddp", 1, "fp16")),
    ],
)
def test_how_the_teacher_lies_beside_the_student(options, found):
    chosen = teacher_options(ParallelOptions(**options))
    assert (chosen.plugin, chosen.tp, chosen.precision) == found
