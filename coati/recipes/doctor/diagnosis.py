"""All hosts of a run side by side: what each has, in what they differ, what they share, how fast
they reach each other."""

import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coati.cli.launch_flags import PORT, Host
from coati.recipes.doctor.host_report import MEND, NOTE, Asked, Finding
from coati.recipes.doctor.peers import Peer, PeerFailed, ask_all, peer, report_request
from coati.recipes.launcher import meeting_address
from coati.utils.host_address import port_is_free

CLOCK_ROUNDS = 3
CLOCK_S = 2.0  # from here on, times of files and logs mislead
SSH_S = 40.0
PAIRS_S = 120.0


@dataclass(frozen=True)
class Questions:
    """What to look at. ``save_dir``, ``port``: of the run; ``nproc``: processes of a host that does
    not say its own; ``short``: only what takes no time, and no speed."""

    hosts: list[Host]
    save_dir: str | None = None
    port: int | None = None
    master_addr: str | None = None
    nproc: int = 1
    short: bool = False


@dataclass
class Diagnosis:
    """``reports``: host -> subject -> what was found; ``clocks``: host -> seconds ahead of this
    one; ``pairs``: "node1 - node2" -> latency_ms and mib_per_s."""

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, dict[str, float]] = field(default_factory=dict)
    shared: bool | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def to_mend(self) -> list[Finding]:
        return [one for one in self.findings if one.level == MEND]

    @property
    def to_note(self) -> list[Finding]:
        return [one for one in self.findings if one.level == NOTE]


def diagnose(questions: Questions) -> Diagnosis:
    """Look at every host. Raises nothing: what cannot be looked at is a finding."""
    found = Diagnosis()
    with _peers(questions.hosts) as peers:
        _report(questions, peers, found)
        reached = [one for one in peers if one.name in found.reports]
        if len(peers) == 1:
            return found
        _compare(found)
        _compare_clocks(reached, found)
        if questions.save_dir is not None and len(reached) > 1:
            _share(questions.save_dir, reached, found)
        if not questions.short and len(reached) > 1:
            _measure(questions, reached, found)
    return found


@contextmanager
def _peers(hosts: Sequence[Host]) -> Iterator[list[Peer]]:
    peers = [peer(host.name) for host in hosts]
    try:
        yield peers
    finally:
        for one in peers:
            one.close()


def _report(questions: Questions, peers: Sequence[Peer], found: Diagnosis) -> None:
    hosts = questions.hosts
    several = len(hosts) > 1
    requests = []
    for index, host in enumerate(hosts):
        other = hosts[1 if index == 0 else 0].name if several else None
        port = (questions.port or (PORT if several else None)) if index == 0 else None
        processes = host.slots or questions.nproc
        asked = Asked(questions.save_dir, port, processes, other, questions.short)
        requests.append(report_request(asked))
    for one, told in zip(peers, ask_all(peers, requests, SSH_S), strict=True):
        if isinstance(told, PeerFailed):
            what, _, remedy = str(told).partition("; ")
            found.findings.append(Finding(MEND, one.name, what, remedy or "look at it there"))
            continue
        found.findings += [Finding(**finding) for finding in told.pop("findings")]
        found.reports[one.name] = told
    if several and found.reports.get(peers[0].name, {}).get("ssh") == "none":
        found.findings.append(
            Finding(MEND, peers[0].name, "there is no ssh", "install an OpenSSH client")
        )


def _compare(found: Diagnosis) -> None:
    """What has to be the same on all hosts."""
    for name, level in (("coati", MEND), ("Python", MEND), ("devices", NOTE), ("system", None)):
        if level is not None:
            values = {host: _plain(name, report[name]) for host, report in found.reports.items()}
            _differ(found, name, values, level)
    packages = dict.fromkeys(n for one in found.reports.values() for n in one["packages"])
    for name in packages:
        values = {host: one["packages"].get(name) for host, one in found.reports.items()}
        _differ(found, name, values, MEND)


def _plain(name: str, value: Any) -> Any:
    """Without what may differ: patch releases of Python, free memory of a GPU."""
    if name == "Python":
        return ".".join(value.split(".")[:2])
    if name == "devices":
        return "; ".join(one.rpartition(",")[0] or one for one in value.split("; "))
    return value


def _differ(found: Diagnosis, name: str, values: dict[str, Any], level: str) -> None:
    if len(set(values.values())) < 2:
        return
    shown = ", ".join(f"{value or 'missing'} on {host}" for host, value in values.items())
    remedy = (
        "give all hosts the same checkout and virtual environment"
        if level == MEND
        else "a run is as fast as its slowest device"
    )
    found.findings.append(Finding(level, "", f"{name} is {shown}", remedy))


def _compare_clocks(peers: Sequence[Peer], found: Diagnosis) -> None:
    for one in peers:
        try:
            rounds = [_offset(one) for _ in range(CLOCK_ROUNDS)]
        except PeerFailed:
            continue
        offset = min(rounds)[1]
        found.clocks[one.name] = offset
        if abs(offset) > CLOCK_S:
            what = f"its clock is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}"
            found.findings.append(Finding(NOTE, one.name, what, "run an NTP client (chrony)"))


def _offset(one: Peer) -> tuple[float, float]:
    """(seconds that asking took, seconds that the clock there is ahead of the one here)."""
    started = time.time()
    there = one.ask({"ask": "clock"}, 10)
    ended = time.time()
    return ended - started, there - (started + ended) / 2


def _share(save_dir: str, peers: Sequence[Peer], found: Diagnosis) -> None:
    name = f".coati-probe-{secrets.token_hex(8)}"
    place = str(Path(save_dir).absolute())
    try:
        file = peers[0].ask({"ask": "write", "place": place, "name": name})
    except PeerFailed:
        return  # its own report says that it cannot be written
    try:
        seen = ask_all(peers[1:], [{"ask": "see", "file": file}] * (len(peers) - 1))
    finally:
        peers[0].ask({"ask": "remove", "file": file})
    blind = [one.name for one, sees in zip(peers[1:], seen, strict=True) if sees is not True]
    found.shared = not blind
    if blind:
        what = f"--save_dir {save_dir}: {', '.join(blind)} cannot see what {peers[0].name} writes"
        remedy = "name a directory of a file system that all hosts share"
        found.findings.append(Finding(MEND, "", what, remedy))


def _measure(questions: Questions, peers: Sequence[Peer], found: Diagnosis) -> None:
    names = [one.name for one in peers]
    address = questions.master_addr or meeting_address(names)
    group = {
        "world_size": len(peers),
        "address": address,
        "port": _spare_port(questions.port or PORT),
        "device": "cuda" if _all_have_gpus(found, names) else "cpu",
    }
    requests = [{"ask": "pairs", "group": {**group, "rank": who}} for who in range(len(peers))]
    told = ask_all(peers, requests, PAIRS_S)
    for one, pairs in zip(peers, told, strict=True):
        if isinstance(pairs, PeerFailed):
            what = f"the hosts do not reach each other ({str(pairs).splitlines()[0]})"
            remedy = (
                f"open all ports between them in the firewall, and see that {address} is the first "
                "host's address on the others (--master_addr)"
            )
            found.findings.append(Finding(MEND, one.name, what, remedy))
            continue
        for pair, speed in pairs.items():
            first, second = map(int, pair.split("-"))
            found.pairs[f"{names[first]} - {names[second]}"] = speed


def _all_have_gpus(found: Diagnosis, names: Sequence[str]) -> bool:
    return all(found.reports[name]["devices"] != "none" for name in names)


def _spare_port(port: int) -> int:
    """``port``; where that is taken, which is a finding of its own, one that is free here."""
    if port_is_free(port):
        return port
    with socket.socket() as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])
