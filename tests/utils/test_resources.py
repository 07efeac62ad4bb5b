"""The files that come with coati, found by name in a checkout and in an installed package."""

import json
from pathlib import Path

import pytest

from coati.utils import resources
from coati.utils.resources import (
    config_path,
    near_recipes,
    recipe_path,
    recipes,
    template_path,
    templates,
)

ROOT = Path(__file__).parents[2]
GEMMA = ROOT / "config" / "conversation_template" / "google_gemma-3-4b-it.json"


def test_a_checkout_has_them_in_config():
    assert set(templates()) == {path.stem for path in GEMMA.parent.iterdir()}
    assert set(recipes().values()) == set((ROOT / "examples" / "recipes").rglob("*.yaml"))
    assert json.loads(config_path("lora_config.json").read_text())["r"] == 32
    assert config_path("hostfile.example").read_text() == "node1\nnode2\n"
    with pytest.raises(ValueError, match="^lora.json: .*hostfile.example, lora_config.json$"):
        config_path("lora.json")


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    """Folders of the same names beside it, in site-packages, are another package's."""
    (tmp_path / "coati" / "config" / "conversation_template").mkdir(parents=True)
    (tmp_path / "coati" / "examples" / "recipes" / "sft").mkdir(parents=True)
    (tmp_path / "config" / "conversation_template").mkdir(parents=True)
    (tmp_path / "config" / "conversation_template" / "theirs.json").touch()
    ours = tmp_path / "coati" / "config" / "conversation_template" / "ours.json"
    ours.touch()
    (tmp_path / "coati" / "examples" / "recipes" / "sft" / "small.yaml").touch()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "coati")
    assert templates() == {"ours": ours}
    assert list(recipes()) == ["sft/small"]


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_0.6b_sft",
        "qwen3_0.6b_sft.yaml",
        "examples/recipes/qwen3_0.6b_sft.yaml",
    ],
)
def test_a_recipe_by_its_name_unless_there_is_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path(name) == ROOT / "examples" / "recipes" / "qwen3_0.6b_sft.yaml"
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).touch()
    assert recipe_path(name) is None


def test_a_name_that_is_no_recipe_has_near_ones():
    assert recipe_path("elsewhere/qwen3_0.6b_sft.yaml") is None
    assert recipe_path("qwen3_0.6b") is None and recipe_path("") is None
    assert near_recipes("a/qwen3_0.6b_stf.yaml")[0] == "qwen3_0.6b_sft"
    assert near_recipes("run.yaml") == []


@pytest.mark.parametrize(
    "name", ["google_gemma-3-4b-it", "google/gemma-3-4b-it", "Google/Gemma-3-4B-it"]
)
def test_a_template_by_its_name_or_the_hubs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert template_path(name) == template_path(name, may_be_new=True) == GEMMA


def test_a_file_that_is_there_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("llama2").write_text("{}")
    assert template_path("llama2") == Path("llama2")
    Path("tiny-llama").mkdir()
    assert template_path("tiny-llama") == GEMMA.with_name("tiny-llama.json")


def test_what_ends_in_json_is_a_file_and_never_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert template_path("llama2.json", may_be_new=True) == Path("llama2.json")
    with pytest.raises(ValueError, match=r"^llama2\.json: no such file, .*did you mean llama2"):
        template_path("llama2.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("google/gemma-3-27b-it", "gemma-3-27b-it: no such file, .*google_gemma-3-4b-it"),
        ("qwen3-8b", "did you mean .*Qwen_Qwen3-8B"),
        ("zzz", "expected a JSON file or one of 01-ai_Yi-1.5-9B-Chat, .*zai-org_GLM-4.5-Air$"),
        (".", r"^\.: is a directory, and no conversation template"),
    ],
)
@pytest.mark.parametrize("may_be_new", [False, True])
def test_a_name_that_is_none_is_answered_with_near_ones(
    given, message, may_be_new, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        template_path(given, may_be_new)
