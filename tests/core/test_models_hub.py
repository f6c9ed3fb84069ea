"""Hub ids against a small hub on the loopback address: fetched, pinned to a commit, used offline, and refused in one line each."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from headscope.errors import ModelError
from headscope.models import load, network

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's HTTP interface for model_info, the file tree and downloads. `files` is set per server."""

    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self.api(path.removeprefix("/api/models/"))
            return
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repo not in ("org/tiny", "org/cut") or name not in self.files:
            self.fail(404, "EntryNotFound")
            return
        self.file(self.files[name], cut=repo == "org/cut" and name.endswith(".safetensors"))

    def api(self, path: str) -> None:
        repo = "/".join(path.split("/")[:2])
        rest = path.split("/")[2:]
        if repo == "org/gated":
            self.fail(403, "GatedRepo")
        elif repo not in ("org/tiny", "org/cut", "org/gguf"):
            self.fail(401, "RepoNotFound")
        elif rest and rest[1] not in ("main", COMMIT):
            self.fail(404, "RevisionNotFound")
        else:
            names = ["README.md", "model.Q4_1.gguf"] if repo == "org/gguf" else list(self.files)
            tree = [{"type": "file", "path": n, "size": len(self.files.get(n, b"")), "oid": "0" * 40} for n in names]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.reply(json.dumps(tree if rest[:1] == ["tree"] else info).encode(), {"Content-Type": "application/json"})

    def file(self, data: bytes, cut: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.reply(data, headers, cut)

    def fail(self, status: int, code: str) -> None:
        self.reply(b"", {"X-Error-Code": code, "X-Error-Message": code}, status=status)

    def reply(self, data: bytes, headers: dict[str, str], cut: bool = False, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut


@pytest.fixture
def hub(tiny_llama: torch.nn.Module, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    tiny_llama.save_pretrained(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    files |= {"pytorch_model.bin": b"never fetched", "README.md": b"never fetched", "onnx/model.onnx": b"never fetched"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("TinyHub", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CLIENT = """
import json, sys, time
import headscope as hs

def attempt(spec, **options):
    began = time.monotonic()
    try:
        scope = hs.load(spec, **options)
        found = {"name": scope.name, "source": scope.source, "revision": scope.revision,
                 "sum": float(sum(p.double().sum() for p in scope.model.parameters()))}
    except hs.errors.ModelError as error:
        found = {"error": type(error).__name__, "says": str(error)}
    return {**found, "seconds": time.monotonic() - began}

for line in sys.stdin:
    spec, options = json.loads(line)
    print(json.dumps(attempt(spec, **options)), flush=True)
"""


@pytest.fixture
def ask(hub: ThreadingHTTPServer, tmp_path: Path) -> Iterator:
    """A process that loads what it is asked for, with that hub and an empty cache. (The hub client reads both when it is imported.)"""
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    with subprocess.Popen([sys.executable, "-c", CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def load_there(spec: str, **options: object) -> dict:
            child.stdin.write(json.dumps([spec, options]) + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        yield load_there
        child.stdin.close()


def test_fetched_pinned_and_offline_from_then_on(ask, hub: ThreadingHTTPServer, tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    missing = ask("org/tiny", offline=True)
    assert (missing["error"], "offline=True was given" in missing["says"]) == ("ModelError", True)

    found = ask("org/tiny")
    assert {name: found[name] for name in ("name", "source", "revision")} == {
        "name": "org/tiny",
        "source": "hub:org/tiny",
        "revision": COMMIT,
    }
    assert found["sum"] == pytest.approx(float(sum(p.double().sum() for p in tiny_llama.parameters())), rel=1e-12)
    snapshot = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]

    for spec, says in {
        "org/none": "the hub has no such model, or it is private",
        "org/gated": "access to it has to be granted",
        "org/tiny@v9": "it has no such revision",
        "org/gguf": "has no weights that transformers reads",
    }.items():
        refused = ask(spec)
        assert refused["error"] == "ModelError", refused
        assert says in refused["says"]

    hub.shutdown()
    hub.server_close()
    for spec, options in (("org/tiny", {}), ("org/tiny", {"offline": True}), (f"org/tiny@{COMMIT}", {})):
        again = ask(spec, **options)
        assert again.get("revision") == COMMIT, again
        assert again["sum"] == found["sum"]
        assert again["seconds"] < 10
    away = ask("org/other")
    assert away["error"] == "DownloadError"
    assert "cannot be reached, and the model is not in the local cache" in away["says"]
    assert away["seconds"] < 10


def test_an_interrupted_download_is_an_error_and_no_model(ask) -> None:
    cut = ask("org/cut")
    assert cut["error"] == "DownloadError"
    assert "interrupted" in cut["says"]
    half = ask("org/cut", offline=True)
    assert half["error"] == "ModelError"
    assert "not in the local cache" in half["says"]


def test_hub_offline_variable_is_honoured_at_once() -> None:
    with pytest.raises(ModelError, match="model org/never-cached: it is not in the local cache, and HF_HUB_OFFLINE is set"):
        load("org/never-cached")


def test_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.reachable(f"http://127.0.0.1:{port}")
    assert not network.reachable(f"http://127.0.0.1:{port}")


def test_reachable_asks_the_proxy_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert network.reachable("https://hub.invalid")
    assert not network.reachable("https://hub.invalid")


def test_reachable_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that never answers has no time limit of its own."""
    done = threading.Event()

    def never(*_: object, **__: object) -> None:
        done.wait(30)
        raise OSError

    monkeypatch.setattr(network.socket, "create_connection", never)
    assert not network.reachable("https://hub.invalid", timeout=0.2)
    done.set()
