"""Every recipe of examples/recipes: what it says of itself, what its parser and its schema take,
and a step of it with a tiny model of its family."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coati.cli.nearest import SCHEMAS
from coati.cli.parser import FlagError, errors_raised
from coati.parallel.footprint.fitting import RESERVED
from coati.parallel.plugin_checks import check_options
from coati.recipes.command import load
from coati.utils.resources import templates
from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run
from tests.end_to_end.inputs import ROOT, short_lines
from tests.end_to_end.online_inputs import NEW, PROMPTS
from tests.end_to_end.worker import Run
from tests.models_table.families import BY_TYPE, known, tiny_model
from tests.tiny import tiny_tokenizer
from tools.recipe_pages import (
    RECIPES,
    Recipe,
    memory_of,
    read_recipe,
    recipe_table,
    with_memory,
)

ALL = {path.stem: read_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))}
# Beginnings of hub names -> model_type in docs/models.md
FAMILIES = {
    "HuggingFaceTB/SmolLM2-": "llama",
    "Qwen/Qwen3-": "qwen3",
    "meta-llama/Llama-3.1-": "llama",
    "google/gemma-3-": "gemma3_text",
    "openai/gpt-oss-": "gpt_oss",
}
ONLINE = ("ppo", "grpo")
DATA = ("dataset", "eval_dataset", "prompt_dataset")
EXAMPLES = ROOT / "examples" / "data"
SAMPLES = {
    "sft": EXAMPLES / "sft.jsonl",
    "rm": EXAMPLES / "preference.jsonl",
    "dpo": EXAMPLES / "preference.jsonl",
    "ppo": PROMPTS,
    "grpo": EXAMPLES / "sums.jsonl",
}
SCRIPTS = {"pretrain": "pt"}  # train_pt.py
TINY = {
    "offline": {"max_length": 512, "batch_size": 2, "accumulation_steps": 2, "max_steps": 1},
    "online": {
        "max_length": 512,
        "max_seq_len": NEW,
        "num_episodes": 1,
        "num_collect_steps": 2,
        "experience_batch_size": 4,
        "train_batch_size": 2,
        "accumulation_steps": 2,
    },
}
named = pytest.mark.parametrize("name", ALL)


def family(hub_name: str) -> str:
    """The model_type of the tiny model that stands for ``hub_name``."""
    (found,) = [type for begin, type in FAMILIES.items() if hub_name.startswith(begin)]
    return found


def parsed(verb: str, *words: str):
    """The settings of ``coati VERB`` with these words; raises FlagError."""
    with errors_raised():
        return load(verb).parse(load(verb).words(list(words)), prog=f"coati {verb}")


@pytest.fixture
def alone(monkeypatch):
    """In the repository root, as no rank of a launcher."""
    monkeypatch.chdir(ROOT)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)


@named
def test_it_names_itself_its_command_and_its_output(name):
    recipe = ALL[name]
    assert recipe.command == f"coati {recipe.verb} examples/recipes/{name}.yaml"
    assert recipe.hardware and re.match(r"[\w.-]+: ", recipe.title)
    assert recipe.flags["save_dir"] == f"output/{name}"
    method = name.rpartition("_")[2]
    assert recipe.verb == {"lora": "sft"}.get(method, method)
    assert ("lora_rank" in recipe.flags) >= (method == "lora")


@named
def test_its_parser_and_its_schema_take_it(name, alone):
    recipe = ALL[name]
    settings = parsed(recipe.verb, str(recipe.path.relative_to(ROOT)))
    assert settings.model.pretrain == recipe.flags["pretrain"]
    assert settings.launch.wanted == (recipe.processes > 1)
    jsonschema.validate(recipe.flags, json.loads((SCHEMAS / f"{recipe.verb}.json").read_text()))


@named
def test_a_key_that_is_no_flag_is_refused(name, alone, tmp_path):
    recipe = ALL[name]
    text = recipe.path.read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"{text}warm_up: 3\n")
    with pytest.raises(FlagError, match=f"wrong.yaml:{text.count(chr(10)) + 1}: unknown key"):
        parsed(recipe.verb, str(wrong))
    schema = json.loads((SCHEMAS / f"{recipe.verb}.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match="warm_up"):
        jsonschema.validate(recipe.flags | {"warm_up": 3}, schema)


@named
def test_its_processes_can_be_split_as_it_says(name, alone):
    recipe = ALL[name]
    settings = parsed(recipe.verb, str(recipe.path))
    if settings.plugin is None:
        assert recipe.processes == 1
        return
    options = vars(settings.parallel) | {"plugin": settings.plugin}
    check_options(world_size=recipe.processes, **options)


def test_processes_that_its_flags_do_not_divide_are_refused(alone):
    recipe = ALL["qwen3_8b_grpo"]
    with pytest.raises(FlagError, match="7 processes cannot be divided by --tp 2"):
        parsed(recipe.verb, str(recipe.path), "--nproc", "7")


@named
def test_a_recipe_fits_its_hardware(name):
    recipe = ALL[name]
    size = re.search(r"GPUs? of (\d+) GB$", recipe.hardware)
    assert size, recipe.hardware
    guess = memory_of(recipe)
    assert guess.peak + RESERVED <= int(size[1]) * 10**9
    assert recipe.memory.startswith(f"{guess.peak / 2**30:.1f} GiB")


@named
def test_what_it_names_is_there(name):
    flags = ALL[name].flags
    for key in DATA:
        paths = flags.get(key, [])
        for path in paths if isinstance(paths, list) else [paths]:
            assert (ROOT / path).is_file(), path
    table = (ROOT / "docs" / "models.md").read_text()
    assert f"| `{family(flags['pretrain'])}` |" in table
    assert flags["conversation_template_config"] in templates()
    for other in re.findall(r"output/([\w.]+)/modeling", ALL[name].path.read_text()):
        assert other in ALL, other
    for document in re.findall(r"docs/\w+\.md", ALL[name].path.read_text()):
        assert (ROOT / document).is_file(), document


def test_ppo_starts_from_the_recipe_of_its_reward_model():
    for recipe in [one for one in ALL.values() if one.verb == "ppo"]:
        judge = ALL[Path(recipe.flags["rm_pretrain"]).parent.name]
        assert judge.verb == "rm" and recipe.flags["rm_pretrain"].endswith("/modeling")
        assert judge.flags["pretrain"] == recipe.flags["pretrain"]
        assert bool(judge.flags.get("lora_rank")) == bool(recipe.flags.get("shared_base"))


def test_the_sums_are_the_sample_prompts_with_a_result():
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    sums = [json.loads(line) for line in (EXAMPLES / "sums.jsonl").read_text().splitlines()]
    assert sums == [row for row in rows if row.get("gt_answer")] and len(sums) == 120


def test_a_file_that_begins_otherwise_is_refused(tmp_path):
    text = ALL["qwen3_0.6b_sft"].path.read_text()
    file = tmp_path / "a.yaml"
    for old, new in (("# Hardware:", "# Machine:"), ("# yaml-language-server", "# schema")):
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="a.yaml: expected a line with the schema"):
            read_recipe(file)
    file.write_text(text.replace("schemas/sft.json", "schemas/dpo.json"))
    with pytest.raises(ValueError, match="its schema is .*dpo.json, its command coati sft"):
        read_recipe(file)


def test_an_estimate_takes_the_place_of_another(tmp_path):
    recipe = ALL["qwen3_0.6b_sft"]
    text = with_memory(with_memory(recipe.path.read_text(), "1 GB"), r"9 GB \1")
    (tmp_path / "a.yaml").write_text(text.replace("../../", f"{ROOT}/"))
    again = read_recipe(tmp_path / "a.yaml")
    assert again.memory == r"9 GB \1"
    assert dataclasses.replace(again, path=recipe.path, memory=recipe.memory) == recipe


def test_the_table_has_a_line_for_each():
    lines = recipe_table().splitlines()[2:]
    assert [line.split("](")[0].lstrip("| [") for line in lines] == [f"{name}.yaml" for name in ALL]
    assert (
        "| [qwen3_4b_lora.yaml](qwen3_4b_lora.yaml) | Qwen/Qwen3-4B | sft, LoRA | 1 GPU of 24 GB "
        "| `coati sft examples/recipes/qwen3_4b_lora.yaml` |"
    ) in lines
    assert recipe_table() in (RECIPES / "README.md").read_text()


def runs_here(recipe: Recipe) -> bool:
    """Whether the installed set trains the family, split as the recipe asks: ColossalAI alone, in
    the pinned set, splits none that is newer than it."""
    whole = "tp" not in recipe.flags
    return known(BY_TYPE[family(recipe.flags["pretrain"])]) and (whole or transformers_major() > 4)


RUNNABLE = [name for name, recipe in ALL.items() if runs_here(recipe)]
run_each = pytest.mark.parametrize("name", RUNNABLE)


def test_only_what_is_newer_than_the_pinned_set_is_not_run():
    left_out = {family(ALL[name].flags["pretrain"]) for name in set(ALL) - set(RUNNABLE)}
    assert not left_out or (transformers_major() < 5 and "llama" not in left_out)


def stand_in(
    recipe, model: str, data: dict[str, dict[str, Any]], folder: Path
) -> dict[str, object]:
    """The flags that differ between a recipe and its run here."""
    flags = recipe.flags
    online = recipe.verb in ONLINE
    changed = {"pretrain": model, "save_dir": str(folder / recipe.path.stem)}
    changed |= TINY["online" if online else "offline"]
    changed |= {key: path for key, path in data[recipe.verb].items() if key in flags}
    half = flags.get("plugin") == "gemini" or flags.get("zero_stage")
    changed["mixed_precision"] = "bf16" if half else "fp32"
    if "rm_pretrain" in flags:
        changed["rm_pretrain"] = flags["rm_pretrain"].replace("output", str(folder))
    if recipe.verb == "grpo":
        # No response of a random model is right: equal scores would leave nothing to learn.
        changed |= {"num_generations": 4, "reward_functions": ["math_competition", "length"]}
    if "overlong_buffer_len" in flags:
        changed["overlong_buffer_len"] = NEW // 2
    return changed


def words_of(flags: dict[str, object]) -> list[str]:
    """A command line of ``flags``."""
    words = []
    for key, value in flags.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def write_tiny(folder: Path, type: str) -> str:
    """The directory of a tiny model with room for the responses that an evaluation samples."""
    tiny_model(BY_TYPE[type], max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(folder: Path, file: Path) -> dict[str, str]:
    """Short rows of a sample: to train on and, fewer, to evaluate on."""
    folder.mkdir()
    rows = {"eval_dataset": (0, 4), "dataset": (4, 16), "prompt_dataset": (4, 40)}
    for key, lines in rows.items():
        (folder / f"{key}.jsonl").write_text(short_lines(*lines, file), encoding="utf-8")
    return {key: str(folder / f"{key}.jsonl") for key in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """({name: flags that were changed}, {name: how each rank ended}). Runs in as many
    processes share a process group; those of reward models come before those that need them."""
    folder = tmp_path_factory.mktemp("recipes")
    recipes = {name: ALL[name] for name in RUNNABLE}
    types = {family(recipe.flags["pretrain"]) for recipe in recipes.values()}
    models = {type: write_tiny(folder / type, type) for type in types}
    data: dict[str, dict[str, Any]] = {
        verb: write_rows(folder / verb, file) for verb, file in SAMPLES.items()
    }
    texts = {"eval_dataset": str(EXAMPLES / "text_eval.txt")}
    data["pretrain"] = texts | {"dataset": [str(EXAMPLES / "text.txt"), data["sft"]["dataset"]]}
    changed = {}
    groups: dict[int, dict[str, Run]] = {}
    for name, recipe in sorted(recipes.items(), key=lambda item: item[1].verb in ONLINE):
        model = models[family(recipe.flags["pretrain"])]
        changed[name] = stand_in(recipe, model, data, folder)
        words = [str(recipe.path), *words_of(changed[name])]
        group = groups.setdefault(recipe.flags.get("tp", 1), {})
        script = f"train_{SCRIPTS.get(recipe.verb, recipe.verb)}.py"
        group[name] = Run(words, script=script)
    env = {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder / "cache")}
    ended = {}
    for processes, members in groups.items():
        ranks = run(processes, "tests.end_to_end.worker:train_each", members, env=env, timeout=240)
        ended |= {name: [rank[name] for rank in ranks] for name in members}
    return changed, ended


@run_each
def test_it_trains_a_tiny_model_of_its_family(runs, name):
    changed, ended = runs
    recipe = ALL[name]
    assert len(ended[name]) == recipe.flags.get("tp", 1)
    assert not any(rank.code for rank in ended[name]), ended[name][0].err
    out = Path(changed[name]["save_dir"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    values = [value for line in lines for value in line.values()]
    assert all(math.isfinite(value) for value in values if isinstance(value, float))
    (norm,) = [line["train/grad_norm"] for line in lines if "train/grad_norm" in line]
    assert norm > 0
    saved = out / "actor" / "modeling" if recipe.verb in ONLINE else out / "modeling"
    adapter = (saved / "adapter_model.safetensors").is_file()
    assert adapter == bool(recipe.flags.get("lora_rank"))
    assert json.loads((saved / "conversation_template.json").read_text())["chat_template"]


@run_each
def test_what_was_not_made_smaller_held(runs, name):
    changed, _ = runs
    held = json.loads((Path(changed[name]["save_dir"]) / "arguments.json").read_text())
    kept = {key: value for key, value in ALL[name].flags.items() if key not in changed[name]}
    assert len(kept) > 2 and {key: held[key] for key in kept} == kept
