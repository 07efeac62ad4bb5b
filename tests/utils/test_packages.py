"""The sets of packages that run together, and the command for those that do not."""

import pytest

from coati.utils import packages
from coati.utils.packages import check_packages

TODAY = {"colossalai": "0.5.0", "torch": "2.14.1", "transformers": "5.20.2", "peft": "0.21.2"}
PINNED = {"colossalai": "0.5.0", "torch": "2.5.1", "transformers": "4.51.3", "peft": "0.13.2"}


def installed(monkeypatch, **found):
    monkeypatch.setattr(packages, "_release", found.get)


@pytest.mark.parametrize(
    "found", [TODAY, PINNED, PINNED | {"torch": "2.13.0+cpu"}, TODAY | {"torch": "2.11.0"}]
)
def test_sets_that_run(monkeypatch, found):
    installed(monkeypatch, **found)
    check_packages()


def test_without_colossalai_the_command_is_named(monkeypatch):
    installed(monkeypatch, **(TODAY | {"colossalai": None}))
    with pytest.raises(ValueError, match="run: pip install --no-deps colossalai==0.5.0$"):
        check_packages()


@pytest.mark.parametrize("old", ["torch", "peft"])
def test_an_old_package_that_colossalais_metadata_brought_back(monkeypatch, old):
    installed(monkeypatch, **(TODAY | {old: PINNED[old]}))
    with pytest.raises(ValueError, match=f"^{old} {PINNED[old]} cannot run with .*pip install -U"):
        check_packages()


def test_the_installed_set_runs():
    check_packages()
