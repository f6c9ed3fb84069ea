"""diffusers: attention of diffusion transformers (and U-Nets), with what each token is, at which timestep, for which guidance branch.

The library has two generations of attention. The older processors call torch's scaled_dot_product_attention themselves (SD3, DiT, U-Nets);
the newer ones call a dispatcher, which looks a backend up in a registry (Flux and most since). Both are met without touching a processor,
so outputs are the same to the bit: the first by the watch of `capture.sdpa`, the second by wrapping the registered backends while
something is active. The library's own switch, `set_attention_backend`, reaches only the second kind and leaves a global setting behind.

Joint attention concatenates text and image tokens, SD3 with the image first and Flux with the text first. Nothing in a call says which, so
it is read off the call's values: v is the plain projection of each stream, and the first text token's can be computed and looked for. The
silent failure this avoids: text and image masses that have changed places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn

from headscope.capture import seam
from headscope.capture.forward import _by_name as by_name
from headscope.capture.hosts import Host
from headscope.capture.sdpa import SdpaAttachment, codes_of
from headscope.capture.steps import IMAGE, TEXT, StepObserver
from headscope.capture.streams import Forward, find_streams, timesteps
from headscope.errors import CaptureError, refusal
from headscope.statistics import HeadStatistics
from headscope.statistics.steps import Step, StepStatistics
from headscope.topology import AttentionModule, Topology

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.capture.calls import HostCall
    from headscope.capture.forward import ForwardState, ModuleRun
    from headscope.capture.observer import Observer
    from headscope.statistics import StatisticsRequest

# ---- topology ------------------------------------------------------------------------------------------------------


def discover_diffusers(model: nn.Module) -> Topology:
    """The attention modules of a diffusers model. A block's first self- or joint attention has the block's number as its layer; a second
    one beside it (SD3's `attn2` over image tokens) and cross-attention are addressed by name."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention | AttentionModuleMixin)]
    if not found:
        raise refusal(
            CaptureError,
            type(model).__name__,
            "it has no attention modules of diffusers",
            "pass a diffusion transformer, e.g. SD3Transformer2DModel, FluxTransformer2DModel or DiTTransformer2DModel",
        )
    records, blocks = [], set()
    layer = 0
    for name, module in found:
        cross = bool(getattr(module, "is_cross_attention", False))
        block = name.rpartition(".")[0]
        main = not cross and block not in blocks
        records.append(_describe(name, module, layer if main else None, cross))
        if main:
            blocks.add(block)
            layer += 1
    return Topology(tuple(records), type(model).__name__)


def _describe(name: str, module: Any, layer: int | None, cross: bool) -> AttentionModule:
    heads = int(module.heads)
    width = getattr(module, "head_dim", None) or int(getattr(module, "inner_dim", 0)) // heads
    inner = int(getattr(module, "inner_kv_dim", 0) or heads * width)
    out = getattr(module, "to_out", None)
    output = f"{name}.to_out.0" if isinstance(out, nn.ModuleList) else f"{name}.to_out" if isinstance(out, nn.Linear) else None
    processor = type(getattr(module, "processor", None))
    words = {word for code, _ in codes_of(processor) for word in code.co_names}
    known = words & {"scaled_dot_product_attention", "dispatch_attention_fn"}
    reason = "" if known else f"its {processor.__name__} computes attention by itself"
    kv_heads = max(inner // width, 1) if width and heads % max(inner // width, 1) == 0 else heads
    return AttentionModule(
        name, layer, "cross" if cross else "full", heads, kv_heads, width, causal=False, output=output, capturable=reason
    )


# ---- the registry of backends --------------------------------------------------------------------------------------

_lock = threading.RLock()
_open: WeakSet[DiffusersAttachment] = WeakSet()
_saved: dict[Any, Callable[..., Any]] = {}


@contextmanager
def _backends_seen(attachment: DiffusersAttachment) -> Iterator[None]:
    """Every registered attention backend wrapped, until the last attachment that needs it has gone."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    with _lock:
        if not _open:
            for key, function in list(Registry._backends.items()):
                _saved[key] = function
                Registry._backends[key] = _seen(function, str(getattr(key, "value", key)))
        _open.add(attachment)
    try:
        yield
    finally:
        with _lock:
            _open.discard(attachment)
            if not _open:
                Registry._backends.update(_saved)
                _saved.clear()


def _seen(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A backend (q, k, v and output [B, N, H, D]) that is served like any attention function while a module of a scope runs."""

    def backend(*args: Any, **kwargs: Any) -> Any:
        module = None if seam.is_serving() else next((one for a in list(_open) if (one := a.calling_module()) is not None), None)
        if module is None:
            return function(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        if given.get("_parallel_config") is not None or given.get("return_lse"):
            raise refusal(
                CaptureError,
                f"attention backend {name!r}",
                "the sequence is split over several devices (context parallelism), so no device has a whole row",
                "capture without parallel_config",
            )
        mask = given.get("attn_mask")
        shown = _as_matrix(mask, given["query"].shape[0], given["key"].shape[1])

        def run(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any) -> tuple[Tensor, None]:
            tensors = {"query": query.transpose(1, 2), "key": key.transpose(1, 2), "value": value.transpose(1, 2)}
            edited = {} if attention_mask is shown else {"attn_mask": attention_mask}
            return function(**{**given, **tensors, **edited}), None

        q, k, v = (given[part].transpose(1, 2) for part in ("query", "key", "value"))
        rest = {"scaling": given.get("scale"), "dropout": given.get("dropout_p", 0.0), "is_causal": bool(given.get("is_causal", False))}
        return seam.through(run, name, module, q, k, v, shown, **rest)[0]

    return backend


def _as_matrix(mask: Any, batch: int, keys: int) -> Any:
    """A [B, Nk] mask as [B, 1, 1, Nk], as diffusers reads it; any other tensor with torch's alignment."""
    if not isinstance(mask, torch.Tensor) or mask.dim() >= 4:
        return mask
    if mask.dim() == 2 and tuple(mask.shape) == (batch, keys):
        return mask[:, None, None, :]
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


# ---- fastening -----------------------------------------------------------------------------------------------------


class DiffusersAttachment(SdpaAttachment):
    """The fastening of a scope to a diffusers model."""

    def __init__(self, model: nn.Module, topology: Topology) -> None:
        super().__init__(model, topology)
        self.branches: Callable[[int, Mapping[str, Any], str | None], tuple[str, ...] | None] = lambda *_: None
        self._context: str | None = None

    def _fasten_more(self, stack: ExitStack) -> None:
        super()._fasten_more(stack)
        stack.enter_context(_backends_seen(self))
        stack.enter_context(self._cache_context_seen())

    @contextmanager
    def _cache_context_seen(self) -> Iterator[None]:
        """Pipelines that run guidance branches one after the other name each to the model; listen to the name."""
        model: Any = self._model
        inner = getattr(model, "cache_context", None)
        if inner is None:
            yield
            return

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            before, self._context = self._context, name
            try:
                with inner(name, *args, **kwargs) as entered:
                    yield entered
            finally:
                self._context = before

        model.__dict__["cache_context"] = cache_context
        try:
            yield
        finally:
            model.__dict__.pop("cache_context", None)

    def _model_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active_here:
            return
        state = self.state
        state.enter_model(module, (), {})
        given = by_name(module, args, kwargs)
        hidden, text = given.get("hidden_states", given.get("sample")), given.get("encoder_hidden_states")
        rows = hidden.shape[0] if isinstance(hidden, torch.Tensor) else 0
        image = hidden.shape[1] if isinstance(hidden, torch.Tensor) and hidden.dim() == 3 else None
        step = Step(state.number, timesteps(given.get("timestep"), rows), self.branches(rows, given, self._context))
        self._local.forward = Forward(step, text.shape[1] if isinstance(text, torch.Tensor) and text.dim() == 3 else 0, image)
        self._local.streams = {}

    def _model_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super()._model_ends(module, args, output)
        if self.active_here:
            self._local.forward, self._local.streams = None, {}

    def _module_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._module_starts(module, args, kwargs)
        if self.active_here:
            given = by_name(module, args, kwargs)
            hidden, text = given.get("hidden_states"), given.get("encoder_hidden_states")
            if getattr(self._local, "streams", None) is None:
                self._local.streams = {}
            self._local.streams[self.state.modules[-1].serial] = (hidden, text if isinstance(text, torch.Tensor) else None)

    def _read(self, host: HostCall, module: nn.Module, run: ModuleRun, state: ForwardState, function: Any, name: str) -> AttentionCall:
        hidden, text = self._local.streams.get(run.serial, (None, None))
        rows = hidden.shape[1] if isinstance(hidden, torch.Tensor) and hidden.dim() == 3 else None
        q, k = host.query.shape[2], host.key.shape[2]
        run.cross = text is not None and k == text.shape[1] and q != rows + k if rows else run.record.kind == "cross" and q != k
        if run.cross and q == k and run.record.kind != "cross":
            run.cross = False  # as many words as image tokens, in a module that attends to the image
        call = super()._read(host, module, run, state, function, name)
        forward = getattr(self._local, "forward", None)
        if forward is None:
            return call
        streams = None if run.cross else find_streams(forward, module, host.value, rows, text)
        step = forward.step
        facts = {"step": step, "timestep": step.timestep, "branches": step.branches, "streams": streams}
        return replace(call, facts={**call.facts, **facts})

    def _not_seen(self, record: AttentionModule, module: nn.Module) -> CaptureError:
        processor = type(getattr(module, "processor", None)).__name__
        return refusal(
            CaptureError,
            f"{record.name} ({processor})",
            "it ran, but its attention reached neither scaled_dot_product_attention nor diffusers' dispatcher",
            "set a processor that uses them, e.g. model.set_default_attn_processor()",
        )


# ---- the host ------------------------------------------------------------------------------------------------------


class DiffusersHost(Host):
    """A diffusers model, or the transformer (or U-Net) of a pipeline.

    `guidance`: the branches that the batch is made of, in order, e.g. ("uncond", "cond"); None leaves it to the pipeline and the inputs: a
    pipeline under classifier-free guidance says so, cache contexts are named, and DiT's null class is its unconditional branch.
    """

    guidance: tuple[str, ...] | None = None

    def observer(self, request: StatisticsRequest, verify: bool) -> Observer:
        return StepObserver(request, self.topology, verify=verify)

    def result(self, request: StatisticsRequest) -> HeadStatistics:
        return StepStatistics(request, self.topology)

    def completed(self, names: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`class_mass` over image and text tokens is measured by default where a model has both, and needs no labels to be given."""
        from headscope.statistics.request import expand_names

        listed = expand_names(names)
        if names is None and self._has_text:
            listed = (*listed, "class_mass")
        if "class_mass" in listed and params.get("labels") is None:
            params = {**params, "labels": torch.tensor([IMAGE, TEXT]), "label_names": ("image", "text")}
        return listed, params

    @property
    def _has_text(self) -> bool:
        """True when text and image tokens attend to one another in one sequence."""
        modules = [self.model.get_submodule(record.name) for record in self.topology.main]
        return any(getattr(module, "added_kv_proj_dim", None) is not None for module in modules)

    def run(self, inputs: Any) -> None:
        """A pipeline is called with the inputs, a bare model runs one step over them."""
        if self.given is self.model:
            super().run(inputs)
        elif isinstance(inputs, Mapping):
            self.given(**inputs)
        else:
            raise refusal(
                CaptureError, f"a {type(inputs).__name__}", "a pipeline takes named arguments", "pass a dict, e.g. {'prompt': ...}"
            )

    def branches(self, rows: int, given: Mapping[str, Any], context: str | None) -> tuple[str, ...] | None:
        """What each row of the batch is."""
        if self.guidance is not None:
            return _spread(self.guidance, rows)
        if context is not None:
            return (context,) * rows
        null = getattr(getattr(self.model, "config", None), "num_embeds_ada_norm", None)
        classes = given.get("class_labels")
        if isinstance(classes, torch.Tensor) and null is not None:
            return tuple("uncond" if int(one) == int(null) else "cond" for one in classes.reshape(-1).tolist())
        if self.given is self.model:
            return None
        if given.get("skip_layers") is not None:
            return ("cond, layers skipped",) * rows
        parts = []
        if getattr(self.given, "do_classifier_free_guidance", False):
            parts.append("uncond")
        parts.append("cond")
        if getattr(self.given, "do_perturbed_attention_guidance", False):
            parts.append("perturbed")
        return _spread(tuple(parts), rows)


def _spread(parts: tuple[str, ...], rows: int) -> tuple[str, ...]:
    """One name per row: each part has an equal share of the batch."""
    if rows % len(parts):
        raise refusal(
            CaptureError,
            f"a batch of {rows} for guidance branches {parts}",
            "it is no multiple of their number",
            "set scope.host.guidance to the branches the batch is made of",
        )
    return tuple(part for part in parts for _ in range(rows // len(parts)))


def diffusers_host(given: Any) -> DiffusersHost:
    """The host of a diffusers model or pipeline; CaptureError for anything else of that library."""
    from diffusers import DiffusionPipeline, ModelMixin

    model = given
    if isinstance(given, DiffusionPipeline):
        model = getattr(given, "transformer", None) or getattr(given, "unet", None)
    if not isinstance(model, ModelMixin):
        raise refusal(
            CaptureError,
            f"a diffusers.{type(given).__name__}",
            "it is neither a model nor a pipeline with a transformer or a U-Net",
            "pass the pipeline, or its transformer",
        )
    topology = discover_diffusers(model)
    attachment = DiffusersAttachment(model, topology)
    host = DiffusersHost("diffusers", given, model, topology, attachment)
    attachment.branches = host.branches
    return host


__all__ = ["DiffusersAttachment", "DiffusersHost", "diffusers_host", "discover_diffusers"]
