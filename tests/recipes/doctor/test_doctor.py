"""The doctor: what one host lacks, in what hosts differ, what is said and with which exit code."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from coati.cli.launch_flags import Host, LaunchSettings
from coati.recipes.doctor import diagnosis, host_report, page, peers, preflight
from coati.recipes.doctor.diagnosis import Questions, diagnose
from coati.recipes.doctor.host_report import MEND, NOTE, Asked
from coati.recipes.doctor.peers import Here, PeerFailed
from coati.utils import environment
from coati.utils.errors import RunFailed

ROOT = Path(__file__).resolve().parents[3]
TWO = [Host("node1"), Host("node2")]


def found(asked: Asked) -> list[tuple[str, str]]:
    report = host_report.host_report(asked)
    return [(one["level"], f"{one['found']}; {one['remedy']}") for one in report["findings"]]


@pytest.fixture(autouse=True)
def well(monkeypatch):
    """A host with nothing to say about, whatever this machine is."""
    monkeypatch.setattr(host_report, "LITTLE_MEMORY", 0)
    monkeypatch.setattr(host_report, "LITTLE_DISK", 0)
    monkeypatch.setattr(host_report, "LEAST_DISK", 0)
    monkeypatch.setattr(host_report, "LEAST_SHM", 0)
    monkeypatch.setattr(host_report, "LEAST_FILES", 0)


def test_a_host_that_is_well(tmp_path):
    report = host_report.host_report(Asked(str(tmp_path / "run"), short=True))
    assert report["findings"] == [] and not (tmp_path / "run").exists()
    assert report["host"] == socket.gethostname() and report["packages"]["torch"]
    assert str(tmp_path / "run") in report["free disk"]["save_dir"]
    json.dumps(report)


def test_a_save_dir_that_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        ((level, text),) = found(Asked(str(place)))
        assert level == MEND and text.startswith(f"--save_dir {place}: {tmp_path}/file is no dir")


def test_little_room(tmp_path, monkeypatch):
    for name, level in (("LITTLE_DISK", NOTE), ("LEAST_DISK", MEND)):
        monkeypatch.setattr(host_report, name, 10**18)
        assert (level, f"--save_dir {tmp_path} has only") in [
            (one, text.split(" only ")[0] + " only") for one, text in found(Asked(str(tmp_path)))
        ]


def test_limits_are_noted_with_their_remedy(monkeypatch):
    monkeypatch.setattr(host_report, "LEAST_SHM", 2**60)
    monkeypatch.setattr(host_report, "LEAST_FILES", 2**60)
    monkeypatch.setattr(host_report, "LITTLE_MEMORY", 2**60)
    texts = found(Asked(processes=2))
    assert {level for level, _ in texts} == {NOTE}
    said = " ".join(text for _, text in texts)
    assert "--shm-size 16g" in said and "ulimit -n" in said and "of memory are free" in said
    assert not [text for _, text in found(Asked(processes=1)) if "shm" in text]


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ((level, text),) = found(Asked(port=port))
    assert level == MEND and f"process {os.getpid()} (" in text and "--master_port" in text


def test_more_processes_than_gpus(monkeypatch, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(host_report, "GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ((level, text),) = found(Asked(processes=4, short=True))
    assert level == MEND and text.startswith("4 processes are to run on 2 GPUs; lower --nproc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "on 1 GPUs" in found(Asked(processes=2, short=True))[0][1]
    assert found(Asked(processes=1, short=True)) == []


def test_packages_that_do_not_belong_together(monkeypatch):
    def refuse():
        raise ValueError("ColossalAI is not installed, which trains; run: pip install x")

    monkeypatch.setattr(host_report, "check_packages", refuse)
    assert found(Asked()) == [
        (MEND, "ColossalAI is not installed, which trains; run: pip install x")
    ]


@pytest.mark.parametrize(
    ("toward", "interface", "shown", "to_mend"),
    [
        ("10.0.0.1", "eth7", "10.0.0.1 on eth7 (its name leads to 127.0.1.1, so this", 0),
        ("127.0.0.1", "lo", "its name leads to 127.0.1.1", 1),
    ],
)
def test_a_name_that_leads_to_loopback(monkeypatch, toward, interface, shown, to_mend):
    monkeypatch.setattr(host_report, "own_address", lambda: "127.0.1.1")
    monkeypatch.setattr(host_report, "addresses_of", lambda other: ["10.0.0.2"])
    monkeypatch.setattr(host_report, "address_toward", lambda other: toward)
    monkeypatch.setattr(host_report, "interface_of", lambda address: interface)
    report = host_report.host_report(Asked(toward="node2"))
    assert report["address"].startswith(shown) and len(report["findings"]) == to_mend


# ---- several hosts, played by this one


class Played(Here):
    """This host as another, with what is different there."""

    def __init__(self, name: str, offset: float = 0.0, root: Path | None = None, **report) -> None:
        super().__init__(name)
        self.offset = offset
        self.root = root
        self.report = report

    def ask(self, request, wait_s=60.0):
        if request["ask"] == "pairs":
            raise PeerFailed("timed out")
        if self.root is not None and request["ask"] == "see":
            return (self.root / Path(request["file"]).name).exists()
        told = super().ask(request, wait_s)
        if request["ask"] == "clock":
            return told + self.offset
        return told | self.report if request["ask"] == "report" else told


def play(monkeypatch, *hosts) -> None:
    there = {one.name: one for one in hosts}
    monkeypatch.setattr(diagnosis, "peer", lambda name: there[name])
    monkeypatch.setattr(diagnosis, "meeting_address", lambda names: names[0])
    monkeypatch.setattr(host_report, "own_address", lambda: "10.0.0.9")


def test_two_hosts_that_are_alike(monkeypatch, tmp_path):
    play(monkeypatch, Played("node1"), Played("node2"))
    told = diagnose(Questions(TWO, str(tmp_path / "run"), short=True))
    assert told.findings == [] and told.shared is True
    assert set(told.clocks) == {"node1", "node2"} and abs(told.clocks["node2"]) < 1
    assert not list(tmp_path.iterdir())


def test_what_differs_is_named_with_both_hosts(monkeypatch, tmp_path):
    packages = environment.installed() | {"torch": "1.0"}
    play(
        monkeypatch,
        Played("node1"),
        Played("node2", 7.0, tmp_path / "own", packages=packages, Python="2.7.18", devices="A, 1"),
    )
    told = diagnose(Questions(TWO, str(tmp_path / "run"), short=True))
    mend = " ".join(one.text for one in told.to_mend)
    assert "torch is " in mend and ", 1.0 on node2; give all hosts the same checkout" in mend
    assert "2.7 on node2" in mend
    assert f"--save_dir {tmp_path}/run: node2 cannot see what node1 writes" in mend
    assert "node2: its clock is 7.0 s ahead; run an NTP client (chrony)" in [
        one.text for one in told.to_note
    ]
    text = page.as_text(told)
    assert "node1" in text and "3 to mend" in text and "mend: torch is" in text


def test_a_host_that_is_not_reached_and_pairs_that_do_not_meet(monkeypatch):
    class Gone(Here):
        def ask(self, request, wait_s=60.0):
            raise PeerFailed("ssh could not connect (no route); `ssh node3 true` must work")

    play(monkeypatch, Played("node1"), Played("node2"), Gone("node3"))
    told = diagnose(Questions([*TWO, Host("node3")]))
    texts = [one.text for one in told.to_mend]
    assert "node3: ssh could not connect (no route); `ssh node3 true` must work" in texts
    assert "node1: the hosts do not reach each other (timed out); open all ports" in texts[-2]


def test_the_agent_answers_line_by_line(tmp_path):
    """As over ssh: what is printed there is no answer, and an error does not end it."""
    requests = [{"ask": "clock"}, {"ask": "write", "place": "/proc/1", "name": "x"}]
    requests.append(peers.report_request(Asked(short=True)))
    ran = subprocess.run(
        [sys.executable, "-m", "coati.recipes.doctor.peers"],
        input="".join(json.dumps(one) + "\n" for one in requests),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    clock, failed, report = map(json.loads, ran.stdout.splitlines())
    assert clock["answer"] > 1.7e9 and "error" in failed
    assert report["answer"]["host"] == socket.gethostname()


def ssh(tmp_path, monkeypatch, body: str) -> None:
    stand_in = tmp_path / "ssh"
    stand_in.write_text(f"#!/bin/bash\n{body}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'no route to host' >&2; exit 255", "ssh could not connect (no route to host); `ssh"),
        ("echo 'No module named coati' >&2; exit 1", "coati could not be started there (No module"),
    ],
)
def test_why_another_host_does_not_answer(tmp_path, monkeypatch, body, said):
    ssh(tmp_path, monkeypatch, body)
    there = peers.There("node9")
    with pytest.raises(PeerFailed) as error:
        there.ask({"ask": "clock"}, 20)
    there.close()
    assert str(error.value).startswith(said)


def test_a_host_that_is_gone_before_it_is_asked_can_be_let_go(tmp_path, monkeypatch):
    ssh(tmp_path, monkeypatch, "exit 255")
    there = peers.There("node9")
    there._process.wait(timeout=20)
    with pytest.raises(PeerFailed, match="ssh could not connect"):
        there.ask({"ask": "clock"}, 20)
    there.close()


def test_another_host_over_ssh(tmp_path, monkeypatch):
    ssh(tmp_path, monkeypatch, 'exec bash -c "${@: -1}"')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    there = peers.There("node9")
    try:
        assert there.ask({"ask": "clock"}, 30) > 1.7e9
        with pytest.raises(PeerFailed, match="No such file|Permission|not permitted|Invalid"):
            there.ask({"ask": "write", "place": "/proc/1", "name": "x"}, 30)
    finally:
        there.close()


# ---- before a start


def look(monkeypatch, tmp_path, **launch) -> None:
    settings = SimpleNamespace(
        launch=LaunchSettings(**{"nproc": 2} | launch),
        output=SimpleNamespace(save_dir=str(tmp_path / "run")),
    )
    preflight.preflight(settings)


def test_a_look_is_silent_when_all_is_well(monkeypatch, tmp_path, capsys):
    look(monkeypatch, tmp_path)
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()


def test_a_look_refuses_what_would_fail_and_warns_of_the_rest(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host_report, "LEAST_FILES", 2**60)
    look(monkeypatch, tmp_path)
    assert "a process may open" in capsys.readouterr().err
    (tmp_path / "run").touch()
    with pytest.raises(RunFailed, match="is no directory; .*--no_preflight starts without"):
        look(monkeypatch, tmp_path)


def test_a_look_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from coati.recipes.doctor.diagnosis import Questions, diagnose\n"
        "from coati.cli.launch_flags import Host\n"
        "diagnose(Questions([Host('localhost')], save_dir='x', short=True))\n"
        "print([m for m in ('torch', 'transformers', 'colossalai', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.stdout.strip() == "[]", ran.stderr


# ---- the verb


def test_the_exit_code_says_whether_something_must_be_mended(tmp_path, capsys):
    from coati.recipes.verbs.doctor import main, parse_doctor

    main(parse_doctor(["--save_dir", str(tmp_path / "run")]))
    assert "nothing to mend" in capsys.readouterr().out
    (tmp_path / "run").touch()
    with pytest.raises(SystemExit) as ended:
        main(parse_doctor(["--save_dir", str(tmp_path / "run"), "--json"]))
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and not told["ok"]
    assert [one["level"] for one in told["findings"]] == ["mend"]


def test_a_hostfile_that_is_not_there_is_refused(capsys):
    from coati.recipes.verbs.doctor import parse_doctor

    with pytest.raises(SystemExit):
        parse_doctor(["--hostfile", "nowhere"])
    assert "--hostfile nowhere: No such file" in capsys.readouterr().err
