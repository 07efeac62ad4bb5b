import json
import os
import subprocess
import sys
import time

import pytest

from coati.__main__ import main
from coati.utils import user_cache
from coati.utils.user_cache import LIMIT_VARIABLE, entries, hold, limit_gib, trim

DAY = 86400


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    monkeypatch.setattr(user_cache, "_held", {})
    return tmp_path / "coati"


def put(root, name, mib, days=0.0, kind="prepared"):
    """An entry of ``mib`` MiB that was used ``days`` ago."""
    folder = root / kind / name
    folder.mkdir(parents=True)
    (folder / "rows.arrow").write_bytes(bytes(int(mib * 2**20)))
    then = time.time() - days * DAY
    for path in (folder / "rows.arrow", folder):
        os.utime(path, (then, then))
    return folder


def there(root, kind="prepared"):
    return sorted(path.name for path in (root / kind).iterdir())


def limit_mib(monkeypatch, mib):
    monkeypatch.setenv(LIMIT_VARIABLE, str(mib / 1024))


def test_what_was_used_longest_ago_goes_first_and_only_as_much_as_needed(root, monkeypatch, capsys):
    put(root, "old", 1, days=9)
    put(root, "older", 1, days=30, kind="rows")
    put(root, "new", 1, days=1)
    limit_mib(monkeypatch, 2.5)
    trim()
    assert there(root) == ["new", "old"] and there(root, "rows") == []
    said = capsys.readouterr().err
    assert "1 entries of 0.0 GiB, not used for 30 days or longer" in said and said.count("\n") == 1
    trim()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "days, age", [(0.01, "14 min ago"), (0.25, "6 h ago"), (1.5, "36 h ago"), (9, "9 days ago")]
)
def test_how_long_ago_is_said_in_a_unit_of_its_size(root, capsys, days, age):
    put(root, "old", 1, days=days)
    main(["cache"])
    assert age in capsys.readouterr().out


def test_reading_counts_as_use(root, monkeypatch):
    old = put(root, "old", 1, days=9)
    put(root, "new", 1, days=1)
    hold(old)
    user_cache._held.pop(old).close()  # as when that process has ended
    limit_mib(monkeypatch, 1.5)
    trim()
    assert there(root) == ["old"]


def test_nothing_that_a_running_process_uses_is_removed(root, monkeypatch):
    old = put(root, "old", 1, days=9)
    program = "from coati.utils.user_cache import hold; from pathlib import Path; import sys\n"
    program += f"hold(Path({str(old)!r})); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"1\n"
        limit_mib(monkeypatch, 0.5)
        assert entries()[0].in_use
        trim()
        assert there(root) == ["old"]
        other.kill()  # a process that is killed holds nothing
    assert not entries()[0].in_use
    trim()
    assert there(root) == []


def test_this_process_keeps_what_it_holds_even_before_it_is_made(root, monkeypatch):
    hold(root / "prepared" / "mine")
    put(root, "mine", 1)
    limit_mib(monkeypatch, 0.5)
    trim()
    assert there(root) == ["mine"]


def test_remnants_of_interrupted_work_count_and_go_too(root, monkeypatch):
    (put(root, ".half.0.tmp", 1, days=3) / "lock").touch()
    put(root, "new", 1)
    part = root / "rows" / ".x.tmp"
    part.parent.mkdir()
    part.write_text("being written")
    limit_mib(monkeypatch, 1.5)
    trim()
    assert there(root) == ["new"] and there(root, "rows") == [".x.tmp"]
    os.utime(part, (0, 0))
    limit_mib(monkeypatch, 0.00001)
    trim()
    assert there(root) == [] and there(root, "rows") == []


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused_before_work(root, monkeypatch, text):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{LIMIT_VARIABLE} is '{text}'"):
        hold(root / "prepared" / "x")


def test_no_limit_and_the_default(monkeypatch):
    assert limit_gib() == 20
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert limit_gib() == float("inf")


def test_the_command_lists_sizes_and_ages_and_removes_what_is_not_in_use(root, capsys):
    made = put(root, "abc", 2, days=3)
    report = {"report": {"files": [{"file": "rows.jsonl"}]}}
    (made / "preparation.json").write_text(json.dumps(report))
    for path in (made / "preparation.json", made):
        os.utime(path, (time.time() - 3 * DAY,) * 2)
    used = put(root, "def", 1, days=5)
    hold(used)
    main(["cache"])
    said = capsys.readouterr().out
    assert f"{root}: 20 GiB at most ({LIMIT_VARIABLE})" in said
    assert "prepared: raw files given to training, tokenized; 2 entries, 3.0 MiB" in said
    assert said.split("abc")[1].split()[:4] == ["2.0", "MiB", "3", "days"]
    assert "in use" in said.split("def")[1] and "rows.jsonl" in said.split("abc")[1]
    main(["cache", "--clear", "--older_than", "2"])
    assert "removed" in capsys.readouterr().out and there(root) == ["def"]
    main(["cache", "--clear"])
    said = capsys.readouterr().out
    assert "1 of them are in use by a running process and stay" in said and there(root) == ["def"]


def test_listing_is_no_use(root):
    put(root, "abc", 1, days=3)
    for _ in range(2):
        main(["cache"])
    assert time.time() - entries()[0].used > 2 * DAY


def test_a_cache_that_is_not_there_is_empty(root, capsys):
    main(["cache"])
    assert "0 entries" in capsys.readouterr().out and not root.exists()
