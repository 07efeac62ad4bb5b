"""A limit on foreign Python code, in every thread and in children made by fork."""

import os
import threading
import time

import pytest

from coati.utils import watchdog
from coati.utils.watchdog import Overrun, interrupted_after


def endless(seconds: float) -> float:
    """Seconds until it is interrupted."""
    start = time.monotonic()
    with pytest.raises(Overrun), interrupted_after(seconds):
        while True:
            try:
                time.monotonic()
            except Exception:  # foreign code's own handler does not catch it
                continue
    return time.monotonic() - start


def test_an_endless_loop_is_ended():
    assert 0.2 <= endless(0.2) < 5


def test_in_another_thread():
    took = []
    thread = threading.Thread(target=lambda: took.append(endless(0.2)))
    thread.start()
    thread.join(10)
    assert took and 0.2 <= took[0] < 5


def test_in_a_child_made_by_fork():
    with interrupted_after(60):  # the watching thread runs here, and is not in the child
        child = os.fork()
        if not child:
            os._exit(7 if 0.2 <= endless(0.2) < 5 else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_what_is_in_time_is_left_alone():
    for _ in range(1000):
        with interrupted_after(0.5):
            pass
    time.sleep(3 * watchdog.LOOKS_S + 0.5)
    assert not watchdog._watched


def test_blocks_inside_each_other():
    with pytest.raises(Overrun), interrupted_after(0.2):
        with interrupted_after(60):
            while True:
                time.monotonic()
    assert not watchdog._watched


def test_an_error_of_the_code_itself_passes():
    with pytest.raises(ZeroDivisionError), interrupted_after(10):
        1 // 0  # noqa: B018
