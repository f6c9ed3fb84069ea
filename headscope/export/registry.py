"""The formats by name. One line each; a name that comes twice is refused when this module is imported."""

from __future__ import annotations

from headscope.errors import ExportError, refusal, unknown_name
from headscope.export.base import Format
from headscope.export.block_sparse_attention import BlockSparseAttention
from headscope.export.cudnn import CudnnFlex
from headscope.export.dual_chunk import SglangDualChunk, VllmDualChunk
from headscope.export.duo_attention import DuoAttention
from headscope.export.flex_attention import FlexAttention
from headscope.export.kvpress import Kvpress
from headscope.export.minference import MInference
from headscope.export.moa import MoA
from headscope.export.modelopt import ModelOpt
from headscope.export.native import Headscope
from headscope.export.openvino_genai import OpenVinoGenAi
from headscope.export.retrieval_head import RetrievalHead
from headscope.export.rtp_llm import RtpLlm
from headscope.export.tensorrt_llm import TensorRtLlm
from headscope.export.transformers_config import TransformersConfig
from headscope.export.xattention import XAttention


def register(*formats: Format) -> dict[str, Format]:
    """Formats by name; ExportError when a name comes twice."""
    found: dict[str, Format] = {}
    for one in formats:
        if one.name in found:
            raise refusal(ExportError, f"format {one.name!r}", f"{found[one.name]!r} has that name already", "choose another name")
        found[one.name] = one
    return found


FORMATS = register(
    DuoAttention(),
    Kvpress(),
    MInference(),
    VllmDualChunk(),
    SglangDualChunk(),
    RtpLlm(),
    RetrievalHead(),
    MoA(),
    TransformersConfig(),
    FlexAttention(),
    BlockSparseAttention(),
    XAttention(),
    ModelOpt(),
    TensorRtLlm(),
    OpenVinoGenAi(),
    CudnnFlex(),
    Headscope(),
)
"""Every format."""


def find(name: str) -> Format:
    """A format by its name, underscores and capitals aside. ExportError that lists the names for one that does not exist."""
    wanted = str(name).strip().lower().replace("_", "-")
    if wanted not in FORMATS:
        raise unknown_name(ExportError, "format", name, FORMATS)
    return FORMATS[wanted]
