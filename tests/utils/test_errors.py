"""Code that is not the library's cannot end a run as a success."""

import os
import sys
from pathlib import Path

import pytest

from coati.utils.errors import EARLY, RunFailed, no_early_exit, no_silent_exit, raised_at

HERE = Path(__file__).name


class Mine(BaseException):
    """No Exception, so that handlers of Exception let it through."""


def ended(error: BaseException) -> str:
    with pytest.raises(RunFailed) as failure, no_early_exit("Spy.on_step"):
        raise error
    return str(failure.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(0), "sys.exit(0)"),
        (SystemExit(None), "sys.exit()"),
        (SystemExit(3), "sys.exit(3)"),
        (SystemExit("done"), "sys.exit('done')"),
        (GeneratorExit(), "GeneratorExit"),
        (Mine("enough"), "Mine: enough"),
    ],
)
def test_what_is_no_exception_becomes_a_failure_with_its_place(error, said):
    text = ended(error)
    assert text.startswith(f"Spy.on_step was ended early by {said} at ")
    assert HERE in text and text.rsplit(":", 1)[1].isdigit()


def test_an_exit_deep_in_a_library_of_others():
    import argparse

    with pytest.raises(RunFailed, match=r"sys\.exit\(0\) at .*argparse\.py"):
        with no_early_exit():
            argparse.ArgumentParser().exit()


def test_the_library_s_own_exits_and_all_exceptions_pass():
    from coati.recipes.command import _fail

    with pytest.raises(SystemExit) as stop, no_early_exit():
        _fail("coati: error: as it should be", 2)
    assert stop.value.code == 2
    with pytest.raises(ZeroDivisionError), no_early_exit():
        1 // 0  # noqa: B018


def test_ctrl_c_passes_and_a_raised_interrupt_does_not():
    with pytest.raises(RunFailed, match="KeyboardInterrupt at"), no_early_exit():
        raise KeyboardInterrupt
    kind = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), no_early_exit():  # as the handler of a signal would
        raise kind


def test_the_place_of_an_error():
    try:
        sys.exit(1)
    except SystemExit as error:
        place = raised_at(error)
    assert place.rpartition(":")[0].endswith(HERE)
    assert raised_at(ValueError()) == ""


def test_an_exit_that_no_handler_sees_is_a_failure(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    said = []
    with no_silent_exit(said.append):
        os._exit(0)
        os._exit(3)
    os._exit(0)
    assert codes == [EARLY, 3, 0]
    assert len(said) == 1 and "os._exit(0) at" in said[0] and __file__ in said[0]


def test_a_child_made_by_fork_may_leave_so():
    with no_silent_exit(lambda said: 1 / 0):
        child = os.fork()
        if not child:
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
