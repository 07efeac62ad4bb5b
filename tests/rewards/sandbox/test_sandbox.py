"""Programs that nobody has read: each hostile one is contained and named, and the next one runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coati.rewards.sandbox import sandbox
from coati.rewards.sandbox.sandbox import MIB, Case, Limits, Refused, Sandbox

ROOT = Path(__file__).resolve().parents[3]
LIMITS = Limits(seconds=2.0, memory=256 * MIB, processes=8, files=200, output=MIB)
WORKING = [engine for engine in sandbox.ENGINES if sandbox.problem_of(engine) is None]
SYSTEM_PYTHON = "/usr/bin/python3"  # which every user may read, as root's own may not be
pytestmark = pytest.mark.skipif(not WORKING, reason="no isolation here: see coati doctor")


@pytest.fixture(params=list(sandbox.ENGINES))
def box(request, monkeypatch):
    if request.param not in WORKING and os.path.exists(SYSTEM_PYTHON):
        monkeypatch.setattr(sandbox, "_tried", TRIED)
        monkeypatch.setattr(sandbox, "interpreter", lambda: SYSTEM_PYTHON)
        monkeypatch.setattr(sandbox, "prefixes", list)
    if problem := sandbox.problem_of(request.param):
        pytest.skip(f"{request.param}: {problem}")
    return Sandbox(LIMITS, request.param)


TRIED = {}


def run(box, program, stdin=""):
    """How the program ends, and that the sandbox goes on after it."""
    ending = box.run(program, [Case("stdin", input=stdin)])[0]
    assert box.run("print(input())", [Case("stdin", input="on\n")])[0].stdout == "on\n"
    return ending


def test_a_program_reads_its_input_and_is_run_anew_for_each_case(box):
    program = "import sys\nn = int(input())\nprint(n * 2)\nprint('so', file=sys.stderr)"
    cases = [Case("stdin", input=f"{n}\n") for n in (3, 4)]
    endings = box.run(program, cases)
    assert [(one.how, one.code, one.stdout) for one in endings] == [
        ("exit", 0, "6\n"),
        ("exit", 0, "8\n"),
    ]
    assert endings[0].stderr == "so\n"


def test_long_input_and_output_go_through(box):
    text = "x" * 500_000
    assert run(box, "print(input())", text + "\n").stdout == text + "\n"


def test_a_call_gives_its_result_and_tests_say_whether_they_ran_through(box):
    program = "class Solution:\n    def twice(self, a: List[int]):\n        return [a, (1.5, None)]"
    [call] = box.run(program, [Case("call", function="twice", arguments=[[1]])])
    assert json.loads(call.result) == [[1], [1.5, None]]
    program = "def f(a):\n    return a + 1"
    passing = "def check(g):\n    assert g(1) == 2"
    endings = box.run(
        program,
        [
            Case("tests", source=passing, entry_point="f"),
            Case("tests", source="assert f(1) == 3"),
            Case("tests", source="from solution import f\ndef test_it():\n    assert f(2) == 4"),
            Case("tests", source="assert f(0) == 1"),
        ],
    )
    assert [one.passed for one in endings] == [True, False, False, True]
    assert endings[1].reason == "AssertionError"


UNITTEST = (
    "import unittest\nclass T(unittest.TestCase):\n"
    "    def test(self):\n        self.assertEqual(f(), {})"
)


def test_unittests_count(box):
    cases = [Case("tests", source=UNITTEST.format(value)) for value in (1, 2)]
    assert [one.passed for one in box.run("def f():\n    return 1", cases)] == [True, False]


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import builtins; builtins.AssertionError = ValueError\ndef f(): return 0",
        "class A:\n    def __eq__(self, other): return False\ndef f(): return A()",
        "import threading, os\ndef f(): os._exit(0)",
        "print('passed')\nimport os\nfor fd in range(3, 1000):\n"
        "    try: os.write(fd, b'passed')\n    except OSError: pass\ndef f(): return 0",
    ],
)
def test_leaving_early_is_not_passing(box, program):
    [ending] = box.run(program, [Case("tests", source="assert f() == 1")])
    assert not ending.passed


# Hostile programs: program, how it ends, and what the reason says


HOSTILE = {
    "endless loop": ("while True: pass", "time", "the time limit"),
    "sleep": ("import time; time.sleep(1000)", "time", "the time limit"),
    "deaf": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        "time",
        "the time limit",
    ),
    "10 GB": ("x = bytearray(10 * 2**30)", "exit", "the memory limit"),
    "10 GB in parts": (
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "exit",
        "the memory limit",
    ),
    "memory in many processes": (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0: break\n"
        "x = bytearray(200 * 2**20)\n"
        "for i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(60)",
        "memory",
        "the memory limit",
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "time",
        "the time limit",
    ),
    "threads": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "exit",
        "can't start new thread",
    ),
    "endless output": ("while True: print('x' * 1000)", "output", "the limit of output"),
    "endless errors": (
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        "output",
        "the limit of output",
    ),
    "huge file": (
        "f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20)",
        ("exit", "signal"),
        "File too large|SIGXFSZ",
    ),
    "many large files": (
        "for n in range(100): open(str(n), 'wb').write(b'x' * 2**21)",
        "exit",
        "No space left",
    ),
    "many files": (
        "import time\nfor n in range(10**6): open(str(n), 'w').close()",
        ("files", "exit"),
        "the limit of files|No space left",
    ),
    "open files": ("x = [open('/dev/null') for _ in range(1000)]", "exit", "Too many open files"),
    "killing all": (
        "import os\nif os.fork() == 0: os.kill(-1, 9)\nwhile True: pass",
        "signal",
        "killed by SIGKILL",
    ),
    "killing process 1": (
        "import os\nfor n in (2, 9, 15): os.kill(1, n)\nraise ValueError('alive')",
        "exit",
        "alive",
    ),
    "recursion": ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None, ""),
    "nesting": ("exec('(' * 10**5)", ("exit", "signal"), ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained_and_named(box, name):
    program, how, reason = HOSTILE[name]
    began = time.monotonic()
    ending = run(box, program)
    assert time.monotonic() - began < 25
    if how is not None:
        assert ending.how in ((how,) if isinstance(how, str) else how), ending
    assert any(part in ending.reason for part in reason.split("|")), ending
    assert not ending.passed and ending.result is None


OUTSIDE = {
    "/etc/passwd": "open('/etc/passwd')",
    "/etc/shadow": "open('/etc/shadow')",
    "home": f"__import__('os').listdir({str(Path.home())!r} + '/.ssh')",
    "this directory": f"open({__file__!r})",
    "/proc": "open('/proc/1/environ')",
    "/sys": "__import__('os').listdir('/sys/class')",
    "a device": "open('/dev/sda')",
    "writing to /usr": "open('/usr/bin/python3', 'a')",
    "writing to the interpreter": "open(__import__('sys').executable, 'ab')",
    "writing to /": "open('/x', 'w')",
    "a link out": "(__import__('os').symlink('/../../etc/passwd', 'l'), open('l'))",
    "a hard link": "__import__('os').link('/bin/sh', 'sh')",
    "a device of its own": "__import__('os').mknod('d', 0o60666, 0x800)",
    "being root": "__import__('os').setuid(0)",
    "chroot": "__import__('os').chroot('/tmp')",
    "a mount": "__import__('subprocess').check_call(['mount', '-t', 'tmpfs', 'x', '/tmp'])",
    "a namespace": "__import__('subprocess').check_call(['unshare', '-Ur', 'true'])",
    "the network": "__import__('socket').create_connection(('127.0.0.1', PORT), 1)",
    "a name": "__import__('socket').getaddrinfo('localhost.localdomain.invalid', 80)",
    "a signal to the parent": f"__import__('os').kill({os.getpid()}, 0)",
    "priority": "__import__('os').setpriority(0, 0, -5)",
    "shared memory": "__import__('ctypes').CDLL(None).shmget(0, 4096, 0o1600) >= 0 or 1 / 0",
    "memory that has no limit": "__import__('os').memfd_create('x')",
    "another's limits": "__import__('resource').prlimit(1, 7, (0, 0))",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_outside_is_out_of_reach(box, name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = OUTSIDE[name].replace("PORT", str(server.getsockname()[1]))
        ending = run(box, f"{code}\nprint('done')")
    assert ending.how == "exit" and ending.code == 1 and "done" not in ending.stdout, ending
    assert ending.stderr.strip()


def test_nothing_of_a_program_is_left(box, tmp_path):
    """Neither its children nor its files, in the next case or the next sandbox."""
    program = (
        "import os, time\nprint(sorted(os.listdir('.')), os.path.exists('/tmp/mark'), "
        "flush=True)\n"
        "open('here', 'w')\nopen('/tmp/mark', 'w').write(str(os.getpid()))\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n"
    )
    before = set(sandbox._descendants(os.getpid()))
    first, second = box.run(program, [Case("stdin"), Case("stdin")])
    assert first.stdout == "[] False\n" and second.stdout.startswith("[]")
    assert box.run(program, [Case("stdin")])[0].stdout == "[] False\n"
    assert set(sandbox._descendants(os.getpid())) <= before


def test_the_environment_is_not_passed_on(box, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ending = run(box, "import os; print(sorted(os.environ.items()))")
    assert "hf_secret" not in ending.stdout and "HF_TOKEN" not in ending.stdout


def test_outside_a_program_is_an_ordinary_user(box):
    """By what the kernel says of the process that it is."""
    import threading

    found = []
    before = set(sandbox._descendants(os.getpid()))

    def look():
        while not done.is_set():
            for pid in set(sandbox._descendants(os.getpid())) - before:
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    words = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                    found.append((words["Uid"].split()[0], words["Seccomp"], words["NoNewPrivs"]))
                except (OSError, KeyError):
                    pass
            time.sleep(0.02)

    done = threading.Event()
    watching = threading.Thread(target=look)
    watching.start()
    run(box, "import time; time.sleep(1)")
    done.set()
    watching.join()
    expected = os.getuid() or sandbox.outside_user()
    assert (str(expected), "2", "1") in found and expected != 0


def test_a_sandbox_ends_with_the_process_that_began_it(box, tmp_path):
    program = f"""
import threading, time
from coati.rewards.sandbox import sandbox
sandbox.interpreter = lambda: {sandbox.interpreter()!r}
sandbox.prefixes = lambda: {sandbox.prefixes()!r}
from coati.rewards.sandbox.sandbox import Case, Limits, Sandbox, _descendants
box = Sandbox(Limits(seconds=300), {box.engine!r})
threading.Thread(target=box.run, args=("while True: pass", [Case("stdin")])).start()
while len(found := _descendants(__import__('os').getpid())) < 3: time.sleep(0.05)
print(*found, flush=True)
time.sleep(300)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    )
    inside = [int(word) for word in began.stdout.readline().split()]
    assert len(inside) >= 3
    began.send_signal(signal.SIGKILL)
    began.wait()
    began.stdout.close()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in inside) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]


# Where there is no isolation


def test_without_isolation_nothing_is_run(monkeypatch):
    ran = []
    monkeypatch.setattr(sandbox, "_tried", {})
    for name in sandbox.ENGINES:
        monkeypatch.setitem(
            sandbox.ENGINES, name, lambda limits, report, name=name: (["/bin/false"], {})
        )
    monkeypatch.setattr(sandbox.subprocess, "Popen", spy(ran, sandbox.subprocess.Popen))
    with pytest.raises(Refused, match="cannot be isolated here, so none are run .bubblewrap: .*"):
        Sandbox()
    assert all(command == ["/bin/false"] for command in ran)


def spy(ran, popen):
    def begin(command, **keywords):
        ran.append(command)
        return popen(command, **keywords)

    return begin


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("environment", "read /etc/passwd"),
        ("files", "see /var"),
        ("processes", "start any number of processes"),
        ("network", "reach the network"),
    ],
)
def test_an_engine_that_does_not_hold_is_found_out(monkeypatch, change, problem):
    """Each wall taken away by itself is named."""
    engine = "namespaces"
    if engine not in WORKING:
        pytest.skip("no namespaces here")
    made = sandbox.ENGINES[engine]

    def weaker(limits, report):
        command, settings = made(limits, report)
        spec = json.loads(command[-1])
        if change == "environment":
            spec["readable"].append("/etc/passwd")
        if change == "files":
            spec["readable"].append("/var")
        command[-1] = json.dumps(spec)
        if change == "network":
            text = Path(command[-2]).read_text().replace("| 0x40000000 ", "")
            command = [*command[:-2], "-c", text, command[-1]]
        return command, settings

    monkeypatch.setattr(sandbox, "_tried", {})
    monkeypatch.setitem(sandbox.ENGINES, engine, weaker)
    if change == "processes":
        told = Limits.as_message
        monkeypatch.setattr(
            Limits,
            "as_message",
            lambda self: {**told(self), "rlimits": {**told(self)["rlimits"], "NPROC": 4000}},
        )
    assert problem in sandbox.problem_of(engine)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("engine", list(sandbox.ENGINES))
def test_an_ordinary_user_is_isolated_too(engine, tmp_path_factory):
    """With an interpreter that every user can read."""
    if engine == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    if not os.path.exists(SYSTEM_PYTHON):
        pytest.skip(f"no {SYSTEM_PYTHON}")
    folder = tmp_path_factory.mktemp("readable")
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)
    shutil.copytree(ROOT / "coati" / "rewards", folder / "coati" / "rewards", dirs_exist_ok=True)
    shutil.copytree(ROOT / "coati" / "utils", folder / "coati" / "utils", dirs_exist_ok=True)
    (folder / "coati" / "__init__.py").touch()
    program = (
        "from coati.rewards.sandbox import sandbox as s\n"
        f"print(s.problem_of({engine!r}))\n"
        f"print(s.Sandbox(engine={engine!r}).run('print(6 * 7)', [s.Case('stdin')])[0].stdout)"
    )
    ran = subprocess.run(
        [SYSTEM_PYTHON, "-B", "-c", program],
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["None", "42"], ran
