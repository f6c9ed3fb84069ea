"""Serving: the address that is printed answers, and what cannot be served is refused in one line."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from headscope.app import dashboard, serve
from headscope.app.server import listen, visible_name
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


def test_any_loopback_address_is_answered_under_its_own_name(synthetic) -> None:
    server = listen(synthetic.path.parent, "127.0.0.2", 0)
    threading.Thread(target=server.run, daemon=True).start()
    with urllib.request.urlopen(f"http://127.0.0.2:{server.effective_port}/", timeout=20) as answer:
        assert answer.status == 200
    assert visible_name("127.0.0.2") == "127.0.0.2"
    assert visible_name("::1") == "localhost"
    assert visible_name("0.0.0.0") == socket.gethostname()


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        serve(tmp_path / "nowhere", port=0)


def test_a_notebook_cell_ends_and_its_server_stays(synthetic) -> None:
    """In a real kernel: Dash's own notebook mode served in the foreground there, and the cell never ended."""
    import nbclient
    import nbformat

    ask = "import re, urllib.request\nprint(urllib.request.urlopen(_servers_address).url)"
    cells = [
        f"from headscope.app import dashboard\ndashboard({str(synthetic.path)!r}, height=700)",
        f"from headscope.app import jupyter\n_servers_address = f'http://127.0.0.1:{{jupyter._servers[-1].effective_port}}/'\n{ask}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbclient.NotebookClient(notebook, timeout=90, kernel_name="python3").execute()
    frame = notebook.cells[0].outputs[0]["data"]["text/html"]
    assert re.search(r'src="http://127\.0\.0\.1:\d+/"', frame)
    assert 'height="700"' in frame
    assert notebook.cells[1].outputs[0]["text"].strip().endswith("/run/tiny")


def test_outside_a_notebook_a_tab_is_opened(synthetic, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    dashboard(synthetic.path)
    dashboard(synthetic.path, mode="external")
    assert len(opened) == 1
    with urllib.request.urlopen(opened[0], timeout=20) as answer:
        assert answer.url == opened[0] + "run/tiny"
    assert capsys.readouterr().out.count("headscope dashboard: http://127.0.0.1:") == 2


def test_importing_the_package_does_not_import_dash() -> None:
    code = "import sys, headscope.app; sys.exit('dash' in sys.modules or 'waitress' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
