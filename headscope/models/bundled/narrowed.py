"""Attention for training in which only designated key heads may look far: the others see a few first keys and a short window.

A model left alone learns a task of distant copying in every head of a layer at once: nothing is then lost with any of them, none can be
called the one that does it, and no method that looks for such heads can be judged. Here distance is a privilege of the designated heads.
Three means, for the others: in a share of the steps they stream; in the remaining ones, where they see all keys as they will after
training, their outputs are drawn towards what streaming would give; and in half of the haystacks some of them write nothing, so that the
work is not stacked on one head of the first layer, whose loss would say nothing about distance. The trained model is a plain Llama.

Streaming is computed block by block: work grows with the length, not with its square, and each product is one of cuBLAS', whose
backward pass gives the same bits again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "headscope_narrowed"


def streaming_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sink: int, window: int, scale: float) -> torch.Tensor:
    """[B, Hq, N, D]: attention of q [B, Hq, N, D] to the first `sink` keys and to the last `window`, its own included.

    k, v: [B, Hkv, N, D], Hq a multiple of Hkv.
    """
    heads, count = k.shape[1], q.shape[2]
    blocks = -(-count // window)
    q, k, v = (pad(each, (0, 0, 0, blocks * window - count)) for each in (q, k, v))
    rows = q.unflatten(1, (heads, -1)).unflatten(3, (blocks, window)).transpose(2, 3).flatten(3, 4)
    first_k, first_v = k[:, :, :sink], v[:, :, :sink]
    far = (rows.flatten(2, 3) @ first_k.mT).unflatten(2, rows.shape[2:4])
    scores = torch.cat([far, rows @ _near(k, window).mT], -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    allowed = _allowed(blocks, sink, window, q.device).repeat(1, q.shape[1] // heads, 1)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).to(v.dtype)
    out = weights[..., sink:] @ _near(v, window) + (weights[..., :sink].flatten(2, 3) @ first_v).unflatten(2, rows.shape[2:4])
    out = out.unflatten(3, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, :, :count]


def _near(keys: torch.Tensor, window: int) -> torch.Tensor:
    """[B, H, N, D] -> [B, H, blocks, 2 window, D]: each block behind the one before it."""
    own = keys.unflatten(2, (-1, window))
    return torch.cat([pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1], own], 3)


def _allowed(blocks: int, sink: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [blocks, window, sink + 2 window]: what each query of a block may look at."""
    query = torch.arange(blocks * window, device=device).view(blocks, window, 1)
    near = torch.arange(-window, window, device=device) + window * torch.arange(blocks, device=device)[:, None, None]
    first = torch.arange(sink, device=device).expand(blocks, 1, -1)
    return torch.cat([first <= query - window, (near >= 0) & (near <= query) & (near > query - window)], -1)


@dataclass(eq=False)
class Narrowed:
    """The attention function of a Llama in training. `designated`: how many key heads of a layer may look far, the first ones of each.

    Set before every forward pass: `closed` (do the others stream?), `kept` ([B, layers, heads], 0 where a head writes nothing; None keeps
    all). Read behind it: `strays`, one number per layer, 0 where no head but the designated ones makes anything of distant keys and about 1
    where they make everything of them; none when closed.
    """

    designated: dict[int, int]
    sink: int = 4
    window: int = 16
    closed: bool = False
    pulled: bool = True
    kept: torch.Tensor | None = None
    strays: list[torch.Tensor] = field(default_factory=list)

    def set(self, closed: bool, kept: torch.Tensor | None = None) -> None:
        """What the next forward pass does."""
        self.closed, self.kept, self.strays = closed, kept, []

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """As transformers calls it: q [B, Hq, N, D], k and v [B, Hkv, N, D]; the output is [B, N, Hq, D]."""
        far = self.designated.get(module.layer_idx, 0)
        group = query.shape[1] // key.shape[1]
        others = (query[:, far * group :], key[:, far:], value[:, far:])
        if not self.closed:
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            if self.pulled and far < key.shape[1]:
                self.strays.append(self._stray(out[:, far * group :], *others, scaling))
        else:
            parts = [] if far == key.shape[1] else [streaming_attention(*others, sink=self.sink, window=self.window, scale=scaling)]
            if far:
                some = (query[:, : far * group], key[:, :far], value[:, :far])
                parts.insert(0, scaled_dot_product_attention(*some, is_causal=True, scale=scaling, enable_gqa=True))
            out = torch.cat([part.to(parts[0].dtype) for part in parts], 1)
        if self.kept is not None:
            out = out * self.kept[:, module.layer_idx, :, None, None].to(out.dtype)
        return out.transpose(1, 2).contiguous(), None

    def _stray(self, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        near = streaming_attention(q, k, v, sink=self.sink, window=self.window, scale=scaling).float()
        out = out.float()
        change = (out - near).square().mean((0, 2, 3))
        size = (out.square() + near.square()).mean((0, 2, 3)).detach()
        return (change / size.clamp_min(1e-12)).mean()

    def drop(self, count: int, config: Any, share: float, source: torch.Generator) -> torch.Tensor:
        """[count, layers, heads]: 1 everywhere in the first half of the haystacks; in the second, 0 for a `share` of the other heads."""
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        group = heads // config.num_key_value_heads
        kept = torch.rand(count, layers, heads, generator=source, device=source.device) >= share
        kept[: (count + 1) // 2] = True
        for layer, far in self.designated.items():
            kept[:, layer, : far * group] = True
        return kept.float()


def attach(model: Any, narrowed: Narrowed) -> None:
    """From now on the model's attention is `narrowed`; `model.set_attn_implementation("sdpa")` makes it a plain Llama again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, narrowed)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
