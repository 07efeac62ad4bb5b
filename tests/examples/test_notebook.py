"""The notebooks run from their first cell to their last, and are kept without results of somebody's
machine."""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.end_to_end.inputs import write_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = ("coati_tour", "sft_lora", "dpo", "grpo")


def test_every_notebook_is_run_here():
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_kept_without_outputs(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    for cell in json.loads(text)["cells"]:
        assert cell["cell_type"] == "markdown" or (
            cell["outputs"] == [] and cell["execution_count"] is None
        )
    assert not re.search(r"(?<![\w.])/(?:tmp|home|root|Users|mnt|work)/\w", text)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """``told(name)``: what the notebook says to a reader when it runs on a tiny model, in a folder
    of its own."""
    for name in ("COATI_TOUR_MODEL", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COATI_MODEL", write_model(tmp_path / "model"))

    def run(name: str, place: Path = tmp_path) -> str:
        book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(place)}}
        nbclient.NotebookClient(book, timeout=300, resources=resources).execute()
        return "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for cell in book.cells
            for output in cell.get("outputs", [])
            if output.get("name") != "stderr"
        )

    return run


def test_the_tour_runs(told):
    text = told("coati_tour", FOLDER)
    assert "[[" in text and "assistant" in text  # the supervised part, and the history
    losses = [float(loss) for loss in re.search(r"losses \[(.*?)\]", text)[1].split(",")]
    assert len(losses) == 3
    perplexities = re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", text).groups()
    before, after = map(float, perplexities)
    assert after < before


def test_supervised_fine_tuning_with_lora(told, tmp_path):
    text = told("sft_lora")
    first, last = re.search(r"loss ([\d.]+) in the first step, ([\d.]+) in the last", text).groups()
    assert float(last) < float(first)
    saved = Path(re.search(r"saved in (.+)", text)[1])
    assert (saved / "adapter_model.safetensors").is_file()
    assert (tmp_path / "output" / "sft" / "001" / "metrics.jsonl").is_file()


def test_preferences(told):
    text = told("dpo")
    evaluated = re.findall(r"step (\d+): accuracy ([\d.]+), margin ([-\d.]+)", text)
    assert evaluated[0] == ("0", "0.50", "0.000")
    assert float(evaluated[-1][2]) > 0
    assert "stopped before the last step: " in text


def test_a_reward_function(told):
    text = told("grpo")
    seen = re.findall(r"episode (\d): reward ([-\d.]+)", text)
    assert [number for number, _ in seen] == list("12345678")
    rewards = re.search(r"rewards \[(.*?)\]", text)[1].split(", ")
    assert [float(reward) for reward in rewards] == [float(reward) for _, reward in seen]
