"""Topology discovery: reads a live transformers model's attention modules from the modules themselves.

A list of model names would be wrong the day after it was written. A module counts as attention on the interface when its own `forward`
names transformers' table of attention functions: that is the code path by which its q, k and v reach the seam. Attention that computes its
softmax by itself (Falcon, GPT-J, BLOOM, ...) is listed all the same, with the reason why it cannot be measured, so that a partly
capturable model never looks complete.

Layer numbers belong to the main stack: the decoder of a language or vision-language model, the decoder's self-attention of an
encoder-decoder, everything in an encoder-only model. Towers, encoders beside a decoder, and cross-attention have none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headscope.errors import CaptureError, refusal
from headscope.topology import AttentionModule, Kind, Topology

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLE = "ALL_ATTENTION_FUNCTIONS"
OUTPUTS = ("o_proj", "out_proj", "c_proj", "Wo", "wo", "o", "proj", "dense", "linear_out", "out_lin", "projection", "to_out")
PICTURE_WORDS = ("vision", "visual", "image")


def discover(model: nn.Module) -> Topology:
    """The topology of a transformers model. Raises CaptureError when none of its attention reaches the interface."""
    root: Any = model
    found = [(name, module) for name, module in model.named_modules() if _on_interface(type(module)) or _looks_like_attention(module)]
    on_interface = [name for name, module in found if _on_interface(type(module))]
    # A wrapper around an attention module (BertAttention around BertSelfAttention) is not attention of its own.
    found = [
        (name, module) for name, module in found if name in on_interface or not any(other.startswith(f"{name}.") for other, _ in found)
    ]
    if not on_interface:
        raise _nothing(model, [type(module).__name__ for _, module in found])
    main = _main_prefix(root, [name for name, _ in found])
    numbers = _layer_numbers(root, found, main)
    modules = tuple(_describe(root, name, module, numbers.get(name), name in on_interface) for name, module in found)
    return Topology(modules, type(model).__name__)


def _on_interface(kind: type) -> bool:
    """True when the class's forward names the table of attention functions."""
    forward = getattr(kind, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return code is not None and any(TABLE in part.co_names for part in _nested(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _looks_like_attention(module: nn.Module) -> bool:
    """Attention by its name, with projections of its own and a softmax or a fused attention in its code."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    name = type(module).__name__.lower()
    if "attention" not in name and "attn" not in name:
        return False
    weights = [getattr(child, "weight", None) for child in module.children()]
    if not any(isinstance(weight, torch.Tensor) and weight.dim() == 2 for weight in weights):
        return False
    words: set[str] = set()
    for attribute in vars(type(module)).values():
        code = getattr(inspect.unwrap(attribute), "__code__", None) if callable(attribute) else None
        if code is not None:
            for part in _nested(code):
                words |= set(part.co_names)
    return any("softmax" in word or "scaled_dot_product" in word for word in words)


def _nothing(model: nn.Module, classes: list[str]) -> CaptureError:
    seen = ", ".join(sorted(set(classes))) or "no attention modules"
    return refusal(
        CaptureError,
        f"{type(model).__name__} ({seen})",
        "its attention does not go through transformers' attention interface, so its q, k and v cannot be read",
        "use a model whose attention does (most since transformers 4.48, e.g. Llama, Qwen, Mistral, Gemma, GPT-2, BERT, ViT, Whisper)",
    )


def _main_prefix(model: Any, names: list[str]) -> str:
    """Qualified name of the module that holds the main stack ("" for the model itself)."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError, ValueError):
        return ""
    for name, module in model.named_modules():
        if module is decoder and any(_below(other, name) for other in names):
            return str(name)
    return ""


def _below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _layer_numbers(model: Any, found: list[tuple[str, nn.Module]], main: str) -> dict[str, int]:
    """Layer number of each module of the main stack: the model's own `layer_idx` where these are distinct, else the order."""
    stack = [(name, module) for name, module in found if _below(name, main) and not _is_cross(name, module)]
    if not main and len({_tower(model, name)[0] for name, _ in stack}) > 1:
        # No decoder was named: the tower with the most attention modules is the main one.
        towers = [_tower(model, name)[0] for name, _ in stack]
        largest = max(dict.fromkeys(towers), key=towers.count)
        stack = [(name, module) for name, module in stack if _tower(model, name)[0] == largest]
    own = [getattr(module, "layer_idx", None) for _, module in stack]
    if all(isinstance(index, int) for index in own) and len(set(own)) == len(own):
        return {name: int(getattr(module, "layer_idx")) for name, module in stack}  # noqa: B009 - typed as Any this way
    return {name: index for index, (name, _) in enumerate(stack)}


def _tower(model: Any, name: str) -> tuple[str, PreTrainedModel]:
    """The nearest enclosing PreTrainedModel of a module: its qualified name and itself."""
    from transformers import PreTrainedModel

    best: tuple[str, Any] = ("", model)
    at: Any = model
    path: list[str] = []
    for part in name.split("."):
        at = getattr(at, part)
        path.append(part)
        if isinstance(at, PreTrainedModel):
            best = (".".join(path), at)
    return best


def _is_cross(name: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    tail = ".".join(name.split(".")[-3:]).lower()
    return "cross" in type(module).__name__.lower() or any(word in tail for word in ("cross", "encoder_attn", "encdecattention"))


def _sees_pictures(tower_name: str, tower: Any) -> bool:
    """True for an encoder of images or video: by what it takes in, or by what it is called."""
    modalities = getattr(tower, "input_modalities", "text")
    modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities or ())
    words = f"{tower_name.rpartition('.')[2]}.{type(tower).__name__}".lower()
    only_pictures = "text" not in modalities and ("image" in modalities or "video" in modalities)
    return only_pictures or any(word in words for word in PICTURE_WORDS)


def _describe(model: Any, name: str, module: nn.Module, layer: int | None, on_interface: bool) -> AttentionModule:
    tower_name, tower = _tower(model, name)
    config = getattr(module, "config", None) or getattr(tower, "config", None)
    heads = _first_int(module, ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"))
    heads = heads or _first_int(config, ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")) or 1
    kv_heads = _first_int(module, ("num_key_value_heads", "num_kv_heads"))
    if kv_heads is None:
        groups = _first_int(module, ("num_key_value_groups",))
        kv_heads = heads // groups if groups else heads
    head_dim = _first_int(module, ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size"))
    head_dim = head_dim or _first_int(config, ("head_dim", "d_kv")) or _hidden(config) // heads
    cross = _is_cross(name, module)
    causal = bool(getattr(module, "is_causal", True)) and not cross
    window = None if cross else _window(module, config, layer)
    if window is not None and not causal:
        window += 1  # transformers' bidirectional window includes the key at distance `sliding_window`
    kind: Kind = "full"
    if cross:
        kind = "cross"
    elif _sees_pictures(tower_name, tower):
        kind = "vision"
    elif window is not None:
        kind = "sliding"
    reason = ""
    if not on_interface:
        reason = f"{type(module).__name__} computes its attention by itself, off transformers' attention interface"
    return AttentionModule(
        name=name,
        layer=layer,
        kind=kind,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        causal=causal,
        window=window,
        softcap=_softcap(module),
        has_sinks=getattr(module, "sinks", None) is not None,
        output=_output(model, name, module),
        capturable=reason,
    )


def _first_int(holder: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _hidden(config: Any) -> int:
    return _first_int(config, ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")) or 0


def _window(module: nn.Module, config: Any, layer: int | None) -> int | None:
    """`sliding_window` of the module; else of the config, for the layers that its `layer_types` (if any) calls sliding."""
    if hasattr(module, "sliding_window"):
        own = module.sliding_window
        return own if isinstance(own, int) and not isinstance(own, bool) and own > 0 else None
    size = getattr(config, "sliding_window", None)
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or getattr(config, "use_sliding_window", True) is False:
        return None
    index = getattr(module, "layer_idx", layer)
    types = getattr(config, "layer_types", None)
    if types is None:
        return size
    listed = isinstance(index, int) and 0 <= index < len(types)
    return size if listed and "sliding" in str(types[index]) else None


def _softcap(module: nn.Module) -> float | None:
    for name in ("attn_logit_softcapping", "softcap", "attn_logit_softcap"):
        value = getattr(module, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


def _output(model: Any, name: str, module: nn.Module) -> str | None:
    """Qualified name of W_O: a child of the module, or of its parent's `output` (BERT's layout)."""
    for child in OUTPUTS:
        if getattr(getattr(module, child, None), "weight", None) is not None:
            return f"{name}.{child}"
    parent_name = name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    for path in ("output.dense", "output"):
        target: Any = parent
        for part in path.split("."):
            target = getattr(target, part, None)
        if getattr(target, "weight", None) is not None and getattr(target.weight, "dim", lambda: 0)() == 2:
            return f"{parent_name}.{path}"
    return None
