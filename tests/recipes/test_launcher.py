"""Processes of a run: their environment, signals, the first failure, other hosts through a stand-in
for ssh."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from coati.cli.arguments import parse_sft
from coati.cli.launch_flags import Host, LaunchSettings, check_launch, processes_of, read_hosts
from coati.recipes import launcher
from coati.recipes.launcher import launch, plan
from coati.utils.environment import cpus
from coati.utils.logging import forget_warnings

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, pathlib, signal, sys, time
rank = os.environ["RANK"]
place = pathlib.Path(sys.argv[1])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "OMP_NUM_THREADS", "COATI_MARK")
(place / f"{rank}.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))
def graceful(number, frame):
    (place / f"{rank}.{signal.Signals(number).name}").touch()
    sys.exit(0)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    # OMP_NUM_THREADS is set for the processes, not for the tests after this one.
    monkeypatch.setenv("COATI_MARK", "passed on")
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def program(tmp_path: Path, body: str) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM + body)
    return [str(script), str(tmp_path)]


def seen(tmp_path: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]


def test_each_process_learns_its_rank_and_where_to_meet(tmp_path):
    assert launch(LaunchSettings(nproc=3), program(tmp_path, "")) == 0
    found = seen(tmp_path)
    assert [one["RANK"] for one in found] == ["0", "1", "2"]
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "2"]
    assert (
        {one["WORLD_SIZE"] for one in found} == {one["LOCAL_WORLD_SIZE"] for one in found} == {"3"}
    )
    assert {one["MASTER_ADDR"] for one in found} == {"127.0.0.1"}
    (port,) = {one["MASTER_PORT"] for one in found}
    assert 1024 <= int(port) < 65536
    threads = str(max(1, cpus() // 3))
    assert {one["OMP_NUM_THREADS"] for one in found} == {threads}


def test_a_failure_ends_the_others_and_is_said_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    body = """
if rank == "1":
    pathlib.Path(os.environ["COATI_ERROR_FILE"]).write_text("coati sft: error: broken")
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that hangs in a collective
time.sleep(60)
"""
    started = time.monotonic()
    assert launch(LaunchSettings(nproc=3), program(tmp_path, body)) == 1
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == "coati sft: error: broken\n"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("sys.exit(7)", 7, "rank 0 ended with exit code 7; its own message is above\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "rank 0 was ended by SIGKILL (often by the kernel, when memory ran out: see dmesg)\n",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "rank 0 was ended by SIGSEGV\n"),
    ],
)
def test_what_ended_a_process_that_said_nothing(tmp_path, capfd, body, code, said):
    assert launch(LaunchSettings(nproc=1), program(tmp_path, body)) == code
    assert capfd.readouterr().err == said


def test_the_cause_is_said_whichever_rank_ends_first(tmp_path, capfd):
    """A rank that leaves its message and then takes its time, and one that dies of that."""
    body = """
if rank == "1":
    pathlib.Path(os.environ["COATI_ERROR_FILE"]).write_text("coati sft: error: broken")
    (place / "written").touch()
    time.sleep(1)
    sys.exit(1)
while not (place / "written").exists():
    time.sleep(0.01)
sys.exit(1)
"""
    assert launch(LaunchSettings(nproc=2), program(tmp_path, body)) == 1
    assert capfd.readouterr().err == "coati sft: error: broken\n"


def test_a_closed_terminal_ends_the_run_gracefully(tmp_path):
    body = """
signal.signal(signal.SIGTERM, graceful)
(place / f"{rank}.ready").touch()
time.sleep(60)
"""
    started = start_launcher(tmp_path, body, ["ready"])
    started.send_signal(signal.SIGHUP)
    assert started.wait(timeout=60) == 0
    assert len(list(tmp_path.glob("*.SIGTERM"))) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    body = """
signal.signal(signal.SIGTERM, graceful)
(place / f"{rank}.ready").touch()
time.sleep(60)
"""
    started = start_launcher(tmp_path, body, ["ready"])
    started.kill()
    started.wait(timeout=60)
    wait_for(tmp_path, "SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_its_graceful_end_is_no_failure(tmp_path, number):
    body = """
signal.signal(signal.SIGTERM, graceful)
signal.signal(signal.SIGINT, graceful)
(place / f"{rank}.ready").touch()
time.sleep(60)
"""
    started = start_launcher(tmp_path, body, ["ready"])
    os.killpg(started.pid, number)  # as a terminal does: to the launcher's whole group
    assert started.wait(timeout=60) == 0
    assert len(list(tmp_path.glob(f"*.{number.name}"))) == 2


def test_the_third_interrupt_ends_what_does_not_listen(tmp_path):
    body = """
count = 0
def stubborn(number, frame):
    global count
    count += 1
    (place / f"{rank}.got{count}").touch()
signal.signal(signal.SIGINT, stubborn)
(place / f"{rank}.ready").touch()
while True:
    time.sleep(0.1)
"""
    started = start_launcher(tmp_path, body, ["ready"])
    for count in (1, 2):
        started.send_signal(signal.SIGINT)
        wait_for(tmp_path, f"got{count}")
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=60) == 128 + signal.SIGKILL


def start_launcher(tmp_path: Path, body: str, ready: list[str]) -> subprocess.Popen:
    words = program(tmp_path, body)
    code = (
        "import sys; from coati.cli.launch_flags import LaunchSettings\n"
        "from coati.recipes.launcher import launch\n"
        f"sys.exit(launch(LaunchSettings(nproc=2), {words!r}))"
    )
    # Under nohup, or a CI without a terminal, it would inherit that SIGHUP is ignored.
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True
    )
    for name in ready:
        wait_for(tmp_path, name)
    return started


def wait_for(tmp_path: Path, name: str) -> None:
    end = time.monotonic() + 60
    while len(list(tmp_path.glob(f"*.{name}"))) < 2:
        assert time.monotonic() < end, sorted(path.name for path in tmp_path.iterdir())
        time.sleep(0.05)


# ---- several hosts


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """A stand-in for ssh that runs the remote command here, and notes the host. ``far`` cannot be
    reached."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in = folder / "ssh"
    stand_in.write_text(
        "#!/bin/bash\n"
        f'while [[ "$1" == -* ]]; do [ "$1" = -o ] && shift; shift; done\n'
        f'echo "$1" >> {tmp_path}/hosts\n'
        'if [ "$1" = far ]; then exit 255; fi\n'
        'exec env -u COATI_MARK bash -c "$2"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(launcher, "is_here", lambda host: host == "first")
    return tmp_path / "hosts"


def hostfile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hostfile"
    path.write_text(text)
    return str(path)


AT_WORK = """
sys.path.insert(0, "ROOT")
from coati.recipes.launcher import rank_at_work
with rank_at_work():
    (place / f"{rank}.ready").touch()
    if rank == "1":
        subprocess_of_its_own = os.spawnlp(os.P_WAIT, "true", "true")
        LEAVES
    while rank == "0" and not (place / "1.ready").exists():
        time.sleep(0.05)
    WAITS
"""


def at_work(leaves: str, waits: str = "pass") -> str:
    text = AT_WORK.replace("ROOT", str(ROOT)).replace("LEAVES", leaves)
    return text.replace("WAITS", waits)


def test_a_rank_that_leaves_with_0_before_its_end_is_a_failure(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 1.0)
    start = time.monotonic()
    body = at_work("os._exit(0)", "time.sleep(60)")
    assert launch(LaunchSettings(nproc=2), program(tmp_path, body)) == launcher.EARLY
    assert time.monotonic() - start < 40
    said = capfd.readouterr().err
    assert "rank 1 ended with exit code 0 before the end of its run" in said
    assert "os._exit(0)" in said


def test_what_others_say_does_not_hide_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 2.0)
    complains = (
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(os.environ['COATI_ERROR_FILE'])"
        ".write_text('coati sft: error: connection closed'), os._exit(1)))\n    time.sleep(60)"
    )
    body = at_work("time.sleep(0.5); os._exit(0)", complains)
    assert launch(LaunchSettings(nproc=2), program(tmp_path, body)) == launcher.EARLY
    said = capfd.readouterr().err
    assert "rank 1 ended with exit code 0 before" in said and "connection closed" in said


def test_ranks_that_reach_their_end_are_a_success(tmp_path):
    assert launch(LaunchSettings(nproc=2), program(tmp_path, at_work("pass"))) == 0


def test_no_mark_is_left_without_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv(launcher.ERROR_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    with launcher.rank_at_work():
        assert not list(tmp_path.iterdir())


def test_two_hosts_share_one_group_and_the_variables_of_the_first(tmp_path, ssh):
    hosts = hostfile(tmp_path, "first  # the master\n\nsecond slots=1\n")
    settings = LaunchSettings(nproc=2, hostfile=hosts, master_port=29517)
    assert launch(settings, program(tmp_path, "")) == 0
    found = seen(tmp_path)
    assert [(one["RANK"], one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) for one in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
        ("2", "0", "1"),
    ]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in found} == {
        ("3", "first", "29517")
    }
    assert {one["COATI_MARK"] for one in found} == {"passed on"}
    assert ssh.read_text().split() == ["second"]


def test_a_failure_on_another_host_ends_all(tmp_path, ssh, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 2.0)
    body = """
if rank == "1":
    pathlib.Path(os.environ["COATI_ERROR_FILE"]).write_text("coati sft: error: no disk")
    sys.exit(1)
time.sleep(60)
"""
    settings = LaunchSettings(nproc=1, hostfile=hostfile(tmp_path, "first\nsecond\n"))
    assert launch(settings, program(tmp_path, body)) == 1
    err = capfd.readouterr().err
    assert "coati sft: error: no disk" in err
    assert "second: ended with exit code 1; its own message is above" in err


def test_a_host_that_ssh_does_not_reach(tmp_path, ssh, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    settings = LaunchSettings(nproc=1, hostfile=hostfile(tmp_path, "first\nfar\n"))
    assert launch(settings, program(tmp_path, "time.sleep(60)")) == 255
    assert "far: ssh could not connect, or lost" in capfd.readouterr().err


def test_another_host_ends_its_processes_when_the_first_is_gone(tmp_path):
    """The agent's standard input is all that binds it to the first host."""
    words = program(
        tmp_path,
        "signal.signal(signal.SIGTERM, graceful)\n(place / f'{rank}.ready').touch()\n"
        "time.sleep(60)",
    )
    job = launcher.Job(words, str(tmp_path), 2, 0, 2, "127.0.0.1", 1, {})
    agent = subprocess.Popen(
        [sys.executable, "-m", "coati.recipes.launcher"],
        stdin=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    agent.stdin.write(json.dumps(vars(job)) + "\n")
    agent.stdin.flush()
    wait_for(tmp_path, "ready")
    agent.stdin.close()
    assert agent.wait(timeout=60) == 0
    assert len(list(tmp_path.glob("*.SIGTERM"))) == 2


def test_a_kernel_without_ipv6(monkeypatch):
    def none(family, *_):
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(launcher.socket, "socket", none)
    assert launcher.is_here("localhost") and not launcher.is_here("127.0.0.2")


def test_a_loopback_name_does_not_lead_several_hosts(tmp_path):
    hosts = hostfile(tmp_path, "localhost\nsecond\n")
    with pytest.raises(ValueError, match="begins with localhost, which is another machine on each"):
        plan(LaunchSettings(nproc=1, hostfile=hosts), ["x"])
    (_, job), _ = plan(LaunchSettings(nproc=1, hostfile=hosts, master_addr="10.0.0.1"), ["x"])
    assert job.master_addr == "10.0.0.1"


@pytest.mark.parametrize(
    ("leads", "toward", "address"),
    [
        (["10.0.0.1"], "10.0.0.9", "first"),
        (["127.0.1.1"], "10.0.0.9", "10.0.0.9"),  # Debian's /etc/hosts
        (["127.0.1.1"], None, "first"),  # the second host is known to ssh alone
        ([], "10.0.0.9", "first"),
    ],
)
def test_the_others_are_told_an_address_that_they_can_reach(monkeypatch, leads, toward, address):
    monkeypatch.setattr(launcher, "addresses_of", lambda name: leads)
    monkeypatch.setattr(launcher, "address_toward", lambda name: toward)
    assert launcher.meeting_address(["first", "second"]) == address


def test_runs_are_told_apart(tmp_path, ssh):
    """The processes of a run share a name that no other run has, on all hosts."""
    body = "(place / f'{rank}.{os.environ[\"COATI_RUN_ID\"]}.run').touch()"
    hosts = hostfile(tmp_path, "first\nsecond\n")
    for _ in range(2):
        assert launch(LaunchSettings(nproc=1, hostfile=hosts), program(tmp_path, body)) == 0
    found = sorted(path.name.split(".")[:2] for path in tmp_path.glob("*.run"))
    assert [rank for rank, _ in found] == ["0", "0", "1", "1"]
    assert {name for rank, name in found if rank == "0"} == {n for r, n in found if r == "1"}
    assert len({name for _, name in found}) == 2


def test_a_look_comes_first_and_can_be_left_out(tmp_path, monkeypatch, capsys):
    from coati.recipes.command import run

    started = []
    monkeypatch.setattr(launcher, "launch", lambda settings, command: started.append(command) or 0)
    (tmp_path / "arrow").mkdir()
    (tmp_path / "config.json").write_text("{}")
    words = ["--pretrain", str(tmp_path), "--dataset", str(tmp_path / "arrow"), "--nproc", "2"]
    words += ["--save_dir", str(tmp_path / "run"), "--plugin", "ddp"]
    with socket.socket() as other, pytest.raises(SystemExit) as ended:
        other.bind(("", 0))
        other.listen()
        run("sft", [*words, "--master_port", str(other.getsockname()[1])], prog="coati sft")
    assert ended.value.code == 1 and not started
    said = capsys.readouterr().err
    assert said.count("coati sft: error: ") == 1 and "port" in said
    with pytest.raises(SystemExit) as ended:
        run("sft", [*words, "--no_preflight"], prog="coati sft")
    assert ended.value.code == 0 and len(started) == 1


def test_this_machine_is_recognized():
    assert launcher.is_here("localhost") and launcher.is_here("127.0.0.1")
    assert not launcher.is_here("192.0.2.1")  # TEST-NET-1 (RFC 5737)
    assert not launcher.is_here("a-host-that-only-ssh-knows.invalid")


# ---- flags


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a\nb\n", [Host("a"), Host("b")]),
        ("# all\na slots=4 # big\n\n10.0.0.2 slots=2", [Host("a", 4), Host("10.0.0.2", 2)]),
    ],
)
def test_a_host_file(tmp_path, text, hosts):
    assert read_hosts(hostfile(tmp_path, text)) == hosts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("a\na slots=2\n", ":2: a stands there twice"),
        ("a gpus=2\n", ":1: expected 'name' or 'name slots=N', found 'a gpus=2'"),
        ("a slots=0\n", ":1: expected"),
        ("a slots=2 b\n", ":1: expected"),
        ("-oProxyCommand=x\n", ":1: '-oProxyCommand=x' is no host name"),
    ],
)
def test_a_host_file_that_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError) as error:
        read_hosts(hostfile(tmp_path, text))
    assert str(error.value).startswith("--hostfile ") and said in str(error.value)


def test_a_host_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: No such file .*one host name per line"):
        read_hosts(str(tmp_path / "nowhere"))


def flags(**given) -> Namespace:
    return Namespace(
        **{"nproc": None, "hostfile": None, "master_addr": None, "master_port": None} | given
    )


def test_auto_is_the_number_of_gpus_or_one(monkeypatch):
    monkeypatch.setattr("coati.cli.launch_flags.gpu_count", lambda: 4)
    args = flags(nproc="auto")
    check_launch(args)
    assert args.nproc == 4
    monkeypatch.setattr("coati.cli.launch_flags.gpu_count", lambda: 0)
    args = flags(nproc="auto")
    check_launch(args)
    assert args.nproc == 1


def test_what_does_nothing_or_says_too_little_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--master_port does nothing without --nproc"):
        check_launch(flags(master_port=1))
    with pytest.raises(ValueError, match="does not say how many processes"):
        check_launch(flags(hostfile=hostfile(tmp_path, "a\nb slots=2\n")))
    check_launch(flags(hostfile=hostfile(tmp_path, "a slots=1\nb slots=2\n")))
    with pytest.raises(ValueError, match="--nproc auto counts the GPUs of this host"):
        check_launch(flags(nproc="auto", hostfile=hostfile(tmp_path, "a\n")))


def test_a_number_that_another_launcher_overrules_is_said(monkeypatch, capsys):
    forget_warnings()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launch(flags(nproc=8))
    assert "--nproc 8 starts nothing: another launcher has set RANK" in capsys.readouterr().err


def test_plugins_are_checked_against_the_processes_to_come(tmp_path, capsys, monkeypatch):
    data = str(tmp_path / "arrow")
    os.mkdir(data)
    words = ["--pretrain", "m", "--dataset", data, "--plugin", "3d", "--tp", "2"]
    with pytest.raises(SystemExit):
        parse_sft([*words, "--nproc", "3"])
    assert "3" in capsys.readouterr().err
    assert parse_sft([*words, "--nproc", "4"]).launch == LaunchSettings(nproc=4)
    hosts = hostfile(tmp_path, "a slots=1\nb slots=3\n")
    assert processes_of(flags(hostfile=hosts)) == 4
    monkeypatch.setenv("WORLD_SIZE", "8")  # another launcher has decided
    assert processes_of(flags(nproc=2)) == 8


def test_processes_are_started_once(monkeypatch):
    assert LaunchSettings(nproc=2).wanted and LaunchSettings(hostfile="f").wanted
    assert not LaunchSettings(nproc=1).wanted and not LaunchSettings().wanted
    monkeypatch.setenv("RANK", "0")
    assert not LaunchSettings(nproc=2).wanted


def test_the_port_of_one_host_is_free_and_that_of_several_is_known(tmp_path):
    (_, job), *_ = plan(LaunchSettings(nproc=2), ["x"])
    assert job.master_port != 29500 and job.folder == os.getcwd()
    hosts = hostfile(tmp_path, "a\nb\n")
    jobs = plan(LaunchSettings(nproc=2, hostfile=hosts, master_addr="10.0.0.1"), ["x"])
    assert [(name, job.first_rank, job.master_addr, job.master_port) for name, job in jobs] == [
        ("a", 0, "10.0.0.1", 29500),
        ("b", 2, "10.0.0.1", 29500),
    ]
