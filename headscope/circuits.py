"""The weights of a head: W_Q, W_K, W_V, W_O per head, and the two circuits they make (Elhage et al. 2021, transformer-circuits.pub).

    head_weights(scope, 18).ov(6)        # W_V W_O of head 18.6, [d_model, d_model]

Read from the live model's own parameters, whatever host it came through. With grouped queries a query head's circuits use the key head of
its group; indexing W_K and W_V by query head, or reading the group the wrong way round, gives the circuit of another head without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import CaptureError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope
    from headscope.topology import AttentionModule

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"))
JOINED = ("qkv_proj", "c_attn")
"""One projection for all three, its outputs in the order q, k, v."""
INTERLEAVED = "query_key_value"
"""One projection, its outputs in the order head 0's q, k, v, head 1's q, k, v, ... (GPT-NeoX)."""


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Projections of one attention module, per head; x W maps a row x of the residual stream.

    `q` [Hq, d_model, D], `k` [Hkv, d_model, D], `v` [Hkv, d_model, Dv], `o` [Hq, Dv, d_model]; biases [H, D] or None, `o_bias` [d_model] or
    None. In the model's dtype, views of its parameters where the layout allows: do not write to them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None

    def kv_head(self, head: int) -> int:
        """The key head that a query head reads."""
        if not 0 <= head < len(self.q):
            raise refusal(CaptureError, f"head {head}", f"the layer has heads 0..{len(self.q) - 1}", "pass one of those")
        return head // (len(self.q) // len(self.k))

    def ov(self, head: int) -> Tensor:
        """[d_model, d_model]: W_V W_O, what attending to a token writes."""
        return self.v[self.kv_head(head)] @ self.o[head]

    def qk(self, head: int) -> Tensor:
        """[d_model, d_model]: W_Q W_K^T, what a query token looks for, before rotary embedding, query-key norms, biases and scale."""
        return self.q[head] @ self.k[self.kv_head(head)].T


def head_weights(scope: Scope, layer: int | str) -> HeadWeights:
    """The projections of a layer's heads. CaptureError for a module whose projections are of a kind not known here."""
    record = scope.topology[layer]
    module: Any = scope._attachment.module_of(record)
    module = getattr(module, "original_component", module)
    if any(getattr(module, name, None) is not None for name in ("kv_b_proj", "q_a_proj")):
        raise _unknown(record, module, "its keys and values are compressed (latent attention)")
    parts = _separate(module) or _joined(module, record) or _interleaved(module, record)
    if parts is None:
        raise _unknown(record, module, "its projections have names that are not known here")
    heads = (record.heads, record.kv_heads, record.kv_heads)
    split = [_by_head(weight, bias, count, record, module) for (weight, bias), count in zip(parts, heads, strict=True)]
    if record.output is None:
        raise _unknown(record, module, "it has no output projection")
    weight, o_bias = _linear(_output(scope, record, module))
    if weight.shape[1] % record.heads:
        raise _unknown(record, module, "its output projection does not split into heads")
    o = weight.T.unflatten(0, (record.heads, -1))
    (q, q_bias), (k, k_bias), (v, v_bias) = split
    return HeadWeights(q, k, v, o, q_bias, k_bias, v_bias, o_bias)


def _output(scope: Scope, record: AttentionModule, module: Any) -> Any:
    """W_O's module: a child of the attention module, else where the topology says it is."""
    name = str(record.output)
    inside = name.removeprefix(f"{record.name}.")
    return module.get_submodule(inside) if inside != name else scope.model.get_submodule(name)


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear module; transformers' Conv1D keeps it as [in, out]."""
    module = getattr(module, "original_component", module)
    weight: Tensor = module.weight.detach()
    if hasattr(weight, "__tensor_flatten__") and type(weight).dequantize is not torch.Tensor.dequantize:
        weight = weight.dequantize()  # a quantisation library's tensor, which looks like the numbers it stands for but cannot be cut
    if not weight.is_floating_point() or weight.dim() != 2:
        raise refusal(
            CaptureError,
            f"a {type(module).__name__} of {weight.dtype}",
            "its weights are quantised, and cannot be cut into heads as they are",
            "load the model without quantisation",
        )
    bias = getattr(module, "bias", None)
    return weight.T if type(module).__name__ == "Conv1D" else weight, None if bias is None else bias.detach()


Part = tuple[torch.Tensor, torch.Tensor | None]


def _separate(module: Any) -> list[Part] | None:
    for names in SEPARATE:
        found = [getattr(module, name, None) for name in names]
        if all(getattr(one, "weight", None) is not None for one in found):
            return [_linear(one) for one in found]
    return None


def _joined(module: Any, record: AttentionModule) -> list[Part] | None:
    found = next((getattr(module, name) for name in JOINED if getattr(module, name, None) is not None), None)
    if found is None:
        return None
    weight, bias = _linear(found)
    width = weight.shape[0] // (record.heads + 2 * record.kv_heads)
    sizes = [record.heads * width, record.kv_heads * width, record.kv_heads * width]
    if sum(sizes) != weight.shape[0]:
        return None
    biases = [None] * 3 if bias is None else list(bias.split(sizes))
    return list(zip(weight.split(sizes), biases, strict=True))


def _interleaved(module: Any, record: AttentionModule) -> list[Part] | None:
    found = getattr(module, INTERLEAVED, None)
    if found is None or record.heads != record.kv_heads or type(module).__name__ != "GPTNeoXAttention":
        return None
    weight, bias = _linear(found)
    rows = weight.unflatten(0, (record.heads, 3, -1))
    biases = None if bias is None else bias.unflatten(0, (record.heads, 3, -1))
    return [(rows[:, i].flatten(0, 1), None if biases is None else biases[:, i].flatten()) for i in range(3)]


def _by_head(weight: Tensor, bias: Tensor | None, heads: int, record: AttentionModule, module: Any) -> Part:
    if weight.shape[0] % heads or (record.head_dim and weight.shape[0] // heads > record.head_dim):  # e.g. a gate beside q
        raise _unknown(record, module, f"a projection to {weight.shape[0]} numbers does not split into {heads} heads of {record.head_dim}")
    return weight.unflatten(0, (heads, -1)).transpose(1, 2), None if bias is None else bias.unflatten(0, (heads, -1))


def _unknown(record: AttentionModule, module: Any, why: str) -> CaptureError:
    return refusal(CaptureError, f"{record.name} ({type(module).__name__})", why, "read its parameters from scope.model")


__all__ = ["HeadWeights", "head_weights"]
