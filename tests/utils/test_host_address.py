"""Addresses and ports of this host, with names that lead where Debian's /etc/hosts has them."""

import os
import socket

import pytest

from coati.utils import host_address
from coati.utils.host_address import (
    address_toward,
    hides_from_others,
    interface_of,
    is_loopback,
    own_address,
    port_in_use,
    port_is_free,
    who_listens,
)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("10.77.0.1", False),
        ("fe80::1%eth0", False),
        ("node1", False),
    ],
)
def test_loopback(address, loopback):
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("leads", "own", "hides"),
    [
        (["127.0.1.1"], "127.0.1.1", True),
        ([], None, True),
        (["192.0.2.1"], None, True),  # TEST-NET-1: stale, nobody's
        (["192.0.2.1", "127.0.0.1"], "127.0.0.1", True),
    ],
)
def test_a_name_that_leads_only_to_its_own_host(monkeypatch, leads, own, hides):
    monkeypatch.setattr(host_address, "addresses_of", lambda name: leads)
    assert own_address() == own and hides_from_others() is hides


def test_a_name_that_others_can_use(monkeypatch):
    monkeypatch.setattr(host_address, "addresses_of", lambda name: ["127.0.1.1", "10.1.2.3"])
    monkeypatch.setattr(host_address, "is_own", lambda address: address == "10.1.2.3")
    assert own_address() == "10.1.2.3" and not hides_from_others()


def test_the_way_to_this_host_is_loopback_and_its_interface_has_a_name():
    assert address_toward("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert address_toward("no-such-host.invalid") is None


def test_who_listens_on_a_port_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        taken.listen()
        assert not port_is_free(port)
        assert f"process {os.getpid()} (" in who_listens(port)
        assert port_in_use(port).startswith(f"port {port} of {socket.gethostname()} is in use by")
    assert port_is_free(port) and who_listens(port) is None
