"""Run archives from a browser: a zip of one run directory, checked before and after it is unpacked, put in place whole or not at all.

What may be in it is what a run is made of (JSON, Parquet, safetensors, zarr chunks), by name, so nothing that could run gets to the disk.
An archive is written by anyone: names that climb, links, bombs and double entries are refused before a byte is unpacked, zarr metadata may
name only codecs that move bytes, and every file must have the size and checksum that the run's card says. Nothing of it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import stat
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from headscope.errors import RunError, refusal
from headscope.store import open_run
from headscope.store.schema import CARD, HEADS, KEPT, MAPS, PICTURES, STATISTICS, TABLES, TOKENS, one_line

MOST_BYTES = 512 * 2**20
"""Of the archive as it is sent."""
MOST_UNPACKED = 4 * 2**30
MOST_FILES = 20_000
MOST_RATIO = 200
"""Times that a file of more than a megabyte may grow."""
PIECE = 1 << 20
WORK = ".upload-"
OLD_SECONDS = 6 * 3600
_WHOLE = {CARD, HEADS, STATISTICS, TOKENS, *PICTURES}
_TABLE = re.compile(rf"{TABLES}/[A-Za-z0-9_][A-Za-z0-9_.-]{{0,80}}\.parquet")
_ZARR = re.compile(rf"(?:{re.escape(MAPS)}|{re.escape(KEPT)})(?:/[A-Za-z0-9_]{{1,32}}){{0,3}}/(?:zarr\.json|c(?:\.\d{{1,9}}){{0,6}})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CODECS = {"bytes", "zstd", "gzip", "blosc", "crc32c", "sharding_indexed", "transpose"}
_KINDS = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"}


def run_name(given: str) -> str:
    """The run id for a file name: its letters, digits, '.', '_' and '-'. RunError when nothing usable is left."""
    stem = re.sub(r"\.(zip|headscope)$", "", Path(given.replace("\\", "/")).name, flags=re.IGNORECASE)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:64]
    if not _NAME.fullmatch(name):
        raise refusal(
            RunError, f"file name {given[:80]!r}", "no name for a run can be made of it", "rename the file, for example my-run.zip"
        )
    return name


def receive(stream: IO[bytes], root: Path, name: str, most: int = MOST_BYTES) -> str:
    """Takes an archive from a stream and returns the id of the run it became: `name`, or `name-2` and so on where that is taken.

    RunError for anything that is not one whole run; then nothing is left behind.
    """
    if not _NAME.fullmatch(name):
        raise refusal(RunError, f"run name {name[:80]!r}", "it may have letters, digits, '.', '_' and '-'", "rename it")
    work = root / f"{WORK}{secrets.token_hex(8)}"
    _clear_old(root)
    try:
        work.mkdir()
        archive = work / "archive.zip"
        _save(stream, archive, most)
        folder = work / "run"
        folder.mkdir()
        _unpack(archive, folder)
        _check(folder)
        return _place(folder, root, name)
    except OSError as error:
        raise refusal(
            RunError, f"run {name}", f"it could not be written ({error.strerror or error})", "free space, then try again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _clear_old(root: Path) -> None:
    """What a server that was killed in the middle of an upload left behind."""
    for left in root.glob(f"{WORK}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _save(stream: IO[bytes], path: Path, most: int) -> None:
    held = 0
    with path.open("wb") as file:
        while piece := stream.read(PIECE):
            held += len(piece)
            if held > most:
                why = f"it is larger than {most // 2**20} MiB"
                raise refusal(RunError, "the archive", why, "copy the run into the runs directory instead")
            file.write(piece)
    if not held:
        raise refusal(RunError, "the archive", "it is empty", "choose a zip of a run directory")


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as packed:
            entries = [entry for entry in packed.infolist() if not entry.is_dir()]
            names = _names(entries)
            if sum(entry.file_size for entry in entries) > MOST_UNPACKED:
                raise _bad("it would unpack to more than 4 GiB", "copy the run into the runs directory instead")
            for entry, name in zip(entries, names, strict=True):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(entry) as source, target.open("xb") as file:
                    _copy(source, file, entry.file_size)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, FileExistsError) as error:
        raise _bad(f"it is no zip that can be read ({one_line(error)})", "zip the run directory again") from error


def _copy(source: IO[bytes], file: IO[bytes], size: int) -> None:
    """Never more than the archive's own listing says: a listing may lie."""
    left = size
    while piece := source.read(min(PIECE, left + 1)):
        left -= len(piece)
        if left < 0:
            raise _bad("a file in it is larger than its listing says", "zip the run directory again")
        file.write(piece)


def _names(entries: list[zipfile.ZipInfo]) -> list[str]:
    """The names inside the run directory: the archive's own, less one folder that all of them share."""
    if not entries or len(entries) > MOST_FILES:
        raise _bad("it is empty" if not entries else f"it has more than {MOST_FILES:,} files", "zip one run directory")
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        climbs = (
            ".." in parts or entry.filename.startswith("/") or "\\" in entry.filename or "\0" in entry.filename or ":" in entry.filename
        )
        kind = entry.external_attr >> 16
        if climbs:
            raise _bad(f"{entry.filename[:80]!r} leads out of it", "zip the run directory itself")
        if kind and not stat.S_ISREG(kind) and stat.S_IFMT(kind):
            raise _bad(f"{entry.filename[:80]!r} is a link or a device", "zip the files themselves")
        if entry.flag_bits & 1:
            raise _bad("it is encrypted", "zip it without a password")
        if entry.file_size > PIECE and entry.file_size > MOST_RATIO * max(entry.compress_size, 1):
            raise _bad(f"{entry.filename[:80]!r} is packed more than {MOST_RATIO} times over", "zip the run directory again")
    names = [str(PurePosixPath(entry.filename)) for entry in entries]
    if CARD not in names:
        first = {name.partition("/")[0] for name in names}
        if len(first) != 1 or f"{next(iter(first))}/{CARD}" not in names:
            raise _bad(f"there is no {CARD} in it, or more than one run", "zip one run directory")
        names = [name.partition("/")[2] for name in names]
    wrong = [name for name in names if not (name in _WHOLE or _TABLE.fullmatch(name) or _ZARR.fullmatch(name))]
    if wrong:
        raise _bad(f"{wrong[0][:80]!r} is no file of a run", "zip nothing but the run: JSON, Parquet, safetensors and zarr files")
    if len({name.lower() for name in names}) != len(names):
        raise _bad("a name is in it twice", "zip the run directory again")
    return names


def _check(folder: Path) -> None:
    """The run opens, every file in the folder is in its card with its checksum, and its zarr metadata asks for no code."""
    for place in folder.rglob("zarr.json"):
        _check_zarr(place)
    run = open_run(folder)
    run.verify()
    listed = {CARD, *run.files}
    for place in folder.rglob("*"):
        name = place.relative_to(folder).as_posix()
        if place.is_file() and name not in listed:
            raise _bad(f"{name[:80]!r} is not in its card", "zip the run as it was written")
    run.heads, run.card  # noqa: B018 - reading them checks them


def _check_zarr(place: Path) -> None:
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"{place.name} cannot be read ({one_line(error)})", "zip the run as it was written") from error
    if not isinstance(value, dict) or value.get("zarr_format") != 3 or value.get("storage_transformers"):
        raise _bad("its maps are not zarr of version 3", "zip a run that headscope wrote")
    kind = value.get("data_type")
    if value.get("node_type") == "array" and not (isinstance(kind, str) and kind in _KINDS):
        raise _bad(f"its maps hold {str(kind)[:40]!r}", "zip a run that headscope wrote")
    _check_codecs(value.get("codecs", []))


def _check_codecs(codecs: Any) -> None:
    for codec in codecs if isinstance(codecs, list) else [codecs]:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(name, str) or name not in _CODECS:
            raise _bad(f"its maps ask for the codec {str(name)[:40]!r}", "zip a run that headscope wrote")
        more = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        for key in ("codecs", "index_codecs"):
            if isinstance(more, dict) and key in more:
                _check_codecs(more[key])


def _place(folder: Path, root: Path, name: str) -> str:
    """Renames the checked folder to the first free name."""
    for number in range(1, 1000):
        wanted = name if number == 1 else f"{name[:60]}-{number}"
        target = root / wanted
        if target.exists() or target.is_symlink():
            continue
        with contextlib.suppress(FileExistsError):
            folder.rename(target)
            return wanted
    raise refusal(RunError, f"run {name}", "there are a thousand runs of that name", "rename the file")


def _bad(why: str, instead: str) -> RunError:
    return refusal(RunError, "the archive", why, instead)


__all__ = ["MOST_BYTES", "receive", "run_name"]
