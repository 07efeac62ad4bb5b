"""One process at a time in a directory: who is told what, and what is left by those that are
gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from coati.utils import dir_lock
from coati.utils.dir_lock import NAME, DirLock, Holder, Locked
from tests.laws import ROOT

HOLD = """
import sys, time
from coati.utils.dir_lock import DirLock
lock = DirLock(sys.argv[1], "--save_dir")
try:
    lock.acquire()
    print("held", flush=True)
    time.sleep(60)
finally:
    lock.release()
"""


@pytest.fixture
def quick(monkeypatch):
    """Beats of 0.1 s, stale after 0.6 s."""
    monkeypatch.setattr(dir_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(dir_lock, "STALE_S", 0.6)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def held(folder: Path) -> Holder:
    return Holder(**json.loads((folder / NAME).read_text()))


def leave(folder: Path, age: float = 0.0, **changes) -> Holder:
    """A lock of a process that cannot be asked, last touched ``age`` seconds ago."""
    folder.mkdir(exist_ok=True)
    left = replace(Holder.here(folder), host="elsewhere", boot="other", **changes)
    (folder / NAME).write_text(json.dumps(asdict(left)))
    then = time.time() - age
    os.utime(folder / NAME, (then, then))
    return left


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_says_who_and_leaves_nothing(tmp_path):
    lock = DirLock(tmp_path / "new" / "deep", "--save_dir")
    lock.acquire()
    found = held(tmp_path / "new" / "deep")
    assert (found.pid, found.folder) == (os.getpid(), str(tmp_path / "new" / "deep"))
    assert found.lives and names(tmp_path / "new" / "deep") == [NAME]
    lock.release()
    assert names(tmp_path / "new" / "deep") == []
    lock.release()


def test_a_second_process_is_told_who_holds_it(tmp_path, holder):
    with pytest.raises(Locked) as error:
        DirLock(tmp_path, "--save_dir").acquire()
    found = held(tmp_path)
    for part in (
        f"--save_dir {tmp_path}",
        found.host,
        f"process {holder.pid}",
        found.since,
        "kill",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and names(tmp_path) == [NAME]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_asked_to_end_gives_it_back(tmp_path, holder, number):
    holder.send_signal(number)
    assert holder.wait(10) != 0
    assert names(tmp_path) == []


def test_a_child_made_by_fork_ends_by_sigterm_and_leaves_the_lock(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        lock = DirLock(tmp_path, "--save_dir")
        lock.acquire()
        ready, begun = os.pipe()  # a signal during the fork itself is lost in Python
        child = os.fork()
        if not child:
            os.write(begun, b"1")
            time.sleep(30)
            os._exit(5)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM and names(tmp_path) == [NAME]
        lock.release()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_killed_process_left_is_recognized_at_once(tmp_path, holder, capsys):
    holder.kill()  # not waited for: the process is there still, as a zombie
    time.sleep(0.2)
    began = time.monotonic()
    lock = DirLock(tmp_path, "--save_dir")
    lock.acquire()
    assert time.monotonic() - began < 2 and held(tmp_path).pid == os.getpid()
    said = capsys.readouterr().err
    assert f"process {holder.pid}" in said and said.count("taken over") == 1
    lock.release()


def test_another_process_with_the_id_of_one_that_is_gone_does_not_hold_it(tmp_path):
    left = replace(Holder.here(tmp_path), began="12")
    (tmp_path / NAME).write_text(json.dumps(asdict(left)))
    lock = DirLock(tmp_path, "--save_dir")
    lock.acquire()
    lock.release()


def test_the_lock_in_a_copy_of_the_directory_counts_for_nothing(tmp_path):
    lock = DirLock(tmp_path / "run", "--save_dir")
    lock.acquire()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    other = DirLock(tmp_path / "copy", "--save_dir")
    other.acquire()
    with pytest.raises(Locked):
        DirLock(tmp_path / "run", "--save_dir").acquire()
    other.release()
    lock.release()


def test_one_of_another_host_that_is_touched_is_held(tmp_path, quick):
    leave(tmp_path)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.1):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=touch)
    thread.start()
    said: list[str] = []
    try:
        with pytest.raises(Locked, match="on elsewhere, process"):
            DirLock(tmp_path, "--save_dir", said.append).acquire()
    finally:
        stop.set()
        thread.join()
    assert len(said) == 1 and "waiting up to 0.6 s" in said[0]


def test_one_of_another_host_that_is_silent_is_taken_over_in_time(tmp_path, quick):
    leave(tmp_path)
    began = time.monotonic()
    lock = DirLock(tmp_path, "--save_dir", lambda text: None)
    lock.acquire()
    assert 0.4 < time.monotonic() - began < 5 and held(tmp_path).host != "elsewhere"
    lock.release()


def test_one_that_has_long_been_silent_is_taken_over_at_once(tmp_path):
    leave(tmp_path, age=3600)
    lock = DirLock(tmp_path, "--save_dir", lambda text: pytest.fail("it waits"))
    lock.acquire()
    lock.release()


def test_one_that_another_takes_over_meanwhile_is_that_ones(tmp_path, monkeypatch):
    """It is named at once: a touch of its file is none of the holder that was read before."""
    leave(tmp_path)
    read = DirLock._read

    def just_before_it_was_taken_over(self):
        found = read(self)
        if found.host == "elsewhere":
            (tmp_path / NAME).write_text(json.dumps(asdict(Holder.here(tmp_path))))
        return found

    monkeypatch.setattr(DirLock, "_read", just_before_it_was_taken_over)
    with pytest.raises(Locked, match=f"in use by .*process {os.getpid()}"):
        DirLock(tmp_path, "--save_dir", lambda text: pytest.fail("it waits")).acquire()


def test_of_many_that_take_a_lock_over_one_does(tmp_path):
    """Each in a thread of its own; those that lose see the winner's process, which lives."""
    for _ in range(5):
        leave(tmp_path, age=3600)
        locks = [DirLock(tmp_path, "--save_dir") for _ in range(8)]
        gate = threading.Barrier(len(locks))
        won: list[DirLock] = []
        told: list[str] = []

        def race(lock: DirLock, gate=gate, won=won, told=told) -> None:
            gate.wait()
            try:
                lock._acquire()
                won.append(lock)
            except Locked as error:
                told.append(str(error))

        threads = [threading.Thread(target=race, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and len(told) == 7
        won[0].release()
        assert names(tmp_path) == []


def test_it_is_touched_while_it_is_held(tmp_path, quick):
    lock = DirLock(tmp_path, "--save_dir")
    lock.acquire()
    os.utime(tmp_path / NAME, (0, 0))
    time.sleep(0.4)
    assert time.time() - os.stat(tmp_path / NAME).st_mtime < 10
    lock.release()


def test_one_that_was_taken_away_ends_its_process(tmp_path, quick):
    lock = DirLock(tmp_path, "--save_dir")
    lock.acquire()
    leave(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(5)
    lock.release()
    assert held(tmp_path).host == "elsewhere"  # not this process's to remove
    time.sleep(0.7)


def test_one_that_was_removed_by_hand_is_written_again(tmp_path, quick, capsys):
    lock = DirLock(tmp_path, "--save_dir")
    lock.acquire()
    (tmp_path / NAME).unlink()
    time.sleep(0.4)
    assert held(tmp_path).pid == os.getpid()
    with pytest.raises(Locked):
        DirLock(tmp_path, "--save_dir").acquire()
    lock.release()
    assert names(tmp_path) == []
    assert capsys.readouterr().err.count("was removed while its run goes on") == 1


def test_without_hard_links(tmp_path, monkeypatch, holder):
    def link(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(Locked):
        DirLock(tmp_path, "--save_dir").acquire()
    lock = DirLock(tmp_path / "other", "--save_dir")
    lock.acquire()
    assert held(tmp_path / "other").pid == os.getpid()
    lock.release()


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save_dir .*/file: cannot be written"):
        DirLock(tmp_path / "file", "--save_dir").acquire()


def test_a_file_that_is_no_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dir_lock, "ATTEMPTS", 1)
    (tmp_path / NAME).write_text("{")
    with pytest.raises(ValueError, match="is not a lock of this library; remove it"):
        DirLock(tmp_path, "--save_dir").acquire()


def test_a_lock_beside_what_it_locks(tmp_path):
    path = tmp_path / ".model.lock"
    lock = DirLock(tmp_path / "model", "the output", path=path)
    lock.acquire()
    assert names(tmp_path) == [".model.lock"]
    with pytest.raises(Locked, match=f"the output {tmp_path}/model is in use by"):
        DirLock(tmp_path / "model", "the output", path=path).acquire()
    lock.release()
    assert names(tmp_path) == []
