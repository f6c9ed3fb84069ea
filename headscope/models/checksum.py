"""SHA-256 of files, read in pieces so that a checkpoint never has to fit into memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO

PIECE = 1 << 20


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy_hashed(source: IO[bytes], target: IO[bytes]) -> str:
    """Copies a stream and returns the hexadecimal SHA-256 of what went through."""
    digest = hashlib.sha256()
    while piece := source.read(PIECE):
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest()
