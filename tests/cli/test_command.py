"""The command: its verbs, bare words, what is refused, YAML files written and read, schemas,
completion."""

import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from coati.__main__ import main, overview
from coati.cli.bench_programs import USUAL
from coati.cli.config_file import config_text, flags_of, key_of, scalar, schema_of
from coati.cli.nearest import SCHEMAS
from coati.cli.shell_completion import completion_script
from coati.cli.verb import GROUPS
from coati.recipes.command import load, names, run, summary
from coati.utils.logging import forget_warnings, get_logger, take_warnings

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "colossalai", "datasets", "peft", "numpy")
WITH_FILES = sorted(path.stem for path in SCHEMAS.glob("*.json"))
# What the parser of each verb asks for before it returns, with paths that are there.
NEEDED = {
    "sft": ["--pretrain", "m", "--dataset", "{dataset}"],
    "pretrain": ["--pretrain", "m", "--dataset", "{dataset}"],
    "dpo": ["--pretrain", "m", "--dataset", "{dataset}"],
    "grpo": [
        "--pretrain",
        "m",
        "--prompt_dataset",
        "{prompt_dataset}",
        "--reward_functions",
        "length",
    ],
    "chat": ["--model_path", "m"],
    "score": ["--model_path", "m", "--input", "rows.jsonl"],
    "prepare": ["--type", "sft", "--data_input_dirs", "a,b", "--tokenizer_dir", "m"],
}


def needed(verb: str, data: dict[str, str]) -> list[str]:
    return [word.format(**data) for word in NEEDED[verb]]


@pytest.mark.parametrize("name", names())
def test_every_verb_helps_without_anything_heavy(name):
    program = (
        "import sys; from coati.__main__ import main\n"
        f"try: main([{name!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('heavy', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"usage: coati {name}"), done.stdout + done.stderr
    assert done.stdout.endswith("heavy []\n")


def test_the_overview_names_every_verb_once_under_a_heading():
    lines = overview().splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(shown) == names()
    assert [title for title in GROUPS.values() if f"{title}:" in lines] == list(GROUPS.values())
    for name in names():
        assert summary(name) in overview() and summary(name)[0].isupper()
        assert load(name).group in GROUPS


@pytest.mark.parametrize("name", names())
def test_what_runs_a_verb_is_there(name):
    assert callable(load(name).function())


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_it_says_which_there_are(words, capsys):
    main(words)
    assert capsys.readouterr().out == overview() + "\n"


def test_the_version(capsys):
    import coati

    main(["--version"])
    assert capsys.readouterr().out == f"coati {coati.__version__}\n"


def test_an_unknown_verb_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["stf"])
    assert stop.value.code == 2
    assert "unknown verb 'stf'; did you mean sft?" in capsys.readouterr().err


def test_bare_words_stand_for_the_subject_or_a_file():
    chat = load("chat")
    assert chat.words(["model", "--io", "simple"]) == ["--model_path", "model", "--io", "simple"]
    assert chat.words(["--io", "simple"]) == ["--io", "simple"]
    sft = load("sft")
    assert sft.words(["a.yaml", "--lr", "1"]) == ["--lr", "1", "--config", "a.yaml"]
    assert sft.words(["out/arguments.json"]) == ["--config", "out/arguments.json"]
    assert load("prepare").words(["rows.json"]) == ["--data_input_dirs", "rows.json"]
    assert load("chat").words(["a.yml", "model"]) == ["--model_path", "model", "--config", "a.yml"]


@pytest.mark.parametrize("again", [["--model_path", "b"], ["--model-path=b"]])
@pytest.mark.parametrize("verb", ["serve", "merge", "rollout-server", "chat"])
def test_a_subject_that_is_given_twice_is_refused(verb, again, capsys):
    with pytest.raises(SystemExit):
        load(verb).words(["a", "--io", "simple", *again])
    assert "a stands for --model_path a, and --model_path is given too" in capsys.readouterr().err


def test_a_value_that_only_resembles_the_flag_is_a_value():
    words = ["a", "--output_dir", "xxmodel_path"]
    assert load("merge").words(words) == ["--model_path", *words]


def test_a_recipe_is_taken_by_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    recipe = ROOT / "examples" / "recipes" / "smollm2_135m_sft.yaml"
    words = ["smollm2_135m_sft.yaml", "--dataset", "rows.jsonl", "--eval_dataset", "rows.jsonl"]
    sft = load("sft")
    settings = sft.parse(sft.words(words))
    assert settings.model.pretrain == "HuggingFaceTB/SmolLM2-135M"
    assert capsys.readouterr().err == f"coati: smollm2_135m_sft.yaml is the recipe {recipe}\n"
    Path("smollm2_135m_sft.yaml").write_text("pretrain: mine\n")
    assert sft.parse(sft.words(words)).model.pretrain == "mine"
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        main(["sft", "smollm2_135m_stf.yaml"])
    assert capsys.readouterr().err == (
        "coati sft: error: --config smollm2_135m_stf.yaml: No such file or directory; expected a "
        "YAML file of flags, or a recipe: smollm2_135m_sft or smollm2_135m_rm or smollm2_135m_ppo\n"
    )


def test_a_bare_word_may_name_a_recipe():
    words = load("sft").words(["smollm2_135m_sft", "--lr", "1"])
    assert words == ["--lr", "1", "--config", "smollm2_135m_sft"]


@pytest.mark.parametrize("second", [["--config", "b.yaml"], ["--config=b.yaml"]])
def test_two_configurations_are_refused(second, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "a.yaml", *second])
    assert stop.value.code == 2 and "two configurations are given" in capsys.readouterr().err


def test_a_bare_word_that_stands_for_nothing_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "model"])
    assert stop.value.code == 2
    assert "coati sft: error: model: a value without a flag before it" in capsys.readouterr().err


def test_messages_name_the_command_that_was_given(capsys, monkeypatch):
    for argv, prog in ((["coati", "sft"], "coati sft"), (["x/train_sft.py"], "train_sft.py")):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit):
            main() if prog.startswith("coati") else run("sft")
        assert capsys.readouterr().err.startswith(f"{prog}: error: --pretrain is missing")


def test_an_expected_error_is_one_line_and_an_interrupt_130(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["init", "sft"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "coati init: error: sft.yaml exists already; name another file with --output, or remove "
        "it\n"
    )

    def interrupt(_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("coati.recipes.verbs.cache.main", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["cache"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "coati cache: interrupted\n"


def test_a_rank_other_than_0_says_who_it_is_and_a_launcher_is_told_by_file(
    capsys, monkeypatch, tmp_path
):
    def fail(_):
        raise ValueError("broken")

    monkeypatch.setattr("coati.recipes.verbs.cache.main", fail)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        main(["cache"])
    assert capsys.readouterr().err == "[rank 3] coati cache: error: broken\n"
    monkeypatch.setenv("COATI_ERROR_FILE", str(tmp_path / "3"))
    with pytest.raises(SystemExit):
        main(["cache"])
    assert capsys.readouterr().err == ""
    assert (tmp_path / "3").read_text() == "coati cache: error: broken"


def test_a_rank_repeats_nothing_of_what_the_launcher_said_about_flags(
    capsys, monkeypatch, tmp_path
):
    """An abbreviated flag is remarked upon once, where it is read first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["cache", "--older", "1"]
    main(words)
    assert "--older is read as --older_than" in capsys.readouterr().err
    forget_warnings()
    monkeypatch.setenv("COATI_ERROR_FILE", str(tmp_path / "0"))
    take_warnings()
    main(words)
    assert capsys.readouterr().err == ""
    assert "--older is read as --older_than" in take_warnings()[0]  # for the run's report
    get_logger("coati.test").info("later")
    assert "later" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "a/b/c"])
def test_a_model_that_is_not_there_is_said_before_anything_is_loaded(path, data, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "--pretrain", path, "--dataset", data["dataset"], "--nproc", "2"])
    assert stop.value.code == 1
    assert f"--pretrain {path}: there is no such directory" in capsys.readouterr().err


# ---- YAML files


def test_init_writes_a_file_that_means_the_defaults(monkeypatch, tmp_path, data, capsys):
    """Reading it back gives what the flags alone give, for every training verb."""
    monkeypatch.chdir(tmp_path)
    for verb in ("sft", "dpo", "grpo", "chat", "score", "prepare"):
        main(["init", verb])
        assert f"coati {verb} {verb}.yaml" in capsys.readouterr().out
        words = needed(verb, data)
        parse = load(verb).parse
        from_file = parse([*words, "--config", f"{verb}.yaml"])
        assert without_config(from_file) == without_config(parse(words))


def without_config(settings):
    values = dict(vars(settings))
    # What was written and what is the default mean the same but where a default follows the model.
    for name in ("flags_written", "length_given"):
        values.pop(name, None)
    if "flags" in values:
        values["flags"] = {k: v for k, v in values["flags"].items() if k != "config"}
    return values


def test_init_says_what_is_left_to_fill_in(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main(["init", "sft", "--pretrain", "m"])
    assert capsys.readouterr().out == "wrote sft.yaml; fill in dataset, then: coati sft sft.yaml\n"
    main(["init", "sft", "--output", "b.yaml", "--pretrain", "m", "--dataset", "d"])
    assert capsys.readouterr().out == "wrote b.yaml; run it: coati sft b.yaml\n"


def test_init_takes_values_of_the_verb(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main(["init", "sft", "--pretrain", "models/x", "--lr", "2e-5", "--dataset", "a b.jsonl", "c"])
    read = yaml.safe_load(Path("sft.yaml").read_text())
    assert read["pretrain"] == "models/x" and float(read["lr"]) == 2e-5
    assert read["dataset"] == ["a b.jsonl", "c"] and read["tokenizer_dir"] is None
    capsys.readouterr()
    main(["init", "dpo", "--output", "-", "--beta", "0.3"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["beta"] == 0.3 and not Path("dpo.yaml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the verb"),
        (["stf"], "did you mean sft"),
        (
            ["sft", "--lrr", "1"],
            "coati init sft: error: unknown flag --lrr; did you mean --lr",
        ),
        (["sft", "--lr", "-1"], "expected a number above 0"),
    ],
)
def test_init_refuses(words, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["init", *words])
    assert stop.value.code and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_comments_are_the_help():
    parser = load("sft").parser()
    text = config_text(parser, "sft", {}, None)
    said = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for action in flags_of(parser):
        assert " ".join(action.help.replace("%%", "%").split()) in said
        assert re.search(rf"^{key_of(action)}:", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "value",
    ["true", "no", "1e5", "a: b", "#x", "", "-", "plain/path_1.json", "ümlaut", 5e-6, 3, True, 0.1]
    + [["a", "1"], [0.5, 2.0], 0.00012345678, 100000.5, 1234567.0, 1e30, "\U0001f600 \u4f60"],
)
def test_values_survive_yaml(value):
    read = yaml.safe_load(f"key: {scalar(value)}")["key"]
    assert read == value


# ---- schemas


@pytest.mark.parametrize("verb", WITH_FILES)
def test_a_schema_takes_what_init_writes(verb):
    parser = load(verb).parser()
    schema = json.loads((SCHEMAS / f"{verb}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(config_text(parser, verb, {}, None)), schema)
    for action in flags_of(parser):
        assert set(schema["properties"]) >= {name[2:] for name in action.option_strings}


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 1.0},
        {"lr": -1},
        {"lr": "fast"},
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"plugin": "zero9"},
        {"use_wandb": "maybe"},
        {"nproc": 0},
        {"dataset": [["a"]]},
    ],
)
def test_a_schema_refuses_what_the_parser_refuses(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema_of(load("sft").parser()))


@pytest.mark.parametrize(
    "right",
    [{"nproc": "auto"}, {"nproc": 4}, {"dataset": "a"}, {"dataset": ["a", "b"]}, {"lr": None}],
)
def test_a_schema_takes_what_the_parser_takes(right):
    jsonschema.validate(right, schema_of(load("sft").parser()))


# ---- completion


def completed(*words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    parsers = {name: load(name).parser() for name in names()}
    script = completion_script("bash", parsers, dict.fromkeys(parsers, ""))
    line = " ".join(f"'{word}'" for word in words)
    script += f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _coati; printf '%s\\n' "
    script += '"${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_verbs_flags_and_values():
    assert completed("coati", "sc") == ["score"]
    assert completed("coati", "sft", "--lora_r") == ["--lora_rank"]
    assert completed("coati", "sft", "--plugin", "zero2") == ["zero2", "zero2_cpu"]
    assert completed("coati", "init", "dp") == ["dpo"]
    assert set(completed("coati", "chat", "--io", "")) == {"rich", "simple", "dummy"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_holds_every_flag(shell, capsys):
    main(["completion", shell])
    script = capsys.readouterr().out
    for name in names():
        for action in flags_of(load(name).parser()):
            assert all(flag.lstrip("-") in script for flag in action.option_strings)


# ---- env and cache


def test_env_names_versions_and_plugins(capsys):
    main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] and found["problems"] == []
    assert found["plugins"]["zero2"] == "fp32 fp16 bf16"
    main(["env"])
    assert f"torch {found['packages']['torch']}" in capsys.readouterr().out


def test_cache_lists_and_clears_what_is_old(monkeypatch, tmp_path, capsys):
    import os
    import time

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, days in (("old", 3), ("new", 0)):
        folder = tmp_path / "coati" / "prepared" / name
        folder.mkdir(parents=True)
        (folder / "rows").write_bytes(b"x" * 2**20)
        for path in (folder / "rows", folder):
            os.utime(path, (time.time() - days * 86400 - 60,) * 2)
    main(["cache"])
    assert "tokenized; 2 entries, 2.0 MiB" in capsys.readouterr().out
    main(["cache", "--clear", "--older_than", "2"])
    said = capsys.readouterr().out
    assert said.count("removed") == 1 and "tokenized; 1 entries, 1.0 MiB" in said
    assert [path.name for path in (tmp_path / "coati" / "prepared").iterdir()] == ["new"]
    main(["cache", "--clear"])
    assert not list((tmp_path / "coati" / "prepared").iterdir())


@pytest.mark.parametrize(
    ("flag", "files", "said"),
    [
        (
            "pretrain",
            [],
            "no config.json, so this is not a Hugging Face model directory; it holds ",
        ),
        ("pretrain", ["notes.txt"], "it holds notes.txt; name one that is"),
        ("tokenizer_dir", [], "it holds nothing"),
        ("pretrain", None, "is a file; name a Hugging Face directory"),
    ],
)
def test_a_place_without_a_model_is_refused_by_its_flag(tmp_path, capsys, flag, files, said):
    place, data = tmp_path / "m", tmp_path / "d.jsonl"
    data.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    if files is None:
        place.write_text("")
    else:
        place.mkdir()
    for name in files or ():
        (place / name).write_text("")
    given = {"pretrain": "m", "dataset": str(data), "save_dir": str(tmp_path / "o")}
    words = [
        word
        for name, value in (given | {flag: str(place)}).items()
        for word in (f"--{name}", value)
    ]
    with pytest.raises(SystemExit):
        run("rm", words)
    told = capsys.readouterr().err
    assert f"--{flag} {place}" in told and said in told and "Traceback" not in told


def test_benchmarks_are_named_before_one_runs(capsys, monkeypatch, tmp_path):
    bench = importlib.import_module("coati.recipes.verbs.bench")
    ran = []
    monkeypatch.setattr(bench, "_run", lambda program, output: ran.append(program.stem))
    with pytest.raises(SystemExit) as ended:
        run("bench", [])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and ran == []
    assert "usage: " in told and "head_memory       Peak memory" in told and "all, which" in told
    run("bench", ["data", "all", "--output", str(tmp_path)])  # which is there already
    others = [name for name in USUAL if name != "data"]
    assert ran == [f"bench_{name}" for name in ("data", *others)]
    with pytest.raises(SystemExit) as ended:
        run("bench", ["nope"])
    assert ended.value.code == 1 and "there are all, before" in capsys.readouterr().err
    run("bench", ["--list"])
    assert "head_memory       Peak memory" in capsys.readouterr().out
