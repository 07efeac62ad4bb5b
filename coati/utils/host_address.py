"""By which address and interface this host is seen from others, and who listens on its ports.

Imports nothing heavy; what only Linux tells is None elsewhere.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

ANY_PORT = 9  # of a datagram that is never sent: connecting one only chooses a route
SIOCGIFADDR = 0x8915  # netdevice(7)
LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


def is_loopback(address: str) -> bool:
    """Whether ``address`` (numbers) reaches only the host itself: 127.0.0.1, Debian's 127.0.1.1,
    ::1."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def addresses_of(name: str) -> list[str]:
    """The addresses that ``name`` resolves to on this host, in the system's order; [] for none."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_own(address: str) -> bool:
    """Whether ``address`` can be bound, and so is this host's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind((address, 0))
    except OSError:
        return False
    return True


def own_address() -> str | None:
    """The address under which gloo would offer itself: the first of this host's own name that can
    be bound; None where there is none (gloo then takes loopback)."""
    return next(filter(is_own, addresses_of(socket.gethostname())), None)


def hides_from_others() -> bool:
    """Whether this host's own name leads only to itself, as with ``127.0.1.1 name`` in
    /etc/hosts."""
    address = own_address()
    return address is None or is_loopback(address)


def address_toward(host: str) -> str | None:
    """The address of this host that packets to ``host`` carry; None where no route is known."""
    for address in addresses_of(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as trial:
                trial.connect((address, ANY_PORT))
                return str(trial.getsockname()[0])
        except OSError:
            continue
    return None


def interface_of(address: str) -> str | None:
    """The name of the network interface that has ``address``."""
    if ":" in address:
        return _interface_of_ipv6(address)
    for _, name in socket.if_nameindex():
        if _ipv4_of(name) == address:
            return name
    return None


def _ipv4_of(interface: str) -> str | None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, SIOCGIFADDR, interface.encode()[:15].ljust(256, b"\0"))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


def _interface_of_ipv6(address: str) -> str | None:
    wanted = ipaddress.ip_address(address.partition("%")[0]).exploded.replace(":", "")
    for words in _lines_of(Path("/proc/net/if_inet6")):
        if words[0] == wanted:
            return words[-1]
    return None


def port_is_free(port: int, address: str = "") -> bool:
    """Whether this host can listen on ``port``."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address, port))
        except PermissionError:
            return False
        except OSError:
            return False
    return True


def who_listens(port: int) -> str | None:
    """``process 1234 (python serve.py)``: who listens on ``port`` of this host; None where that is
    not to be read (another user's process)."""
    sockets = {
        f"socket:[{words[9]}]"
        for table in ("tcp", "tcp6")
        for words in _lines_of(Path("/proc/net") / table)
        if len(words) > 9 and words[3] == LISTENING and int(words[1].rpartition(":")[2], 16) == port
    }
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        try:
            if any(os.readlink(link) in sockets for link in (process / "fd").iterdir()):
                return f"process {process.name} ({_command_of(process)})"
        except OSError:  # gone, or another user's
            continue
    return None


def _command_of(process: Path) -> str:
    words = (process / "cmdline").read_bytes().split(b"\0")
    text = " ".join(word.decode(errors="replace") for word in words if word)
    return text if len(text) <= 80 else f"{text[:77]}..."


def port_in_use(port: int) -> str:
    """``port 29500 of node1 is in use by process 1234 (python serve.py)``."""
    who = who_listens(port)
    return f"port {port} of {socket.gethostname()} is in use" + (f" by {who}" if who else "")


def _lines_of(table: Path) -> Iterator[list[str]]:
    try:
        text = table.read_text()
    except OSError:
        return
    yield from (line.split() for line in text.splitlines())
