"""Uploads: a whole run gets in; anything else is refused in one line and leaves nothing behind."""

from __future__ import annotations

import io
import json
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from headscope.app import uploads
from headscope.app.factory import create_app
from headscope.app.uploads import receive, run_name
from headscope.errors import RunError
from headscope.store import open_run

SEND = {"Host": "localhost:8050", "Content-Type": "application/zip"}


def archive(folder: Path, prefix: str = "", leave: tuple[str, ...] = (), extra: dict[str, bytes] | None = None) -> bytes:
    """A zip of a run directory, with files left out and added."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for place in sorted(folder.rglob("*")):
            name = place.relative_to(folder).as_posix()
            if place.is_file() and name not in leave:
                packed.write(place, prefix + name)
        for name, data in (extra or {}).items():
            packed.writestr(name, data)
    return out.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize("prefix", ["", "tiny/"])
def test_a_whole_run_gets_in_and_is_the_same(synthetic, root: Path, prefix: str) -> None:
    client = create_app(root).server.test_client()
    answer = client.post("/api/upload?name=my%20run.zip", data=archive(synthetic.path, prefix), headers=SEND)
    assert answer.status_code == 200, answer.data
    assert answer.get_json() == {"run": "my-run", "url": "/run/my-run"}
    taken = open_run(root / "my-run")
    taken.verify()
    assert taken.heads.equals(open_run(synthetic.path).heads)
    again = client.post("/api/upload?name=my%20run.zip", data=archive(synthetic.path, prefix), headers=SEND)
    assert again.get_json()["run"] == "my-run-2"
    assert sorted(path.name for path in root.iterdir()) == ["my-run", "my-run-2"]


@pytest.mark.parametrize("name", ["long", "seen"])
def test_runs_with_q_and_k_or_pictures_get_in(gallery: Path, root: Path, name: str) -> None:
    assert receive(io.BytesIO(archive(gallery / name)), root, "new") == "new"
    first, second = open_run(gallery / name), open_run(root / "new")
    assert first.files == second.files
    if name == "long":
        assert (first.window(1, 0, 900, 910, 800, 830) == second.window(1, 0, 900, 910, 800, 830)).all()
    else:
        assert first.pictures is not None
        assert second.pictures is not None
        assert (first.pictures.head(1, 2) == second.pictures.head(1, 2)).all()


def refused(data: bytes, root: Path, message: str) -> None:
    with pytest.raises(RunError, match=message):
        receive(io.BytesIO(data), root, "new")
    assert list(root.iterdir()) == []
    assert [path.name for path in root.parent.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.json", "leads out of it"),
        ("tables/../../evil.parquet", "leads out of it"),
        ("/etc/evil", "leads out of it"),
        ("C:\\evil.json", "leads out of it"),
        ("..\\evil.json", "leads out of it"),
        ("evil.pkl", "is no file of a run"),
        ("evil.py", "is no file of a run"),
        ("tables/evil.pickle", "is no file of a run"),
        ("maps.zarr/evil.pt", "is no file of a run"),
        ("tables/extra.parquet", "is not in its card"),
        ("Card.json", "is no file of a run"),
    ],
)
def test_files_that_are_not_the_runs_are_refused(synthetic, root: Path, name: str, message: str) -> None:
    refused(archive(synthetic.path, extra={name: b"x"}), root, message)


def test_links_and_encrypted_or_broken_archives_are_refused(synthetic, root: Path) -> None:
    link = zipfile.ZipInfo("tokens.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    data = io.BytesIO(archive(synthetic.path, leave=("tokens.json",)))
    with zipfile.ZipFile(data, "a") as packed:
        packed.writestr(link, "/etc/passwd")
    refused(data.getvalue(), root, "link or a device")
    whole = archive(synthetic.path)
    refused(b"PK\x03\x04 nonsense", root, "no zip that can be read")
    refused(b"", root, "empty")
    refused(whole[: len(whole) // 2], root, "no zip that can be read")
    locked = bytearray(whole)
    at = locked.find(b"PK\x01\x02")
    locked[at + 8] |= 1
    refused(bytes(locked), root, "encrypted|no zip")


def test_bombs_are_refused_before_they_unpack(synthetic, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(archive(synthetic.path, leave=("tokens.json",), extra={"tokens.json": b"\0" * (40 << 20)}), root, "packed more than 200 times")
    monkeypatch.setattr(uploads, "MOST_FILES", 5)
    refused(archive(synthetic.path), root, "more than 5 files")
    monkeypatch.setattr(uploads, "MOST_FILES", 20_000)
    monkeypatch.setattr(uploads, "MOST_UNPACKED", 1000)
    refused(archive(synthetic.path), root, "unpack to more")


def test_a_listing_that_lies_about_a_size_is_caught(synthetic, root: Path) -> None:
    data = bytearray(archive(synthetic.path))
    at = data.find(b"PK\x01\x02")
    size = int.from_bytes(data[at + 24 : at + 28], "little")
    data[at + 24 : at + 28] = (size - 1).to_bytes(4, "little")
    refused(bytes(data), root, "larger than its listing|no zip that can be read")


def test_changed_files_and_foreign_codecs_are_refused(synthetic, root: Path, tmp_path: Path) -> None:
    text = (synthetic.path / "tokens.json").read_text().replace("cat", "dog")
    refused(archive(synthetic.path, leave=("tokens.json",), extra={"tokens.json": text.encode()}), root, "checksum")
    refused(archive(synthetic.path, leave=("heads.parquet",)), root, "missing")
    refused(archive(synthetic.path, leave=("card.json",)), root, "no card.json in it")
    refused(archive(synthetic.path, "a/", extra={"b/card.json": b"{}"}), root, "more than one run")
    copy = tmp_path.parent / f"{tmp_path.name}-copy"
    shutil.copytree(synthetic.path, copy)
    place = copy / "maps.zarr" / "block_mass" / "0" / "zarr.json"
    facts = json.loads(place.read_text())
    facts["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    name = "maps.zarr/block_mass/0/zarr.json"
    refused(archive(copy, leave=(name,), extra={name: json.dumps(facts).encode()}), root, "codec")
    facts["data_type"] = "object"
    refused(archive(copy, leave=(name,), extra={name: json.dumps(facts).encode()}), root, "maps hold")
    shutil.rmtree(copy)


def test_two_entries_of_one_name_are_refused(synthetic, root: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = archive(synthetic.path, extra={"tokens.json": b"{}"})
    refused(data, root, "twice")


def test_the_caps_hold(synthetic, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = archive(synthetic.path)
    with pytest.raises(RunError, match="larger than"):
        receive(io.BytesIO(whole), root, "new", most=1000)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(uploads, "MOST_BYTES", 1000)
    answer = create_app(root).server.test_client().post("/api/upload?name=a.zip", data=whole, headers=SEND)
    assert answer.status_code in (400, 413)
    assert list(root.iterdir()) == []


def test_pages_elsewhere_cannot_upload(synthetic, root: Path) -> None:
    client = create_app(root).server.test_client()
    data = archive(synthetic.path)
    assert client.post("/api/upload?name=a.zip", data=data, headers={**SEND, "Origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/upload?name=a.zip", data=data, headers={**SEND, "Content-Type": "text/plain"}).status_code == 415
    assert client.post("/api/upload?name=a.zip", data=data, headers={**SEND, "Host": "evil.example"}).status_code == 400
    assert client.get("/api/upload?name=a.zip", headers=SEND).status_code != 500
    guarded = create_app(root, token="s3cret").server.test_client()
    assert guarded.post("/api/upload?name=a.zip", data=data, headers=SEND).status_code == 401
    assert list(root.iterdir()) == []
    assert client.post("/api/upload?name=a.zip", data=data, headers={**SEND, "Origin": "http://localhost:8050"}).status_code == 200


def test_a_dashboard_of_one_run_takes_in_no_other(synthetic) -> None:
    answer = create_app(synthetic.path).server.test_client().post("/api/upload?name=a.zip", data=archive(synthetic.path), headers=SEND)
    assert answer.status_code == 400
    assert "shows one run" in answer.get_data(as_text=True)


def test_what_a_killed_server_left_is_cleared_by_the_next_upload(synthetic, root: Path) -> None:
    import os

    for name, age in (("old", 7 * 3600), ("new", 60)):
        (root / f".upload-{name}").mkdir()
        (root / f".upload-{name}" / "archive.zip").write_bytes(b"x")
        os.utime(root / f".upload-{name}", (os.path.getmtime(root) - age,) * 2)
    receive(io.BytesIO(archive(synthetic.path)), root, "run")
    assert sorted(path.name for path in root.iterdir()) == [".upload-new", "run"]


def test_names_are_made_of_file_names() -> None:
    assert run_name("My run (2).zip") == "My-run-2"
    assert run_name("..\\..\\up.ZIP") == "up"
    assert run_name("../../etc/passwd") == "passwd"
    for bad in ("", ".zip", "...", "/", "\u4f60"):
        with pytest.raises(RunError, match="no name for a run"):
            run_name(bad)
