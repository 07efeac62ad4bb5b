"""What coati pretrain says of packs that it makes without being asked."""

import pytest

from coati.cli.pretraining import parse_pretrain
from coati.recipes import run
from coati.recipes.verbs.pretrain import main


@pytest.mark.parametrize("written", [(), ("--packing",)], ids=["default", "asked for"])
def test_who_did_not_ask_for_packs_is_told_how_to_go_without(tmp_path, monkeypatch, written):
    def refuse(*_, **__):
        raise ValueError("--packing: this bloom model does not; drop --packing")

    monkeypatch.setattr(run, "start", refuse)
    settings = parse_pretrain(["--pretrain", "m", "--dataset", str(tmp_path), *written])
    with pytest.raises(ValueError, match="this bloom model") as error:
        main(settings)
    assert ("--packing false trains on them one by one" in str(error.value)) == (not written)
