"""Ctrl-C that the interpreter or a library swallows still ends what is going on."""

import os
import signal
import sys
import weakref

import pytest

from coati.utils.interrupt import check, interrupts_noted


class Thing:
    pass


def ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)


def swallowed():
    """As where a weak reference's callback is running: Python prints the error and goes on."""
    thing = Thing()
    kept = weakref.ref(thing, ctrl_c)
    del thing
    assert kept() is None


def turned_into_another():
    try:
        ctrl_c()
    except KeyboardInterrupt as error:
        raise RuntimeError("failed to import") from error


@pytest.mark.parametrize("strike", [swallowed, turned_into_another, ctrl_c])
def test_it_is_a_keyboard_interrupt_in_the_end(strike, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    with pytest.raises(KeyboardInterrupt), interrupts_noted():
        strike()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check()  # it is over
    assert shown == []  # no stack of what is no fault


def test_a_check_inside_ends_the_block_earlier():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_noted():
        swallowed()
        check()
        reached.append(1)
    assert reached == []


def test_other_errors_and_other_handlers_are_left_alone():
    with pytest.raises(ZeroDivisionError), interrupts_noted():
        raise ZeroDivisionError
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_noted():
            ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
