"""--push_to_hub: what goes up and what stays, against a hub on this machine."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from coati.cli.hub_flags import check_hub_id
from coati.inference.export.hub_upload import check_hub, files_to_upload, upload
from coati.models import ilql_heads


class Hub:
    """In the hub's place: what was asked of it, in order."""

    def __init__(self, there: bool = False, status: int = 200) -> None:
        self.there = there
        self.status = status
        self.asked: list[tuple[str, str, str]] = []

    def answer(self, verb: str, path: str, body: str):
        self.asked.append((verb, path, body))
        if self.status != 200:
            return self.status, {"error": "you may not"}
        if path.startswith("/api/whoami"):
            return 200, {"name": "me", "type": "user"}
        if path.startswith("/api/repos/create"):
            return 200, {"url": "https://huggingface.co/me/model", "name": "me/model"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            kinds = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return 200, {"files": kinds}
        if "/commit/" in path:
            url = "https://huggingface.co/me/model/commit/abc"
            return 200, {"success": True, "commitOid": "abc", "commitUrl": url}
        if re.fullmatch(r"/api/models/me/model(/revision/main)?(\?.*)?", path):
            found = {"id": "me/model", "modelId": "me/model", "sha": "abc", "siblings": []}
            return (200, found) if self.there else (404, {"error": "not found"})
        return 200, {}

    @property
    def committed(self) -> list[str]:
        lines = [body for _, path, body in self.asked if "/commit/" in path][0].splitlines()
        rows = map(json.loads, lines)
        return sorted(row["value"]["path"] for row in rows if row["key"] == "file")


@contextmanager
def serving(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size).decode("utf-8", "replace")
            status, found = hub.answer(self.command, self.path, body)
            text = json.dumps(found).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "Modelfile"):
        (folder / name).write_text("{}")
    for name in ("arguments.json", "metrics.jsonl", "run.log", "environment.json"):
        (folder / name).write_text("{}")
    (folder / "epoch-0_step-3").mkdir()
    return folder


@pytest.fixture
def at(monkeypatch):
    """Sets the hub's address."""

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")

    return use


PUBLIC = ["Modelfile", "README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_the_model_goes_up_and_the_run_s_own_files_stay(model):
    found = files_to_upload(model)
    assert [file.name for file in found.files] == PUBLIC
    assert sorted(found.left) == [
        "arguments.json",
        "environment.json",
        "epoch-0_step-3",
        "metrics.jsonl",
        "run.log",
    ]


def test_how_the_base_of_an_adapter_was_quantized_goes_along(model):
    (model / "lora_config.json").write_text('{"quantize_base": "nf4"}')
    assert "lora_config.json" in [file.name for file in files_to_upload(model).files]


def test_the_heads_that_a_model_decodes_by_go_along(model):
    (model / ilql_heads.FILE).write_bytes(b"x")
    assert ilql_heads.FILE in [file.name for file in files_to_upload(model).files]


def test_a_link_out_of_the_directory_ends_it(model, tmp_path):
    (tmp_path / "passwords").write_text("x")
    (model / "LICENSE").symlink_to(tmp_path / "passwords")
    with pytest.raises(ValueError, match="LICENSE leads out of the directory"):
        files_to_upload(model)
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(model / "README.md")
    assert "LICENSE" in [file.name for file in files_to_upload(model).files]


@pytest.mark.parametrize("name", [".env", "server.pem", "id_rsa", "my_secret.json"])
def test_a_private_file_ends_it(model, name):
    (model / name).write_text("x")
    with pytest.raises(ValueError, match="looks private"):
        files_to_upload(model)


@pytest.mark.parametrize(
    "text", ["hf_" + "a" * 34, "sk-" + "b" * 40, "-----BEGIN RSA PRIVATE KEY-----"]
)
def test_a_file_that_holds_a_secret_ends_it_without_showing_it(model, text):
    (model / "README.md").write_text(f"use {text}")
    with pytest.raises(ValueError, match="looks like a token") as raised:
        files_to_upload(model)
    assert text not in str(raised.value)


def test_a_folder_without_weights_is_no_model(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        files_to_upload(model)


def test_it_is_uploaded_into_a_new_private_repository(model, at):
    hub = Hub()
    with serving(hub) as server:
        at(server.url)
        check_hub("me/model")
        assert upload(model, "me/model") == f"{server.url}/me/model"
    [made] = [json.loads(body) for _, path, body in hub.asked if path.startswith("/api/repos")]
    assert made.get("private") is True or made.get("visibility") == "private"
    assert hub.committed == PUBLIC


def test_a_repository_that_is_there_stays_as_it_is(model, at):
    hub = Hub(there=True)
    with serving(hub) as server:
        at(server.url)
        upload(model, "me/model")
    assert not any(path.startswith("/api/repos/create") for _, path, _ in hub.asked)
    assert hub.committed == PUBLIC


def test_what_the_hub_refuses_leaves_the_model_and_says_how_to_go_on(model, at):
    with serving(Hub(status=403)) as server:
        at(server.url)
        with pytest.raises(
            ValueError, match=r"--push_to_hub me/model: .*403.*token that may write"
        ):
            check_hub("me/model")
        with pytest.raises(ValueError, match="hf upload me/model"):
            upload(model, "me/model")
    assert (model / "model.safetensors").is_file()


def test_offline_is_said(model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_hub("me/model")


@pytest.mark.parametrize(
    "name", ["me", "me/", "/x", "me/a/b", "me/a b", "me/a--b", "true", "../x", "mé/a"]
)
def test_what_is_no_repository_is_refused(name):
    with pytest.raises(ValueError, match="--push_to_hub .*OWNER/NAME"):
        check_hub_id(name)
    check_hub_id("me/Model-1.2_x")
    check_hub_id(None)
