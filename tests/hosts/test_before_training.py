"""Faults of two hosts that are found before a model is loaded: all processes end, with one message
that names the hosts."""

import json
import shutil

import pytest

from tests.end_to_end.inputs import prepare, short_lines, write_model
from tests.hosts.conftest import DEBIAN, ROOT, Ended

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    prepare(folder / "data", short_lines(0, 48))
    prepare(folder / "other", short_lines(60, 48))
    (folder / "raw.jsonl").write_text(short_lines(0, 24))
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    return folder


@pytest.fixture
def words(place, tmp_path):
    def made(**flags: str) -> list[str]:
        given = {
            "pretrain": f"{place}/model",
            "dataset": f"{place}/data/arrow",
            "save_dir": f"{tmp_path}/run",
            "max_length": "96",
            "batch_size": "2",
            "accumulation_steps": "1",
            "max_steps": "2",
            "plugin": "ddp",
            "mixed_precision": "fp32",
        }
        return ["sft", *(one for n, v in (given | flags).items() for one in (f"--{n}", v))]

    return made


def refused(ranks: list[Ended], *said: str) -> None:
    """Both end with code 1 and the same message, without a traceback."""
    for who, one in enumerate(ranks):
        print(f"rank {who}: code {one.code} after {one.seconds:.0f} s: {one.err[-600:]}")
        assert one.code == 1
        assert "Traceback" not in one.err
        for part in said:
            assert part in one.err


def test_a_directory_that_is_not_shared(hosts, words, tmp_path):
    ranks = hosts.ranks(words(save_dir="/mnt/local/run"))
    refused(
        ranks,
        "--save_dir /mnt/local/run is not the same directory on all hosts: node2 (rank 1) does not "
        "see what node1 (rank 0) writes there",
    )
    for host in (1, 2):
        assert not list((hosts.state / f"node{host}" / "local").iterdir())


def test_other_flags_rows_and_weights(hosts, words, place, tmp_path):
    own = {
        1: ["--lr", "1e-5", "--seed", "1"],
        2: ["--lr", "2e-5", "--seed", "2", "--pretrain", str(tmp_path / "other")],
    }
    shutil.copytree(place / "model", tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    stored = bytearray(weights.read_bytes())
    stored[-1] ^= 1
    weights.write_bytes(stored)
    ranks = hosts.ranks(words(), own)
    refused(
        ranks,
        "--lr is 1e-05 on node1 (rank 0), 2e-05 on node2 (rank 1)",
        "--seed is 1 on node1 (rank 0), 2 on node2 (rank 1)",
        "--pretrain/model.safetensors is ",
    )
    assert not (tmp_path / "run").exists()


def test_other_rows(hosts, words, place):
    ranks = hosts.ranks(words(), {2: ["--dataset", f"{place}/other/arrow"]})
    refused(ranks, "--dataset is ", " rows (hash ", "on node1 (rank 0)", "on node2 (rank 1)")


def test_another_state_of_the_library(hosts, words, tmp_path):
    other = tmp_path / "checkout"
    shutil.copytree(ROOT / "coati", other / "coati")
    shutil.copytree(ROOT / "config", other / "config")
    with open(other / "coati" / "models" / "loss.py", "a") as stream:
        stream.write("# another state\n")
    ranks = hosts.ranks(words(), PYTHONPATH_AT_2=str(other), CUBLAS_WORKSPACE_CONFIG_AT_1=":4096:8")
    refused(
        ranks,
        "coati is 0.",
        "CUBLAS_WORKSPACE_CONFIG is :4096:8 on node1 (rank 0), not given on node2 (rank 1)",
        "the same checkout",
    )


def test_names_that_lead_to_loopback(hosts, words, tmp_path):
    """Debian's 127.0.1.1: rank by rank it is done right, and said."""
    hosts.names(DEBIAN)
    ranks = hosts.ranks(words())
    assert [one.code for one in ranks] == [0, 0], [one.err[-1000:] for one in ranks]
    assert "the name node1 leads to 127.0.1.1 on its own host: gloo is told to use eth0" in (
        ranks[0].err
    )
    assert (tmp_path / "run" / "modeling").is_dir()


def test_a_hostfile_with_names_that_lead_to_loopback(hosts, words, place, tmp_path):
    """Raw rows, prepared into a cache that the hosts share, by whichever comes first."""
    hosts.names(DEBIAN)
    given = words(dataset=f"{place}/raw.jsonl")
    ended = hosts.run(1, ["-m", "coati", *given, "--hostfile", f"{place}/hostfile"])
    assert ended.code == 0, ended.err[-2000:]
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [one["host"] for one in record["processes"]] == ["node1", "node2"]


def test_a_master_that_only_its_own_host_knows(hosts, words):
    ranks = hosts.ranks(
        words(), MASTER_ADDR_AT_1="10.77.0.1", MASTER_ADDR_AT_2="elsewhere.example.invalid"
    )
    print([(one.code, one.seconds, one.err[-500:]) for one in ranks])
    assert [one.code for one in ranks] == [1, 1]
    assert "no address is known for elsewhere.example.invalid" in ranks[1].err
    assert "no sign of rank 1 of 2" in ranks[0].err


def test_a_port_in_use(hosts, words, place):
    """Without a launcher, and before one starts anything."""
    listener = hosts.start(1, ["-u", "-m", "http.server", "29555"])
    hosts.wait_for(listener.files[0], "Serving HTTP")
    ranks = hosts.ranks(words())
    port = ["--hostfile", f"{place}/hostfile", "--master_port", "29555"]
    launched = hosts.run(1, ["-m", "coati", *words(), *port])
    print([(one.code, one.seconds, one.err[-700:]) for one in (*ranks, launched)])
    assert [one.code for one in ranks] == [1, 1]
    assert "rank 0: port 29555 of node1 is in use by process " in ranks[0].err
    assert "http.server" in ranks[0].err and "--master_port" in ranks[0].err
    assert "no sign of rank 0" in ranks[1].err
    assert launched.code == 1
    assert "port 29555 of node1 is in use by process " in launched.err
    assert "Traceback" not in ranks[0].err + ranks[1].err + launched.err


def test_the_doctor_sees_both_hosts(hosts, place, tmp_path):
    words = ["-m", "coati", "doctor", "--hostfile", f"{place}/hostfile", "--save_dir"]
    good = hosts.run(1, [*words, f"{tmp_path}/run", "--json"])
    assert good.code == 0, good.err + good.out
    found = json.loads(good.out)
    assert found["ok"] and found["shared"] and list(found["reports"]) == ["node1", "node2"]
    assert list(found["pairs"]) == ["node1 - node2"]
    assert found["pairs"]["node1 - node2"]["mib_per_s"] > 0
    assert set(found["clocks"]) == {"node1", "node2"}
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".coati-*"))
    bad = hosts.run(1, [*words, "/mnt/local/run"])
    print(bad.out)
    assert bad.code == 1
    assert "--save_dir /mnt/local/run: node2 cannot see what node1 writes" in bad.out


def test_the_look_before_a_start(hosts, words, place, tmp_path):
    """What is not shared, or not reached, is refused before any process is started."""
    words = ["-m", "coati", *words(save_dir="/mnt/local/run"), "--hostfile"]
    ended = hosts.run(1, [*words, f"{place}/hostfile"])
    print(ended.code, ended.seconds, ended.err)
    assert ended.code == 1 and "node2 cannot see what node1 writes" in ended.err
    far = tmp_path / "far"
    far.write_text("node1 slots=1\nnode3 slots=1\n")
    ended = hosts.run(1, [*words, str(far)])
    print(ended.code, ended.seconds, ended.err)
    assert ended.code == 1 and "node3: ssh could not connect" in ended.err
