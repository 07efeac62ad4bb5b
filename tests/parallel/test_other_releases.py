"""Checkpoints and prepared rows of another set of packages: used where they are the same, refused
or begun anew by name where they are not."""

from types import SimpleNamespace

import pytest

from coati.dataset.metadata import describe_tokenizer, probe_tokens
from coati.parallel import checkpoint
from coati.parallel.checkpoint import RunningState
from coati.parallel.options import ParallelOptions
from coati.recipes.run import _check_same_vocabulary
from coati.utils.logging import forget_warnings
from tests.tiny import tiny_llama, tiny_tokenizer

FOUR = {"torch": "2.5.1", "transformers": "4.51.3", "peft": "0.13.2"}
FIVE = {"torch": "2.14.1", "transformers": "5.20.2", "peft": "0.21.2"}


@pytest.fixture
def installed(monkeypatch, request):
    monkeypatch.setattr(checkpoint, "releases", lambda: FIVE)
    forget_warnings()


def engine(model=None, **options):
    return SimpleNamespace(options=ParallelOptions(**options), module=model or tiny_llama())


def test_the_same_releases_say_nothing(installed, capsys):
    assert checkpoint._other_set(RunningState(packages=FIVE), engine()) == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("packages", [FOUR, {}], ids=["pinned", "of a release that did not say"])
def test_another_set_is_told_once_and_goes_on(installed, capsys, packages):
    state = RunningState(packages=packages)
    assert checkpoint._other_set(state, engine()) == {}
    checkpoint._other_set(state, engine())
    said = capsys.readouterr().err
    assert said.count("transformers 4.51.3 -> 5.20.2") == 1 and "exact up to the rounding" in said


def test_where_layers_are_held_otherwise_the_optimizer_state_is_another(installed):
    state = RunningState(packages=FOUR)
    pair = {"transformers": ("4.51.3", "5.20.2")}
    assert checkpoint._other_set(state, engine(plugin="3d", tp=2)) == pair
    experts = SimpleNamespace(
        named_parameters=lambda: [
            ("layers.0.mlp.experts.down_proj", SimpleNamespace(dim=lambda: 3))
        ]
    )
    assert checkpoint._other_set(state, engine(experts)) == pair
    newer = RunningState(packages=FIVE | {"transformers": "5.19.0"})
    assert checkpoint._other_set(newer, engine(plugin="3d", tp=2)) == {}


def prepared(tokenizer, **changes):
    return {"tokenizer": describe_tokenizer(tokenizer, "there", "") | changes}


def test_rows_are_used_if_the_tokenizer_splits_a_text_alike():
    tokenizer = tiny_tokenizer()
    _check_same_vocabulary(tokenizer, prepared(tokenizer))
    old = prepared(tokenizer)
    del old["tokenizer"]["probe"]  # of a release that stored none
    _check_same_vocabulary(tokenizer, old)


def test_otherwise_the_first_token_that_differs_is_named():
    tokenizer = tiny_tokenizer()
    ids = probe_tokens(tokenizer)
    other = [*ids[:3], ids[3] + 1, *ids[4:]]
    names = [tokenizer.convert_ids_to_tokens(token) for token in (other[3], ids[3])]
    with pytest.raises(ValueError) as error:
        _check_same_vocabulary(tokenizer, prepared(tokenizer, probe=other))
    assert f"token 3 is {names[0]!r} there and {names[1]!r} with" in str(error.value)
    with pytest.raises(ValueError, match=f"token {len(ids) - 1} is 'nothing' there"):
        _check_same_vocabulary(tokenizer, prepared(tokenizer, probe=ids[:-1]))
