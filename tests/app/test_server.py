"""Serving: the address that is printed answers, and what cannot be served is refused in one line."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from headscope.app import dashboard, serve
from headscope.errors import RunError, UnavailableError


def test_the_printed_address_answers(synthetic) -> None:
    code = f"from headscope.app import serve; serve({str(synthetic.path)!r}, port=0)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"headscope dashboard: (http://127\.0\.0\.1:\d+/)", line)
            assert found, line
            with urllib.request.urlopen(found[1], timeout=20) as answer:
                assert answer.status == 200
                assert answer.url == found[1] + "run/tiny"
        finally:
            process.terminate()


def test_a_taken_port_is_refused_with_what_to_do(synthetic) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UnavailableError, match="choose another port"):
            serve(synthetic.path, port=taken.getsockname()[1])


def test_an_open_host_needs_a_token(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADSCOPE_TOKEN", raising=False)
    with pytest.raises(UnavailableError, match="--token"):
        serve(synthetic.path, host="0.0.0.0", port=0)


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        serve(tmp_path / "nowhere", port=0)


def test_a_notebook_gets_the_application_on_this_machine(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("dash.Dash.run", lambda app, **options: seen.update(options))
    dashboard(synthetic.path, mode="tab", height=700)
    assert seen["host"] == "127.0.0.1"
    assert seen["jupyter_mode"] == "tab"
    assert seen["jupyter_height"] == 700
    assert isinstance(seen["port"], int)
    assert seen["port"] > 0
