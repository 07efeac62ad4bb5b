"""Workers for test_spawn."""

import os
import time


def where() -> tuple[str, str, str]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("EXTRA", "")


def first_fails(pids: str) -> None:
    """Rank 0 raises once rank 1 has written its process id and gone to sleep."""
    if os.environ["RANK"] == "1":
        with open(pids, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)
    while not os.path.exists(pids):
        time.sleep(0.05)
    raise ValueError("rank 0 has had enough")


def sleep_on() -> None:
    time.sleep(60)
