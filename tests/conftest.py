"""What no test module may leave to those after it."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """The functions of the front door start a process group, which stays for the next call, as in
    a notebook. Other modules start their own, or expect none."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        from coati.parallel.launch import shut_down

        shut_down()
