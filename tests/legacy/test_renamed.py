"""Modules and names of earlier releases still import, with a warning that names today's."""

import subprocess
import sys
from importlib import import_module

import pytest

from coati.legacy.renamed import MODULES, NAMES


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_module_is_todays(old):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MODULES[old]}"):
        sys.modules.pop(old, None)
        found = import_module(old)
    today = import_module(MODULES[old])
    assert today.__spec__.name == MODULES[old]
    if old in NAMES:
        name = next(name for name in vars(today) if not name.startswith("_"))
        assert getattr(found, name) is getattr(today, name)
    else:
        assert found is today


@pytest.mark.parametrize(
    "package, old", [(package, old) for package, names in NAMES.items() for old in names]
)
def test_an_old_name_is_todays(package, old):
    module, name = NAMES[package][old]
    with pytest.warns(DeprecationWarning, match=f"{old} is now {module}.{name}"):
        assert getattr(import_module(package), old) is getattr(import_module(module), name)


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="coati.trainer.never_was"):
        import_module("coati.trainer.never_was")
    with pytest.raises(AttributeError, match="never_was"):
        _ = import_module("coati.trainer").never_was


def test_from_an_old_module_in_a_fresh_process():
    program = (
        "from coati.trainer.bar import ProgressBar; import coati.trainer.progress as new; "
        "assert ProgressBar is new.ProgressBar; from coati.trainer.schedule import RunSchedule"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_renamed_package_s_modules_are_loaded_once():
    program = (
        "import coati.parallel.cpu.adam as old; import coati.parallel.compat.cpu.adam as new; "
        "assert old is new; from coati.parallel.cpu.heap import keep_freed_memory"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
