"""The wheel in an environment outside the checkout: the command, its files, and runs."""

import json
import re

import pytest

from coati import __version__
from tests.package import environments

TEMPLATES = len(list((environments.ROOT / "config" / "conversation_template").iterdir()))
SAID = "ColossalAI is not installed, which trains and splits the models; run: "
COMMAND = "pip install --no-deps colossalai==0.5.0"


def test_the_installed_package_is_what_runs(outside):
    where = outside.python("import coati; print(coati.__file__, coati.__version__)").split()
    assert where[0].startswith(str(outside.folder)) and where[1] == __version__


def test_its_templates_are_found_by_name(outside):
    program = (
        "from coati.utils.resources import config_path, template_path, templates\n"
        "print(len(templates()), template_path('google/gemma-3-4b-it'))\n"
        "print(config_path('lora_config.json'))"
    )
    count, gemma, lora = outside.python(program).split()
    assert int(count) == TEMPLATES
    for path in (gemma, lora):
        assert path.startswith(str(outside.folder)) and json.loads(open(path).read())


def test_the_command_tells_about_the_environment(outside):
    assert __version__ in outside.run("coati", "env").stdout


def test_a_configuration_is_written_and_trains(outside, model):
    outside.run("coati", "init", "sft")
    out = environments.train(outside, model, "sft.yaml")
    assert (out / "modeling" / "config.json").is_file()
    template = json.loads((out / "modeling" / "conversation_template.json").read_text())
    assert template["response_format_tags"], "the template that was named, not the tokenizer's own"


@pytest.fixture(scope="session")
def incomplete(built, tmp_path_factory):
    """The wheel as ``pip install`` leaves it: ColossalAI is not there yet."""
    folder = tmp_path_factory.mktemp("incomplete")
    return environments.installed(built[0], folder, without="colossalai")


OFFLINE = ("sft", "pretrain", "rm", "dpo", "orpo", "kto", "gkd", "ilql")
ONLINE = ("ppo", "grpo", "online-dpo")


@pytest.mark.parametrize("verb", [*OFFLINE, *ONLINE])
def test_training_without_colossalai_names_the_command_at_once(incomplete, verb):
    """Before torch, whose import takes seconds."""
    data = "--prompt_dataset" if verb in ONLINE else "--dataset"
    words = [verb, "--pretrain", "any", data, ".", "--save_dir", "out"]
    if verb in ONLINE:
        words += ["--reward_functions", "format_reward"]
    words += ["--teacher", "any"] * (verb == "gkd")
    run = incomplete.run("python", "-X", "importtime", "-m", "coati", *words, code=2)
    said = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert said[-1] == f"coati {verb}: error: {SAID}{COMMAND}"
    assert re.search(r"\| +coati\.cli", run.stderr) and not re.search(r"\| +torch\n", run.stderr)
    assert not (incomplete.work / "out").exists()
