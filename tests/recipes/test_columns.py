"""--columns and --strict_columns of the training commands: raw rows under other names are the rows
under the known ones, and what is not read is named or refused."""

import json
from pathlib import Path

import pytest

import coati
from coati.cli import arguments, distilling, preferences, pretraining, rollouts
from coati.dataset import setup_conversation_template
from coati.recipes import data
from coati.recipes.extras import NO_EXTRAS
from coati.recipes.mixed_rows import type_of_path
from coati.recipes.resume import Resume
from coati.recipes.run import Run, _check_columns
from coati.utils.logging import forget_warnings
from tests.dataset.stream.streams import write_lines
from tests.end_to_end.inputs import prepare, short_lines, weights, write_model
from tests.end_to_end.malformed import ended
from tests.tiny import tiny_tokenizer

REWARD = ("--no_neural_reward_model", "--reward_functions", "format")
PAIR = (
    {"ask": "q{n}?", "good": "yes {n}", "poor": "no {n}", "who": "Be {n}."},
    {"prompt": "q{n}?", "chosen": "yes {n}", "rejected": "no {n}", "system": "Be {n}."},
    "prompt=ask,chosen=good,rejected=poor system=who",
)
PROMPT = ({"ask": "q{n}?"}, {"prompt": "q{n}?"}, "prompt=ask")
# verb -> type, how its flags are read, (a row, the same under known names, --columns), more words
VERBS = {
    "sft": (
        "sft",
        arguments.parse_sft,
        (
            {"ask": "q{n}?", "meta": {"reply": "a{n}"}},
            {"prompt": "q{n}?", "response": "a{n}"},
            "prompt=ask response=meta.reply",
        ),
        (),
    ),
    "gkd": (
        "sft",
        distilling.parse_gkd,
        (
            {"ask": "q{n}?", "meta": {"reply": "a{n}"}},
            {"prompt": "q{n}?", "response": "a{n}"},
            "prompt=ask response=meta.reply",
        ),
        ("--teacher", "M"),
    ),
    "rm": ("preference", preferences.parse_rm, PAIR, ()),
    "dpo": ("preference", preferences.parse_dpo, PAIR, ()),
    "orpo": ("preference", preferences.parse_orpo, PAIR, ()),
    "kto": (
        "kto",
        preferences.parse_kto,
        (
            {"ask": "q{n}?", "reply": "a{n}", "fine": "yes"},
            {"prompt": "q{n}?", "completion": "a{n}", "label": True},
            "prompt=ask,response=reply,label=fine",
        ),
        (),
    ),
    "pretrain": (
        "text",
        pretraining.parse_pretrain,
        ({"body": "Of rivers {n}."}, {"text": "Of rivers {n}."}, "text=body"),
        (),
    ),
    "ppo": ("prompt", rollouts.parse_ppo, PROMPT, REWARD),
    "grpo": ("prompt", rollouts.parse_grpo, PROMPT, REWARD),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    forget_warnings()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def filled(row, number: int):
    if isinstance(row, dict):
        return {key: filled(value, number) for key, value in row.items()}
    return row.format(n=number) if isinstance(row, str) else row


def written(path: Path, row: dict) -> str:
    write_lines(path, [filled(row, number) for number in range(6)])
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def run_of(tokenizer):
    """``run_of(verb, file, words...)``: what a run of ``verb`` on ``file`` is told."""

    def run_of(verb: str, file: str, *words: str) -> Run:
        _, parse, _, more = VERBS[verb]
        given = ["--pretrain", "some/model", "--dataset", file, "--max_length", "300", *more]
        settings = parse([*given, *words])
        template = setup_conversation_template(tokenizer)
        return Run(settings, None, Resume(), tokenizer, template, NO_EXTRAS, (), 0.0)

    return run_of


def rows_of(run: Run, verb: str) -> dict:
    flag = "prompt_dataset" if verb in ("ppo", "grpo") else "dataset"
    return data.training_rows(run, VERBS[verb][0], flag).rows[:]


@pytest.mark.parametrize("verb", VERBS)
def test_named_columns_are_the_known_ones(verb, run_of, tmp_path, capsys):
    odd, known, columns = VERBS[verb][2]
    odd_file = written(tmp_path / "odd.jsonl", odd | {"images": ["a.png"], "lang": "en"})
    words = ["--columns", *columns.split()]
    found = rows_of(run_of(verb, odd_file, *words), verb)
    said = capsys.readouterr()
    assert found == rows_of(run_of(verb, written(tmp_path / "known.jsonl", known)), verb)
    # As coati prepare says it, and again where they are prepared already.
    assert "columns and fields that were not read, in rows: images 6, lang 6" in said.out
    warning = f"images is not read, in 6 of 6 rows (the first: {odd_file}:1)"
    assert warning in said.err
    forget_warnings()
    capsys.readouterr()
    assert rows_of(run_of(verb, odd_file, *words), verb) == found
    assert "prepared before into" in (said := capsys.readouterr().err) and warning in said
    for again in (odd_file, written(tmp_path / "fresh.jsonl", odd | {"images": ["b.png"]})):
        with pytest.raises(ValueError, match="images .the first: .*jsonl:1"):
            rows_of(run_of(verb, again, *words, "--strict_columns"), verb)
    rows_of(run_of(verb, odd_file, *words, "images=", "--strict_columns"), verb)


def test_evaluation_rows_have_the_same_columns(run_of, tmp_path):
    odd, known, columns = VERBS["sft"][2]
    file = written(tmp_path / "a.jsonl", odd)
    words = ["--columns", *columns.split(), "--eval_dataset", written(tmp_path / "b.jsonl", odd)]
    held = data.evaluation_rows(run_of("sft", file, *words), "sft").rows[:]
    plain = written(tmp_path / "c.jsonl", known)
    assert (
        held
        == data.evaluation_rows(
            run_of("sft", plain, "--eval_dataset", written(tmp_path / "d.jsonl", known)), "sft"
        ).rows[:]
    )


def test_texts_beside_conversations_are_told_apart_by_the_named_columns(run_of, tmp_path):
    info = {
        "texts": {"file_name": "t.jsonl", "columns": {}},
        "talks": {
            "file_name": "s.jsonl",
            "columns": {"prompt": "ask", "response": "reply"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    written(tmp_path / "t.jsonl", {"text": "Of rivers {n}."})
    written(tmp_path / "s.jsonl", {"ask": "q{n}", "reply": "a{n}"})
    named = f"{tmp_path}/dataset_info.json"
    assert type_of_path(f"{named}:talks", "text") == "sft"
    assert type_of_path(f"{named}:texts", "text") == "text"
    layout = run_of("sft", named, "--columns", "prompt=ask,response=reply").settings.data.layout
    assert type_of_path(str(tmp_path / "s.jsonl"), "text", None, layout) == "sft"
    assert type_of_path(str(tmp_path / "s.jsonl"), "text") == "text"


def test_prepared_rows_have_been_read(run_of, tmp_path, capsys):
    done = prepare(tmp_path / "done", short_lines(0, 8))
    raw = written(tmp_path / "raw.jsonl", VERBS["sft"][2][0])
    for words, flag in (
        (["--columns", "prompt=ask"], "columns prompt=ask"),
        (["--strict_columns"], "strict"),
    ):
        with pytest.raises(
            ValueError, match=f"--{flag}.*says how raw rows are read, and .*done.* is prepared"
        ):
            _check_columns(run_of("sft", done, *words).settings)
        with pytest.raises(ValueError, match="are all prepared already; leave it out, or prepare"):
            _check_columns(run_of("sft", done, "--eval_dataset", done, *words).settings)
        _check_columns(run_of("sft", raw, "--eval_dataset", done, *words).settings)
    assert f"--columns: nothing changes for {done}, prepared already" in capsys.readouterr().err
    prompts = [*REWARD, "--ptx_dataset", raw, "--ptx_coef", "0.1"]
    _check_columns(run_of("grpo", done, *prompts, "--strict_columns").settings)
    with pytest.raises(ValueError, match="--columns prompt=ask"):  # those are the prompts'
        _check_columns(run_of("grpo", done, *prompts, "--columns", "prompt=ask").settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def train(verb: str, model: str, file: str, save_dir: Path, *more: str) -> tuple[int, str]:
    words = ["--pretrain", model, "--dataset", file, "--save_dir", str(save_dir)]
    words += ["--max_length", "300", "--batch_size", "2", "--accumulation_steps", "1"]
    return ended(verb, [*words, "--plugin", "ddp", "--max_steps", "2", *more])


STREAM = ("--streaming", "--stream_workers", "0", "--shuffle_buffer", "0")


def test_a_stream_reads_named_columns_too(model, tmp_path):
    odd, known, columns = VERBS["sft"][2]
    file = written(tmp_path / "odd.jsonl", odd | {"images": ["a.png"]})
    words = [*STREAM, "--columns", *columns.split()]
    code, said = train("sft", model, file, tmp_path / "odd", *words)
    assert code == 0, said
    assert f"--streaming: images holds content that is not read; the first: {file}:1" in said
    assert (
        train("sft", model, written(tmp_path / "k.jsonl", known), tmp_path / "known", *STREAM)[0]
        == 0
    )
    assert weights(tmp_path / "odd") == weights(tmp_path / "known") != {}
    code, said = train("sft", model, file, tmp_path / "strict", *words, "--strict_columns")
    assert code == 1 and "columns with content that is not read, and --strict_columns" in said


def test_a_run_goes_on_with_the_same_columns_alone(model, tmp_path):
    odd, _, columns = VERBS["sft"][2]
    file = written(tmp_path / "odd.jsonl", odd)
    run = ["--columns", *columns.split(), "--save_interval", "1"]
    assert train("sft", model, file, tmp_path / "run", *run)[0] == 0
    auto = ["--checkpoint_path", "auto", "--max_steps", "3"]
    code, said = train("sft", model, file, tmp_path / "run", *auto, *run[:2])
    assert code == 1
    assert "--columns prompt=ask response=meta.reply -> prompt=ask: must be the same" in said
    other_order = ["--columns", "response=meta.reply,prompt=ask", "--strict_columns"]
    assert train("sft", model, file, tmp_path / "run", *auto, *other_order)[0] == 0


def test_from_python(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"ask": f"q{n}?", "reply": f"a{n}", "more": "x"} for n in range(6)]
    flags = {"max_length": 300, "batch_size": 2, "accumulation_steps": 1, "max_steps": 2}
    flags |= {"plugin": "ddp", "mixed_precision": "fp32"}
    named = {"prompt": "ask", "response": "reply", "more": None}
    coati.sft(model, rows, columns=named, strict_columns=True, **flags, save_dir="a")
    known = [{"prompt": row["ask"], "response": row["reply"]} for row in rows]
    coati.sft(model, known, **flags, save_dir="b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != {}
    with pytest.raises(ValueError, match="--columns: 'ask' is nothing that a column can be"):
        coati.sft(model, rows, columns={"ask": "prompt"}, **flags)
