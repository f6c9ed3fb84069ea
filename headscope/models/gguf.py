"""GGUF files: checked before they are read, dequantised by transformers, and returned as a plain model.

transformers does the dequantising; three things around it are done here. The file is checked first, because a truncated or foreign file
otherwise ends in an error from deep inside numpy, or in a tensor of zeros. The model is freed of its mark of being quantised, which it is
not any more (transformers refuses to save it otherwise). And two things that the format loses are put back: floats of the
configuration, which GGUF keeps as float32 (1e-5 arrives as 9.999999747e-06), and pre-tokenizers that GGUF only names.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import ModelError, refusal

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FLOAT_FILES = {1: "float16", 32: "bfloat16"}
"""general.file_type of files that hold one half-precision type; 0 is float32, every other one is quantised."""


def check(path: Path) -> GGUFReader:
    """A reader of a whole, readable GGUF file; ModelError says what is wrong with any other."""
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
        size = path.stat().st_size
    except OSError as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise refusal(ModelError, f"GGUF file {path}", why, "pass the path of a .gguf file that can be read") from error
    if head[:4] != MAGIC:
        raise refusal(
            ModelError,
            f"GGUF file {path}",
            f"it starts with {head[:4]!r}, not with {MAGIC!r}, so it is not GGUF (an error page or a Git LFS pointer, perhaps)",
            "download it again",
        )
    version = struct.unpack("<I", head[4:8])[0] if len(head) == 8 else 0
    if version not in VERSIONS:
        raise refusal(
            ModelError, f"GGUF file {path}", f"its format version reads as {version}", f"use a little-endian file of version {VERSIONS}"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, UnicodeDecodeError) as error:
        raise refusal(
            ModelError, f"GGUF file {path}", f"it is truncated or damaged ({error}; {size} bytes)", "download it again"
        ) from error
    if not reader.tensors or end > size:
        why = "it holds no tensors" if not reader.tensors else f"it is truncated: its tensors end at byte {end}, the file at {size}"
        raise refusal(ModelError, f"GGUF file {path}", why, "download it again")
    return reader


def text_field(reader: GGUFReader, name: str) -> str:
    """A string of the file's header, "" when it is not there."""
    entry = reader.get_field(name)
    return str(entry.contents()) if entry is not None else ""


def native_dtype(reader: GGUFReader) -> str:
    """The dtype that the weights have on an accelerator: the file's own, bfloat16 for quantised ones, which have none."""
    entry = reader.get_field("general.file_type")
    code = int(entry.contents()) if entry is not None else -1
    return "float32" if code == 0 else FLOAT_FILES.get(code, "bfloat16")


def read(path: Path, *, dtype: torch.dtype, attn_implementation: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a checked GGUF file, on CPU, dequantised to `dtype`, as plain transformers objects."""
    from transformers import AutoConfig, AutoTokenizer

    from headscope.models.auto import build

    reader = check(path)
    pre = text_field(reader, "tokenizer.ggml.pre")
    architecture = text_field(reader, "general.architecture") or "unknown"
    del reader
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, **where)
        model = build(path.parent, config, dtype=dtype, attn_implementation=attn_implementation, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, AttributeError, NotImplementedError, ImportError) as error:
        raise refusal(
            ModelError,
            f"GGUF file {path} (architecture {architecture})",
            f"transformers cannot convert it ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})",
            "use the model's safetensors checkpoint",
        ) from error
    _unmark(model)
    _restore_floats(model.config)
    _restore_pre_tokenizer(tokenizer, pre)
    return model, tokenizer


def _unmark(model: Any) -> None:
    """The weights are dense now: without this transformers refuses to save, move or cast the model."""
    for holder, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False


def _restore_floats(config: Any) -> None:
    """Float32 values of the header back to the shortest decimal that means them: 9.999999747378752e-06 -> 1e-05."""
    import numpy as np

    for name, value in config.to_dict().items():
        if isinstance(value, float) and float(np.float32(value)) == value:
            short = float(str(np.float32(value)))
            if short != value:
                setattr(config, name, short)


def _restore_pre_tokenizer(tokenizer: Any, pre: str) -> None:
    """Splits that GGUF names but does not hold. "smollm": every digit is a token of its own, before the byte-level split."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if pre != "smollm" or backend is None:
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
