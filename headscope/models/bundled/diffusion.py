"""Reads a bundled diffusion transformer: the class that its config.json names, its weights all there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headscope.errors import ModelError, UnavailableError, refusal


def read_transformer(where: Path, *, dtype: Any, device: Any) -> Any:
    """The diffusers transformer in a directory, in eval mode. `dtype`: a torch dtype, or "auto" for the checkpoint's (bfloat16).

    UnavailableError when diffusers is not installed; ModelError when the directory is not a whole checkpoint.
    """
    try:
        import diffusers
    except ImportError as error:
        given = f"diffusion model {where.name}"
        raise refusal(UnavailableError, given, "diffusers is not installed", 'pip install "headscope[diffusion]"') from error
    import torch

    try:
        settings = json.loads((where / "config.json").read_text(encoding="utf-8"))
        found = getattr(diffusers, settings["_class_name"])
        kept = torch.bfloat16 if dtype == "auto" else dtype
        model = found.from_pretrained(where, torch_dtype=kept, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = f"diffusers cannot load it ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise refusal(ModelError, f"diffusion model {where}", reason, "install headscope again") from error
    return model.to(device).eval()
