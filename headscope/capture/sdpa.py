"""The fallback seam: torch's own scaled_dot_product_attention, in any module.

Not every model asks a table for its attention function. What nearly all of them share is the last call, torch's
`scaled_dot_product_attention`; while something is active, a TorchFunctionMode in the thread that opened it watches for that one function
and hands each call, with q, k, v and the mask exactly as torch was given them, to the same machinery that serves transformers. The
function that runs and its arguments stay the host's, so outputs are the same to the bit.

Which module a call belongs to is told by forward hooks. What the mask means is torch's definition: True is visible, a float is added,
`is_causal` counts from the first query and the first key, and with no mask everything is visible. The silent failure this avoids: attention
that is called by a module nobody listed, which would be missing from the statistics without a word; it is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from headscope.capture import seam
from headscope.capture.attach import Actor, Attachment, Stage
from headscope.capture.discover import _describe as describe
from headscope.capture.discover import _is_cross as is_cross
from headscope.capture.discover import _nested as nested_code
from headscope.capture.discover import _output as output_of
from headscope.errors import CaptureError, refusal
from headscope.topology import AttentionModule, Kind, Topology

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.capture.calls import HostCall
    from headscope.capture.forward import ForwardState, ModuleRun

FUNCTION = functional.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DEFAULTS: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


# ---- the calls -----------------------------------------------------------------------------------------------------


def bound(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a scaled_dot_product_attention call by name, defaults filled in."""
    return {**DEFAULTS, **dict(zip(NAMES, args, strict=False)), **kwargs}


def four_dimensional(mask: Tensor | None) -> Tensor | None:
    """A mask as [B or 1, H or 1, Nq, Nk]: torch aligns its dimensions from the right."""
    if mask is None or mask.dim() >= 4:
        return mask
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


class Watch(TorchFunctionMode):
    """Hands scaled_dot_product_attention calls of one attachment's modules to it; every other function, and every other model, passes."""

    def __init__(self, attachment: SdpaAttachment) -> None:
        super().__init__()
        self._attachment = attachment

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not FUNCTION or seam.is_serving():
            return func(*args, **kwargs)
        module = self._attachment.calling_module()
        if module is None:
            return func(*args, **kwargs)
        given = bound(args, kwargs)

        def run(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> tuple[Tensor, None]:
            options = {"dropout_p": rest["dropout"], "is_causal": rest["is_causal"], "scale": rest["scaling"]}
            mine = mask if mask is not shown else given["attn_mask"]
            out = FUNCTION(query, key, value, attn_mask=mine, enable_gqa=given["enable_gqa"], **options)
            return out.transpose(1, 2), None

        shown = four_dimensional(given["attn_mask"])
        q, k, v = (given[name] for name in NAMES[:3])
        rest = {"scaling": given["scale"], "dropout": given["dropout_p"], "is_causal": given["is_causal"]}
        out: Tensor = seam.through(run, "sdpa", module, q, k, v, shown, **rest)[0]
        return out.transpose(1, 2)


class SdpaAttachment(Attachment):
    """The fastening of a scope to a model whose attention is torch's scaled_dot_product_attention."""

    @contextmanager
    def active(self, stage: Stage, what: Any) -> Iterator[Actor]:
        """Keep an actor active for a `with` block, and watch the calls of this thread."""
        with super().active(stage, what) as actor, Watch(self):
            yield actor

    def _fasten_more(self, stack: ExitStack) -> None:
        """Beside the attention modules: the outermost forward pass of a model that is not transformers'."""
        from transformers import PreTrainedModel

        if not isinstance(self._model, PreTrainedModel):
            # first of all: a model may be an attention module itself
            stack.callback(self._model.register_forward_pre_hook(self._model_starts, prepend=True, with_kwargs=True).remove)
            stack.callback(self._model.register_forward_hook(self._model_ends, always_call=True).remove)

    def calling_module(self) -> nn.Module | None:
        """The attention module of this scope that is running in this thread; None while other code runs. CaptureError when the scoped
        model calls attention outside of every module known to hold it."""
        if not self.active_here:
            return None
        state = self.state
        if state.modules:
            return self.module_of(state.modules[-1].record)
        if state.models:
            raise refusal(
                CaptureError,
                f"{type(self._model).__name__}",
                "it called scaled_dot_product_attention outside of the modules known to hold attention, so the call has no name",
                "pass Scope(model, example=inputs), which learns the modules from one forward pass",
            )
        return None

    def _check(self, host: HostCall, run: ModuleRun) -> None:
        """Compare a call with what the topology says of its module. Raises CaptureError where they differ."""
        record, q, k = run.record, host.query, host.key
        if q.dim() != 4 or k.dim() != 4 or host.value.dim() != 4:
            raise refusal(
                CaptureError,
                f"{record.name}: q {list(q.shape)}",
                "heads and batch cannot be told apart unless q, k and v are [B, H, N, D]",
                "this module cannot be measured",
            )
        if q.shape[1] != record.heads or (record.head_dim and q.shape[3] != record.head_dim):
            raise refusal(
                CaptureError,
                f"{record.name}: q {list(q.shape)}",
                f"its attributes name {record.heads} heads of {record.head_dim} numbers",
                "pass Scope(model, example=inputs), which reads them from a forward pass",
            )
        if k.shape[2] != q.shape[2] and run.cache is None and not run.cross:
            raise refusal(
                CaptureError,
                f"{record.name}: {q.shape[2]} queries and {k.shape[2]} keys",
                "whether the other keys are earlier tokens of a cache or another sequence cannot be seen here",
                "run the model without its cache, over the whole sequence",
            )

    def _module_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._module_starts(module, args, kwargs)
        if self.active_here:  # joint attention is given a second stream without being cross-attention
            run = self.state.modules[-1]
            run.cross = run.record.kind == "cross"

    def _not_seen(self, record: AttentionModule, module: nn.Module) -> CaptureError:
        return refusal(
            CaptureError,
            f"{record.name} ({type(module).__name__})",
            "it ran, but its attention never reached torch's scaled_dot_product_attention (it computed its softmax by itself, as the eager "
            "branch of such modules does)",
            "switch its fused attention on (config._attn_implementation='sdpa', timm: module.fused_attn = True)",
        )

    def _read(self, host: HostCall, module: nn.Module, run: ModuleRun, state: ForwardState, function: Any, name: str) -> AttentionCall:
        self._check(host, run)
        # a causal model that gives torch a mask, or one new row, says nothing of causality in the call itself
        if run.record.causal and run.cache is not None and (host.mask is not None or host.query.shape[2] == 1):
            host.kwargs = {**host.kwargs, "is_causal": True}
        return super()._read(host, module, run, state, function, name)


# ---- which modules -------------------------------------------------------------------------------------------------


def discover_sdpa(model: nn.Module, example: Any = None) -> Topology:
    """The attention modules of any model that calls torch's scaled_dot_product_attention.

    Without an example: modules whose own code names the function, with their heads read from their attributes. With one (a tensor, a tuple
    of arguments or a dict of keyword arguments of the model's forward): the modules that call it in one forward pass, in the order in
    which they do, with heads read from q and k. Raises CaptureError when there are none, or when heads cannot be read.
    """
    if example is not None:
        return _traced(model, example)
    found = [(name, module) for name, module in model.named_modules() if names_sdpa(type(module))]
    if not found:
        raise _nothing(model)
    records: list[AttentionModule] = []
    layer = 0
    for name, module in found:
        cross = is_cross(name, module)
        records.append(_from_attributes(model, name, module, None if cross else layer))
        layer += not cross
    return Topology(tuple(records), type(model).__name__)


def names_sdpa(kind: type) -> bool:
    """True when a class's own methods name the function, by its name or by another that it was imported under."""
    return any(
        word == "scaled_dot_product_attention" or names.get(word) is FUNCTION for code, names in codes_of(kind) for word in code.co_names
    )


def codes_of(kind: type) -> Iterator[tuple[CodeType, Mapping[str, Any]]]:
    """The code of every method of a module's class, and of the functions inside them, each with the global names it sees."""
    for base in kind.__mro__:
        if base in (nn.Module, nn.Sequential, object) or base.__module__.startswith("torch."):
            continue
        for attribute in vars(base).values():
            function = getattr(attribute, "__func__", attribute)
            function = inspect.unwrap(function) if callable(function) else None
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType):
                for part in nested_code(code):
                    yield part, getattr(function, "__globals__", {})


def _from_attributes(model: nn.Module, name: str, module: nn.Module, layer: int | None) -> AttentionModule:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return describe(model, name, module, layer, True)
    heads = _number(module, ("num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead"))
    if heads is None:
        raise refusal(
            CaptureError,
            f"{name or type(model).__name__} ({type(module).__name__})",
            "it names no number of heads",
            "pass Scope(model, example=inputs), which reads them from a forward pass",
        )
    kv_heads = _number(module, ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")) or heads
    head_dim = _number(module, ("head_dim", "d_head", "dim_head", "attention_head_size")) or 0
    if heads % kv_heads:
        kv_heads = heads
    causal = bool(getattr(module, "is_causal", getattr(module, "causal", False))) and layer is not None
    return AttentionModule(
        name, layer, "full" if layer is not None else "cross", heads, kv_heads, head_dim, causal, output=output_of(model, name, module)
    )


def _number(holder: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _nothing(model: nn.Module) -> CaptureError:
    kind = f"a {type(model).__module__.partition('.')[0]}.{type(model).__name__}"
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        why = "torch.nn.MultiheadAttention keeps its q, k and v to itself"
    else:
        why = (
            "none of its modules calls torch's scaled_dot_product_attention, and it is not a transformers model; a softmax of its own "
            "cannot be read from outside"
        )
    return refusal(
        CaptureError, kind, why, "pass a transformers.PreTrainedModel, or a module whose attention is scaled_dot_product_attention"
    )


# ---- learning the modules from a forward pass ----------------------------------------------------------------------


class _Record(TorchFunctionMode):
    """Notes which module is innermost at each scaled_dot_product_attention call, and the shapes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is FUNCTION:
            given = bound(args, kwargs or {})
            q, k = given["query"].shape, given["key"].shape
            causal = bool(given["is_causal"]) or _hides_what_follows(given["attn_mask"], q[-2], k[-2])
            self.seen.setdefault(self.stack[-1] if self.stack else "", (tuple(q), tuple(k), causal))
        return func(*args, **(kwargs or {}))


def _traced(model: nn.Module, example: Any) -> Topology:
    record = _Record()
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                record.stack.append(name)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                record.stack.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        with torch.no_grad(), record:
            run_model(model, example)
    if not record.seen:
        raise _nothing(model)
    records, layer = [], 0
    for name, (q, k, causal) in record.seen.items():
        if len(q) != 4 or len(k) != 4 or q[1] % k[1]:
            raise refusal(CaptureError, f"{name}: q {list(q)}, k {list(k)}", "these are not [B, H, N, D]", "this module cannot be measured")
        module = model.get_submodule(name)
        cross = is_cross(name, module) or q[2] != k[2]
        kind: Kind = "cross" if cross else "full"
        number = None if cross else layer
        layer += not cross
        records.append(AttentionModule(name, number, kind, q[1], k[1], q[3], causal, output=output_of(model, name, module)))
    return Topology(tuple(records), type(model).__name__)


def _hides_what_follows(mask: Tensor | None, rows: int, keys: int) -> bool:
    """True when a mask hides every key that comes after its query, and there are such keys."""
    if mask is None or rows != keys or rows < 2:
        return False
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    later = torch.ones(rows, keys, dtype=torch.bool, device=mask.device).triu(1)
    return bool((hidden | ~later).all())


def run_model(model: Any, inputs: Any) -> Any:
    """One forward pass over a dict of keyword arguments, a tuple of arguments, or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


__all__ = ["SdpaAttachment", "Watch", "discover_sdpa", "names_sdpa", "run_model"]
