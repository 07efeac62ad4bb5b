"""Signals during training."""

import multiprocessing
import os
import signal
import time

import pytest

from coati.trainer.stop import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once(number):
    with GracefulStop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


def test_processes_forked_meanwhile_end_by_it():
    """As those of a pool in a reward function, which is closed by SIGTERM."""
    with GracefulStop() as stop:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.1)
        child.terminate()
        child.join(10)
        code = child.exitcode
        child.kill()
    assert code == -signal.SIGTERM and not stop.requested
