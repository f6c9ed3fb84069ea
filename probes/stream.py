"""The residual stream around attention: which norm a layer's heads read through, what is added, and what the logits are read from.

Circuits are about the stream, and a model's attention module says nothing of it: its input has already passed a norm, its output may pass
another one, and the logits are read through a last one. Which modules these are is not taken from their names but seen: a short text runs
once, and a norm is the one whose output a head or the unembedding was given. Its form (centred or not, gain, bias) is measured too, so
LayerNorm, RMSNorm and Gemma's gain of 1 + w need no list.

The silent failure this avoids: a circuit through a norm that was not there, or that was missed. What is added to the stream is checked
against what the rest of the layer then read; a model where the two do not meet (post-norm encoders, residuals added inside the attention)
is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from headscope.circuits import HeadWeights, head_weights
from headscope.errors import CaptureError, ProbeError, refusal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.scope import Scope

PROBE_SIZE = 64.0
"""Entries of the vectors that a norm is measured with: its epsilon is then some 1e-9 of their mean square."""


@dataclass(frozen=True, eq=False)
class NormForm:
    """y = bias + gain (x - centred mean(x)) / sigma(x). `gain`, `bias` [d] float64 on the CPU; `name`: the module in the model."""

    name: str
    centred: bool
    gain: Tensor
    bias: Tensor

    @classmethod
    def of(cls, name: str, module: nn.Module, width: int, like: Tensor) -> NormForm:
        """Measured on three vectors, on a copy of the module in float32 or more: half precision would round the gain to three digits."""
        if not any(one.is_meta for one in module.parameters()):
            wide = torch.promote_types(like.dtype, torch.float32)
            module, like = copy.deepcopy(module).to(wide), like.to(wide)
        ones = torch.full((width,), PROBE_SIZE, dtype=torch.float64)
        upper = (width + 1) // 2
        slope = torch.where(torch.arange(width) < upper, PROBE_SIZE * (width - upper) / upper, -PROBE_SIZE).double()
        inputs = torch.stack([torch.zeros_like(ones), ones, slope]).to(like)
        with torch.no_grad():
            zero, flat, steep = module(inputs[None])[0].double().cpu()
        centred = bool((flat - zero).abs().max() <= 1e-3 * (steep - zero).abs().max())
        gain = (steep - zero) * slope.square().mean().sqrt() / slope if centred else flat - zero
        return cls(name, centred, gain, zero)

    def fold(self, weight: Tensor) -> Tensor:
        """weight [..., d, n] that reads y as one that reads x, up to one positive factor per row of x."""
        folded = self.gain.to(weight.device, weight.dtype)[:, None] * weight
        return folded - folded.mean(-2, keepdim=True) if self.centred else folded

    def frozen(self, parts: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What `parts` [..., d] of x [d] make of y [d], with sigma as it was at x: linear in the parts; all parts of x give y - bias.

        Raises ProbeError when y is not this norm of x.
        """
        gain, bias = self.gain.to(x.device), self.bias.to(x.device)
        centre = x.double() - (x.double().mean() if self.centred else 0.0)
        shape = gain * centre
        target = y.double() - bias
        scale = (shape @ target) / (shape @ shape)
        if not torch.allclose(scale * shape, target, rtol=2e-2, atol=1e-2 * float(target.abs().max())):
            raise refusal(ProbeError, f"norm {self.name}", "it is neither a LayerNorm nor an RMSNorm", "name other probes")
        parts = parts.double() - (parts.double().mean(-1, keepdim=True) if self.centred else 0.0)
        return parts * gain * scale


@dataclass(frozen=True, eq=False)
class LayerParts:
    """Of one layer: its block's module name, the norm its attention reads through, the norm between W_O and the stream (rare)."""

    block: str
    reads: NormForm | None
    writes: NormForm | None


@dataclass(frozen=True, eq=False)
class Stream:
    """Of a model: its layers' parts by number, the norm that the logits are read through, width of the stream."""

    layers: dict[int, LayerParts]
    final: NormForm | None
    width: int


@dataclass(eq=False)
class _Seen:
    """What went in and out of a module: the tensors themselves, so that no storage is used twice while they are compared."""

    given: Tensor | None = None
    made: Tensor | None = None


@dataclass(eq=False)
class _Trace:
    seen: dict[str, _Seen] = field(default_factory=dict)

    def made_by(self, tensor: Tensor | None, names: list[str]) -> str | None:
        """Which of the modules made a tensor (or what it is a view of)."""
        for name in names:
            made = self.seen[name].made if name in self.seen else None
            if made is not None and tensor is not None and _storage(made) == _storage(tensor):
                return name
        return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def first_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states of a module's call: its first positional tensor, else its `hidden_states`."""
    listed = [one for one in args if isinstance(one, torch.Tensor)]
    if listed:
        return listed[0]
    found = kwargs.get("hidden_states")
    return found if isinstance(found, torch.Tensor) else None


def out_tensor(output: Any) -> Tensor | None:
    """The hidden states in a module's output."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, torch.Tensor) else None


@contextmanager
def watching(model: nn.Module, names: list[str], see: Any) -> Iterator[None]:
    """Calls see(name, given, made) after each of the named modules ran."""
    with ExitStack() as stack:
        for name in names:

            def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                see(name, first_tensor(args, kwargs), out_tensor(output))

            stack.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        yield


def read_stream(scope: Scope, *, logits: bool = True) -> Stream:
    """The stream of a causal text model. Runs 8 tokens once. `logits`: also find the norm before the unembedding.

    Raises ProbeError for a model whose attention is not simply added to its stream, or (with `logits`) that has no unembedding.
    """
    model = scope.model
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower() and not list(module.children())]
    blocks = {module.layer: module.name.rpartition(".")[0] for module in scope.topology.main if module.layer is not None}
    attentions = {module.layer: module.name for module in scope.topology.main if module.layer is not None}
    inside = [f"{block}.{child}" for block in blocks.values() for child, _ in model.get_submodule(block).named_children()]
    head = unembedding_name(scope) if logits else None
    trace = _Trace()

    def see(name: str, given: Tensor | None, made: Tensor | None) -> None:
        trace.seen[name] = _Seen(given, made)

    wanted = dict.fromkeys([*norms, *blocks.values(), *attentions.values(), *inside, *([head] if head else [])])
    size = scope.vocabulary or 2
    ids = ((torch.arange(8) * 7919 + 1) % size)[None].to(scope.device)
    with torch.no_grad(), watching(model, list(wanted), see):
        model(input_ids=ids, **({"use_cache": False} if "use_cache" in scope._forward_parameters else {}))
    layers = {layer: _parts(scope, trace, blocks[layer], attentions[layer], norms, inside) for layer in scope.topology.layers}
    width = next(seen.given.shape[-1] for name in blocks.values() if (seen := trace.seen[name]).given is not None)
    final = None
    if head is not None:
        name = trace.made_by(trace.seen[head].given, norms)
        given = trace.seen[head].given
        if given is None or given.shape[-1] != width:
            raise refusal(ProbeError, scope.name, "its logits are not read from the residual stream", "name other probes")
        final = None if name is None else NormForm.of(name, model.get_submodule(name), width, given)
    return Stream(layers, final, width)


def _parts(scope: Scope, trace: _Trace, block: str, attention: str, norms: list[str], inside: list[str]) -> LayerParts:
    """The parts of one layer, checked against what ran."""
    model, seen = scope.model, trace.seen
    own = [name for name in norms if name.startswith(f"{block}.") and not name.startswith(f"{attention}.")]
    entered, out, left = seen[block].given, seen[attention].made, seen[block].made
    if entered is None or out is None or left is None or seen[attention].given is None:
        raise refusal(ProbeError, f"{attention}", "what goes in and out of it is no hidden state", "name other probes")
    before = trace.made_by(seen[attention].given, own)
    after = next((name for name in own if (given := seen[name].given) is not None and _storage(given) == _storage(out)), None)
    delta = seen[after].made if after is not None else out
    assert delta is not None
    middle = entered + delta
    rest = left - middle
    children = [name for name in inside if name.startswith(f"{block}.") and name in seen]
    sequential = any(_close(seen[name].given, middle) for name in (*own, *children) if name != after)
    parallel = any(_close(seen[name].made, rest) for name in children) or _close(torch.zeros_like(rest), rest)
    read_direct = before is not None or _close(seen[attention].given, entered)
    if not ((sequential or parallel) and read_direct):
        raise refusal(
            ProbeError,
            f"{attention} ({type(model).__name__})",
            "what it gives is not simply added to the residual stream that it reads through one norm",
            "name other probes",
        )
    width, like = entered.shape[-1], entered
    forms = [None if name is None else NormForm.of(name, model.get_submodule(name), width, like) for name in (before, after)]
    return LayerParts(block, forms[0], forms[1])


def _close(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a.numel() != b.numel():
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    size = float(b.float().abs().max())
    loose = 1e-3 if b.dtype in (torch.float32, torch.float64) else 3e-2
    return float((a.float() - b.float()).abs().max()) <= loose * max(size, 1e-6)


def unembedding_name(scope: Scope) -> str:
    """The module name of W_U. ProbeError for a model without one."""
    find = getattr(scope.model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None or getattr(head, "weight", None) is None:
        raise refusal(
            ProbeError,
            f"{scope.name} ({type(scope.model).__name__})",
            "it has no output embedding, so it gives no logits",
            "load its language model",
        )
    return next(name for name, module in scope.model.named_modules() if module is head)


def unembedding(scope: Scope) -> Tensor:
    """W_U [d, V] in the model's dtype."""
    weight: Tensor = scope.model.get_submodule(unembedding_name(scope)).weight.detach()
    return weight.T


def all_weights(scope: Scope) -> dict[int, HeadWeights]:
    """The heads' weights of every layer. ProbeError for a model whose weights cannot be cut into heads, or without W_O."""
    try:
        return {layer: head_weights(scope, layer) for layer in scope.topology.layers}
    except CaptureError as error:
        raise ProbeError(f"probe of weights on {scope.name}: {error}") from None


def why_no_weights(scope: Scope) -> str | None:
    """Why a model's heads have no circuits of weights, or None."""
    missing = [module.name for module in scope.topology.main if module.output is None]
    return f"{missing[0]} has no output projection W_O" if missing else None


__all__ = [
    "LayerParts",
    "NormForm",
    "Stream",
    "all_weights",
    "read_stream",
    "unembedding",
    "unembedding_name",
    "watching",
    "why_no_weights",
]
