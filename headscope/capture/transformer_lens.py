"""TransformerLens bridges: q and k read from the bridge's own hook points, after rotation and never repeated.

A TransformerBridge wraps a transformers model and, for most architectures, computes attention by itself, so that every hook point fires
at its stage; transformers' table of attention functions is then never asked. What reaches its scores is read where it passes: q at the
last of hook_q, hook_q_normed and hook_rot_q, k and v where the bridge takes them from its cache (before it repeats keys for grouped
queries), and the heads' outputs at hook_z. Modules that the bridge leaves to transformers are captured at transformers' seam.

Hooks of the user's come first: what is measured is what their edits made of q and k. An edit of hook_attn_scores or hook_pattern breaks the
tie between q, k and the output, so with hooks at these points every call is checked, not only the first, and an edited one is refused: the
silent failure is statistics of a pattern that was not the one in use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headscope.capture import seam
from headscope.capture.attach import Actor, Attachment, Stage
from headscope.capture.hosts import Host
from headscope.capture.verify import check_output
from headscope.errors import CaptureError, refusal
from headscope.topology import Topology

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.call import AttentionCall
    from headscope.capture.calls import HostCall
    from headscope.capture.forward import ForwardState, ModuleRun
    from headscope.topology import AttentionModule

INNER = "._original_component"
KERNEL = "transformer_lens"
UNREAD = {
    "ALiBiJointQKVAttentionBridge": "it adds position slopes (ALiBi) to its scores inside the bridge",
    "MPTALiBiAttentionBridge": "it adds position slopes (ALiBi) to its scores inside the bridge",
    "BloomAttentionBridge": "it adds position slopes (ALiBi) to its scores inside the bridge",
    "GlmMoeDsaAttentionBridge": "it attends to a chosen few keys per query",
}


def bridge_host(given: Any) -> Host:
    """The host of a TransformerBridge; CaptureError for any other object of that library."""
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(given, TransformerBridge):
        kind = f"transformer_lens.{type(given).__name__}"
        raise refusal(CaptureError, f"a {kind}", "it is not a bridge to a model on this machine", "pass a TransformerBridge")
    from transformers import PreTrainedModel

    model: Any = given.original_model
    if not isinstance(model, PreTrainedModel):
        inside = type(model).__name__
        raise refusal(
            CaptureError, "a TransformerBridge", f"it bridges to a {inside}, not to a transformers model", "pass that to hs.Scope"
        )
    topology, modules = discover_bridge(model)
    return Host("transformer_lens", given, model, topology, BridgeAttachment(model, topology, modules))


def discover_bridge(model: nn.Module) -> tuple[Topology, dict[str, nn.Module]]:
    """The topology of a bridged model under the names it has without the bridge, and the module of each name where its attention is met:
    the bridge's component where that computes attention, else transformers' own module inside it."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    from headscope.capture.discover import discover

    records: list[AttentionModule] = []
    modules: dict[str, nn.Module] = {}
    for record in discover(model).modules:
        outer = model.get_submodule(record.name.removesuffix(INNER)) if record.name.endswith(INNER) else None
        name = record.name.replace(INNER, "")
        inside = isinstance(outer, AttentionBridge) and type(outer).forward is not AttentionBridge.forward
        reason = UNREAD.get(type(outer).__name__, "") if inside else record.capturable
        output = None if record.output is None else record.output.replace(INNER, "")
        records.append(replace(record, name=name, output=output, capturable=reason))
        modules[name] = outer if inside and outer is not None else model.get_submodule(record.name)
    return Topology(tuple(records), type(model).__name__), modules


class BridgeAttachment(Attachment):
    """The fastening of a scope to a bridged model."""

    def __init__(self, model: nn.Module, topology: Topology, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(model, topology, modules)
        self._open: dict[int, list[tuple[Any, ExitStack]]] = {}

    @contextmanager
    def active(self, stage: Stage, what: Any) -> Iterator[Actor]:
        """Keep an actor active for a `with` block; listeners that an interrupt left on a module come off with the last one."""
        try:
            with super().active(stage, what) as actor:
                yield actor
        finally:
            if not self.active_here:
                for _, listeners in self._open.pop(threading.get_ident(), []):
                    listeners.close()

    def _fasten_more(self, stack: ExitStack) -> None:
        for module, record in list(self._records.items()):
            if _computes(module) and not record.capturable:
                # registered after the attachment's own, so the run of this module is known
                stack.callback(module.register_forward_pre_hook(self._listen).remove)
                stack.callback(module.register_forward_hook(self._unlisten, always_call=True, prepend=True).remove)

    # ---- while one module runs ----------------------------------------------------------------------------------

    def _listen(self, module: Any, args: Any) -> None:
        """Hook points get their listeners as the module starts, behind those of the user."""
        if not seam.reads(self, module):
            return
        seen: dict[str, Tensor] = {}
        stack = ExitStack()
        heads = self._records[module].heads
        for point, rows_first in _points(module):
            stack.callback(point.register_forward_hook(partial(_note, seen, heads, rows_first)).remove)
        # two steps that have no hook point of their own: keys joined with the cache's, and (GPT-NeoX's kind of bridge) the rotation
        for method, parts in (("_update_kv_cache", ("k", "v")), ("_apply_rotary_pos_emb", ("q",))):
            if hasattr(type(module), method):
                module.__dict__[method] = _noting(getattr(module, method), parts, seen)
                stack.callback(module.__dict__.pop, method, None)
        finish = partial(self._finish, module, seen)
        stack.callback(module.o.hook_in.register_forward_hook(finish, prepend=True).remove)  # before the user edits hook_z
        self._listeners.append((module, stack))

    def _unlisten(self, module: Any, args: Any, output: Any) -> None:
        while self._listeners and any(one is module for one, _ in self._listeners):
            last, stack = self._listeners.pop()
            stack.close()
            if last is module:
                return

    @property
    def _listeners(self) -> list[tuple[Any, ExitStack]]:
        return self._open.setdefault(threading.get_ident(), [])

    def _module_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._module_starts(module, args, kwargs)
        if self.active_here and _computes(module):
            mask = kwargs.get("attention_mask")
            self._local.mask = mask if isinstance(mask, torch.Tensor) else None

    # ---- the call -----------------------------------------------------------------------------------------------

    def _finish(self, module: Any, seen: dict[str, Tensor], point: Any, args: Any, output: Tensor) -> Tensor | None:
        """The heads' outputs have arrived at hook_z: the call is complete."""
        if not self.active_here or seam.is_serving() or not {"q", "k", "v"} <= seen.keys():
            return None
        record = self._records[module]
        q, k, v = seen["q"], seen["k"], seen["v"]
        mask = getattr(self._local, "mask", None)
        if mask is not None and mask.dim() >= 3 and mask.shape[-2] not in (1, q.shape[2]):
            mask = mask[..., -q.shape[2] :, :]

        def run(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any) -> tuple[Tensor, None]:
            if query is q and key is k and value is v:
                return output.reshape(q.shape[0], q.shape[2], record.heads, -1), None
            return _dense(query, key, value, attention_mask, record.causal, **rest), None

        found = seam.through(run, KERNEL, module, q, k, v, mask, **_constants(module, q.shape[-1]))[0]
        return None if found.data_ptr() == output.data_ptr() else found.reshape(output.shape)

    def _read(self, host: HostCall, module: nn.Module, run: ModuleRun, state: ForwardState, function: Any, name: str) -> AttentionCall:
        call = super()._read(host, module, run, state, function, name)
        if name == KERNEL and _edited(module):
            output, _ = function(module, host.query, host.key, host.value, host.mask, **host.kwargs)
            check_output(call, output, {**host.kwargs, "hooks": "on hook_attn_scores or hook_pattern"})
        return call

    def _not_seen(self, record: AttentionModule, module: nn.Module) -> CaptureError:
        if not _computes(module):
            return super()._not_seen(record, module)
        return refusal(
            CaptureError,
            f"{record.name} ({type(module).__name__})",
            "it ran, but q, k, v and the heads' outputs did not all pass its hook points",
            "capture the transformers model itself, before it is bridged",
        )


def _computes(module: Any) -> bool:
    """True for a bridge's component that computes attention by itself."""
    return hasattr(type(module), "_update_kv_cache")


def _points(module: Any) -> list[tuple[Any, bool]]:
    """Hook points that q passes; the last one to fire has what the scores see. With each: whether its rows come before its heads, which
    the shape does not tell where there are as many rows as heads."""
    own = vars(module)["_modules"]
    return [(module.q.hook_out, True), *((own[name], False) for name in ("hook_q_normed", "hook_rot_q") if name in own)]


def _noting(method: Callable[..., Any], parts: tuple[str, ...], seen: dict[str, Tensor]) -> Callable[..., Any]:
    """A method whose first results are noted."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        seen.update(zip(parts, out, strict=False))
        return out

    return noted


def _note(seen: dict[str, Tensor], heads: int, rows_first: bool, point: Any, args: Any, output: Tensor) -> None:
    """Keep q as [B, H, N, D], from [B, N, H * D], [B, N, H, D] or itself."""
    if output.dim() == 3:
        seen["q"] = output.unflatten(-1, (heads, -1)).transpose(1, 2)
    else:
        seen["q"] = output.transpose(1, 2) if rows_first else output


def _constants(module: Any, width: int) -> dict[str, Any]:
    """Scale, soft cap and sinks as the bridge takes them: from the module it wraps."""
    inner = module.original_component
    own = getattr(inner, "scaling", None)
    scale = float(own) if isinstance(own, int | float) and _rotates(module) else width**-0.5
    if not _rotates(module) and getattr(module.config, "scale_attn_by_inverse_layer_idx", False):
        scale /= float(module._layer_idx + 1)
    out: dict[str, Any] = {"scaling": scale, "is_causal": bool(module.is_causal) and not getattr(module, "is_cross_attention", False)}
    if getattr(inner, "attn_logit_softcapping", None) is not None:
        out["softcap"] = inner.attn_logit_softcapping
    if getattr(inner, "sinks", None) is not None:
        out["s_aux"] = inner.sinks
    return out


def _rotates(module: Any) -> bool:
    return "hook_rot_q" in vars(module)["_modules"]


def _edited(module: Any) -> bool:
    """True when somebody listens (and so might write) where scores and patterns pass."""
    return bool(module.hook_attn_scores._forward_hooks or module.hook_pattern._forward_hooks)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, **constants: Any) -> Tensor:
    """[B, Nq, Hq, Dv]: what the bridge would have computed of edited q, k, v, in its own way (all of the matrix, softmax in float32)."""
    scaling, softcap, s_aux = constants["scaling"], constants.get("softcap"), constants.get("s_aux")
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-2, -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    elif causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    weights = scores.float().softmax(-1).to(q.dtype)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


__all__ = ["BridgeAttachment", "bridge_host", "discover_bridge"]
