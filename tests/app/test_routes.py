"""Who gets an answer: Host header, token, paths that try to escape, request size, and what every answer carries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import pytest

from headscope.app.factory import create_app
from headscope.app.security import TOKEN_COOKIE, check_host, is_loopback
from headscope.errors import RunError, UnavailableError

LOCAL = {"Host": "localhost:8050"}


def open_page(client, pathname: str, search: str = "") -> str:
    """What the router callback answers for an address, as the browser asks for it."""
    body = {
        "output": ".._pages_content.children..._pages_store.data..",
        "outputs": [{"id": "_pages_content", "property": "children"}, {"id": "_pages_store", "property": "data"}],
        "inputs": [
            {"id": "_pages_location", "property": "pathname", "value": pathname},
            {"id": "_pages_location", "property": "search", "value": search},
        ],
        "changedPropIds": ["_pages_location.pathname"],
    }
    client.get("/", headers=LOCAL)
    answer = client.post("/_dash-update-component", json=body, headers=LOCAL)
    assert answer.status_code == 200
    return answer.get_data(as_text=True)


@pytest.fixture
def client(app):
    return app.server.test_client()


@pytest.mark.parametrize("path", ["/", "/run/tiny", "/run/tiny/head/1/2?plane=max", "/_dash-layout", "/_dash-dependencies"])
def test_pages_answer_on_loopback_names(client, path: str) -> None:
    for host in ("localhost:8050", "127.0.0.1:8050", "127.0.0.1"):
        assert client.get(path, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8050", "192.168.0.7:8050", "evil.example:8050"]
)
@pytest.mark.parametrize("path", ["/", "/_dash-layout", "/_dash-update-component", "/assets/headscope.js"])
def test_other_names_are_refused(client, host: str, path: str) -> None:
    method = client.post if path.endswith("component") else client.get
    assert method(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize(
    "run",
    [
        "..",
        "../../etc",
        "..%2F..%2Fetc",
        "%2e%2e/%2e%2e/etc/passwd",
        "tiny/../../etc",
        quote("../../etc/passwd", safe=""),
        "nope",
        "tiny%00",
    ],
)
def test_no_address_leads_out_of_the_runs(client, run: str) -> None:
    for suffix in ("", "/head/0/0"):
        answer = open_page(client, f"/run/{run}{suffix}")
        assert "cannot be shown" in answer or "no such head" in answer
        assert "root:" not in answer


def test_a_query_cannot_change_the_run(client) -> None:
    assert "cannot be shown" in open_page(client, "/run/tiny", "?run=../outside")
    assert "cannot be shown" in open_page(client, "/run/tiny", "?run=tiny&run=other")
    assert "no such head" in open_page(client, "/run/tiny/head/0/0", "?layer=-1")
    assert "no such head" in open_page(client, "/run/tiny/head/0/0", "?layer=0&layer=1")


def test_assets_stay_in_their_folder(client) -> None:
    for path in ("/assets/../factory.py", "/assets/%2e%2e/factory.py", "/assets/..%2f..%2fpyproject.toml"):
        assert b"create_app" not in client.get(path, headers=LOCAL).data
    assert client.get("/assets/headscope.css", headers=LOCAL).status_code == 200


def test_every_answer_forbids_outside_resources(client) -> None:
    for path in ("/", "/assets/headscope.css", "/_dash-layout"):
        headers = client.get(path, headers=LOCAL).headers
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"


def test_nothing_in_the_document_or_the_assets_comes_from_elsewhere(client) -> None:
    document = client.get("/", headers=LOCAL).get_data(as_text=True)
    assert re.findall(r"(?:src|href)=\"(?!/)[^\"]*\"", document) == []
    folder = Path(__file__).parents[2] / "app" / "assets"
    for name in ("headscope.css", "headscope.js"):
        assert "//" not in re.sub(r"/\*.*?\*/", "", (folder / name).read_text(), flags=re.DOTALL)


def test_large_answers_are_packed_and_the_same(client) -> None:
    import gzip

    document = client.get("/", headers=LOCAL).get_data(as_text=True)
    scripts = [*re.findall(r'src="(/[^"]+)"', document), "/_dash-component-suites/plotly/package_data/plotly.min.js"]
    for path in scripts:
        packed = client.get(path, headers={**LOCAL, "Accept-Encoding": "gzip, br"})
        assert len(packed.data) < 2_000_000, path
        plain = client.get(path, headers=LOCAL)
        assert "Content-Encoding" not in plain.headers
        if len(plain.data) > 4_096:
            assert packed.headers["Content-Encoding"] == "gzip"
            assert "Accept-Encoding" in packed.headers["Vary"]
            assert gzip.decompress(packed.data) == plain.data
    assert max(len(client.get(path, headers=LOCAL).data) for path in scripts) > 4_000_000
    small = client.get("/assets/logo.svg", headers={**LOCAL, "Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in small.headers


def test_a_large_request_is_refused(client) -> None:
    body = json.dumps({"output": "x", "inputs": ["y" * (1 << 20)]})
    assert client.post("/_dash-update-component", data=body, content_type="application/json", headers=LOCAL).status_code == 413


def test_a_form_from_another_page_cannot_call_back(client) -> None:
    answer = client.post("/_dash-update-component", data="{}", content_type="text/plain", headers=LOCAL)
    assert answer.status_code == 415


def test_a_token_opens_the_door_once_and_leaves_the_address(synthetic) -> None:
    client = create_app(synthetic.path.parent, token="s3cret").server.test_client()
    far = {"Host": "gpu-box.example:8050"}
    assert client.get("/", headers=far).status_code == 401
    assert client.get("/?token=wrong", headers=far).status_code == 401
    assert client.get("/assets/headscope.js", headers=far).status_code == 401
    answer = client.get("/run/tiny?token=s3cret&metric=sink", headers=far)
    assert answer.status_code == 302
    assert answer.headers["Location"] == "/run/tiny?metric=sink"
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith(f"{TOKEN_COOKIE}=")
    assert "s3cret" not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/run/tiny", headers=far).status_code == 200
    double = {"PATH_INFO": "//evil.example/", "QUERY_STRING": "token=s3cret"}
    stranger = create_app(synthetic.path.parent, token="s3cret").server.test_client()
    assert stranger.get("/", headers={**far, "Authorization": "Bearer s3cret"}).status_code == 200
    assert stranger.get("/", headers={**far, "Authorization": "Bearer s3cre"}).status_code == 401
    assert stranger.open(headers=far, environ_overrides=double).headers["Location"] == "/evil.example/"


def test_only_this_machine_without_a_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.53"):
        assert is_loopback(host)
        check_host(host, None)
    for host in ("0.0.0.0", "192.168.1.2", "::", "example.com"):
        assert not is_loopback(host)
        with pytest.raises(UnavailableError, match="set a secret with --token"):
            check_host(host, None)
        check_host(host, "secret")


def test_a_single_run_is_opened_at_once(synthetic) -> None:
    client = create_app(synthetic.path).server.test_client()
    answer = client.get("/?metric=induction", headers=LOCAL)
    assert answer.status_code == 302
    assert answer.headers["Location"] == "/run/tiny?metric=induction"


def test_two_applications_in_one_process_keep_to_their_runs(synthetic, damaged: Path) -> None:
    first, second = create_app(synthetic.path.parent), create_app(damaged)
    assert "Synthetic-1B" in open_page(first.server.test_client(), "/run/tiny")
    assert "cannot be shown" in open_page(second.server.test_client(), "/run/tiny")
    assert "Synthetic-1B" in open_page(second.server.test_client(), "/run/whole")
    assert "cannot be shown" in open_page(first.server.test_client(), "/run/whole")


def test_a_missing_directory_is_refused_before_serving(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        create_app(tmp_path / "nowhere")
