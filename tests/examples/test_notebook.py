"""The tour runs from its first cell to its last, and is kept without results of somebody's
machine."""

import json
import re
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "notebooks" / "coati_tour.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert cell["cell_type"] == "markdown" or (
            cell["outputs"] == [] and cell["execution_count"] is None
        )
    assert not re.search(
        r"(?<![\w.])/(?:tmp|home|root|Users|mnt|work)/\w", FILE.read_text(encoding="utf-8")
    )


def test_the_notebook_runs(tmp_path, monkeypatch):
    for name in ("COATI_TOUR_MODEL", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(FILE, as_version=4)
    nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(FILE.parent)}}
    ).execute()
    told = "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in book.cells
        for output in cell.get("outputs", [])
    )
    assert "[[" in told and "assistant" in told  # the supervised part, and the history
    losses = [float(text) for text in re.search(r"losses \[(.*?)\]", told)[1].split(",")]
    assert len(losses) == 3
    before, after = map(
        float, re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", told).groups()
    )
    assert after < before
