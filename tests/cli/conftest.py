import pytest

from coati.utils.logging import forget_warnings


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """A clean launcher environment, and notices that have not been said yet."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    forget_warnings()


@pytest.fixture
def data(tmp_path):
    """Paths that exist, under the names that documented commands use."""
    (tmp_path / "arrow").mkdir()
    (tmp_path / "raw.json").write_text("[]")
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "config.json").write_text("{}")
    names = {
        "dataset": "arrow",
        "RAW_DATASET": "raw.json",
        "PREFERENCE_DATASET": "arrow",
        "prompt_dataset": "arrow",
        "ptx_dataset": "arrow",
        "CONVERSATION_TEMPLATE_CONFIG_PATH": "rm/config.json",
        "REWARD_MODEL_PATH": "rm",
    }
    free = (
        "SFT_MODEL_PATH",
        "PRETRAINED_MODEL_PATH",
        "PRETRAINED_TOKENIZER_PATH",
        "SAVE_DIR",
        "CONFIG_FILE",
    )
    return {name: str(tmp_path / path) for name, path in names.items()} | {
        name: f"some/{name}" for name in free
    }


@pytest.fixture
def refused(capsys):
    """Calls with a list of words that must be refused; returns what the user reads."""

    def call(function, words):
        with pytest.raises(SystemExit) as stop:
            function(words)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return call
