"""What ``import coati`` offers: every name leads somewhere; nothing is loaded before its use."""

import subprocess
import sys

import pytest

import coati


@pytest.mark.parametrize("name", coati.__all__)
def test_every_name_is_there(name):
    found = getattr(coati, name)
    assert callable(found) and found.__name__ == name and found.__module__.startswith("coati.")


def test_importing_it_loads_nothing_heavy():
    heavy = ("torch", "transformers", "colossalai", "datasets", "peft", "numpy")
    program = f"import sys, coati; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = coati.Trainer
