"""What .ci/run does around the tests: lint first, a browser where one may be installed, one exit
code."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH has the shell's own tools and ``scripts`` alone."""
    folder.mkdir()
    for name in ("bash", "cat", "cksum", "cut", "dirname", "mktemp", "tail", "rm", "env"):
        (folder / name).symlink_to(shutil.which(name))
    for name, text in scripts.items():
        (folder / name.replace("_", "-")).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return {"PATH": str(folder), "HOME": str(folder), "LOG": str(folder / "log")}


@pytest.mark.parametrize(
    "lint, test, pinned", [(0, 0, 0), (1, 0, 0), (0, 2, 0), (1, 2, 0), (0, 0, 2), (1, 0, 2)]
)
def test_lint_and_tests_of_both_sets_run_and_any_fails(lint, test, pinned, tmp_path):
    make = (
        f'echo "$1" >>"$LOG"; [ "$1" = lint ] && exit {lint}; echo "3 passed of $1"; '
        f'[ "$1" = test ] && exit {test}; exit {pinned}'
    )
    environment = programs(tmp_path / "bin", make=make, chromium="")
    run = subprocess.run(
        [str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == (pinned or test or lint)
    targets = Path(environment["LOG"]).read_text().split()
    assert targets[0] == "lint" and sorted(targets[1:]) == ["test", "test-fast"]
    assert run.stdout.splitlines() == ["3 passed of test", "3 passed of test-fast"]


def test_both_sets_run_side_by_side(tmp_path):
    """Each waits until the other has begun."""
    make = (
        '[ "$1" = lint ] && exit 0; : >"$LOG.$1"; '
        'other=$([ "$1" = test ] && echo test-fast || echo test); '
        'for turn in {1..100}; do [ -e "$LOG.$other" ] && exit 0; sleep 0.1; done; exit 1'
    )
    environment = programs(tmp_path / "bin", make=make, chromium="")
    (tmp_path / "bin" / "sleep").symlink_to(shutil.which("sleep"))
    assert subprocess.run([str(ROOT / ".ci" / "run")], env=environment).returncode == 0


def install(environment: dict[str, str]) -> tuple[int, str]:
    script = str(ROOT / "tools" / "install_browser.sh")
    run = subprocess.run(
        [shutil.which("bash"), script], env=environment, capture_output=True, text=True
    )
    return run.returncode, run.stderr


def test_a_browser_is_installed_where_that_may_be(tmp_path):
    log = 'echo "$*" >>"$LOG"'
    for user in ("0", "1000"):
        environment = programs(
            tmp_path / user, id=f"echo {user}", apt_get=log, sudo='shift; exec "$@"', true=""
        )
        assert install(environment) == (0, "")
        calls = Path(environment["LOG"]).read_text().splitlines()
        assert [call.split()[0] for call in calls] == ["update", "install"], user
        assert calls[-1].endswith("chromium")


def test_where_none_can_be_installed_one_line_says_so(tmp_path):
    nothing = programs(tmp_path / "nothing", id="echo 0")
    no_root = programs(tmp_path / "no_root", id="echo 1000", apt_get="", sudo="exit 1")
    failing = programs(tmp_path / "failing", id="echo 0", true="", apt_get="echo E: none; exit 100")
    for environment, reason in (
        (nothing, "apt-get as root or by passwordless sudo is needed"),
        (no_root, "apt-get as root or by passwordless sudo is needed"),
        (failing, "apt-get could not install chromium (E: none)"),
    ):
        code, text = install(environment)
        assert code == 0 and reason in text and len(text.splitlines()) == 1


def test_a_browser_that_is_there_is_taken(tmp_path):
    environment = programs(tmp_path / "bin", chromium="", id="echo 0", apt_get="exit 1")
    assert install(environment) == (0, "")
