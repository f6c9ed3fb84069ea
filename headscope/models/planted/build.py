"""Weights for a plan: a `LlamaForCausalLM` whose attention is the plan's, in closed form.

The residual stream holds features in columns of their own (`layout`). What makes the rest easy:

RMSNorm is made the identity. One column holds C = 2^14 in every row, so the row's norm is C to 1e-8 whatever the other columns hold, and
the norm's gain C / sqrt(hidden) undoes the division. Without it, a head that writes would rescale its rows, and equal matches would no
longer have equal scores. A column of its own costs no precision: no other column is ever added to it.

Scores come in tiers, each `sharpness` nats (m) above the next: targets, then BOS, then everything else, so a row without a target falls to
BOS, and e^-m is what leaks. With S the scale of a match and w the largest cosine of two codes:

    kind                  target                        BOS                 the rest
    offset (c = 2m/gap)   c K(0)                        c (K(0) - gap/2)    <= c (K(0) - gap)
    induction             S = 2m / (1 - w)              S (1 + w) / 2       <= S w
    duplicate, block      S = m / (1 - w)               as the rest         <= S w
    vertical, vision      2m                            m                   0
    sink                  m (it is BOS)                 m                   0

BOS carries no token code and no constant on the fast pairs, so its tier is exact; a BOS that is itself a target of a vertical head carries
half the flag, which brings it to 2m.

K-composition: the feeder's W_V reads the token code and its W_O writes it to the `previous` columns, from which later keys read. Induction
heads copy the same way into the `copy` columns, which the unembedding compares with all codes. Rows that copy nothing have logits of
exactly zero: their loss is ln(vocab).

Absolute position, which a rotary model does not have: the meter, a uniform head, averages the BOS flag to 1 / (t + 1), and the MLP of its
layer turns that into steps 1[t >= p] with two SiLU units each: (silu(z + L) - silu(z - L)) / 2L is 0 below z = -2L and 1 above 2L. Blocks
and flagged positions are differences of steps. Everywhere else the MLPs are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.errors import ModelError, refusal
from headscope.models.planted.codes import codes
from headscope.models.planted.kinds import BlockLocal, Duplicate, Induction, Kind, Offset, Sink, Uniform
from headscope.models.planted.layout import BOS, BOS_SLOT, PAD, Layout, Place, Slot, plan, slots
from headscope.models.planted.model import PlantedModel

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

CONSTANT = 2.0**14
_HALF_STEP = 16.0
_LARGEST_SCORE = 2000.0


def planted_llama(
    heads: Mapping[Place, Kind],
    *,
    layers: int = 2,
    n_heads: int = 8,
    kv_heads: int | None = None,
    vocab: int = 128,
    max_positions: int = 512,
    head_dim: int | None = None,
    sharpness: float = 20.0,
    seed: int = 0,
) -> PlantedModel:
    """A `LlamaForCausalLM` (float32, CPU, eval) with these heads; every other head is uniform and writes nothing.

    - `heads`: (layer, head) -> kind. Induction needs a `Previous` in an earlier layer, `BlockLocal` and `Vertical(positions=...)` a uniform
      (unplanted) head in an earlier layer.
    - `kv_heads`: key heads, a divisor of `n_heads` (default: `n_heads`). `head_dim`: even; None takes the smallest of 64, 128, 256 that
      fits. `vocab`: ids 0 (BOS), 1 (padding) and 2 .. vocab - 1, the tokens.
    - `sharpness`: nats between tiers of scores. A row of N keys is off the closed form by at most about N e^-sharpness, plus float32
      rounding of the scores.
    - `seed`: of the token codes, where there are more tokens than dimensions.

    The attention is defined for sequences that start with BOS (padding before it is fine) and hold no other BOS. The global random state is
    left alone. Raises ModelError for what cannot be planted.
    """
    if not 0 < sharpness <= 100:
        why = "it is the distance between tiers of scores in nats, positive, and past 100 float32 loses equal matches"
        raise refusal(ModelError, f"sharpness={sharpness}", why, "pass e.g. 20")
    kv_heads = n_heads if kv_heads is None else kv_heads
    layout = plan(heads, layers=layers, n_heads=n_heads, kv_heads=kv_heads, vocab=vocab, positions=max_positions, head_dim=head_dim)
    writer = _Writer(layout, sharpness, seed)
    return PlantedModel(
        model=writer.model(),
        heads=dict(layout.heads),
        feeds=_feeds(layout),
        sharpness=sharpness,
        codes=writer.codes.float(),
        gain=writer.gain,
        max_positions=max_positions,
    )


def _feeds(layout: Layout) -> dict[Place, Place]:
    out: dict[Place, Place] = {}
    for place, kind in layout.heads.items():
        if isinstance(kind, Induction) and layout.feeder is not None:
            out[place] = layout.feeder
        elif layout.meter is not None and any(slot[0] in ("positions", "block") for slot in slots(kind)):
            out[place] = layout.meter
    return out


class _Writer:
    """Holds what every weight is computed from; everything in float64 until it is written."""

    def __init__(self, layout: Layout, sharpness: float, seed: int) -> None:
        self.layout, self.margin = layout, sharpness
        tokens, self.worst = codes(layout.vocab - 2, layout.code_dims, seed)
        self.codes = torch.cat([torch.zeros(2, layout.code_dims, dtype=torch.float64), tokens])
        self.gain = sharpness / (1 - self.worst)
        if 2 * self.gain > _LARGEST_SCORE:
            given = f"vocab={layout.vocab} with codes of {layout.code_dims} dimensions and sharpness={sharpness}"
            why = f"two codes have a cosine of {self.worst:.3f}, and the scores that tell them apart are too large for float32"
            raise refusal(ModelError, given, why, "pass a smaller vocab or sharpness, a larger head_dim or more kv_heads")
        self.seed = seed

    @torch.no_grad()
    def model(self) -> LlamaForCausalLM:
        """The model, every parameter written (zero where nothing is planted)."""
        from transformers import LlamaForCausalLM

        config = self._config()
        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(config)
        model = model.float().eval()
        for name, parameter in model.named_parameters():
            parameter.fill_(CONSTANT / math.sqrt(config.hidden_size) if name.endswith("norm.weight") else 0.0)
        model.model.embed_tokens.weight.copy_(self._embedding())
        columns = self.layout.residual
        model.lm_head.weight[:, columns["copy", ()]] = (self.gain * self.codes).float()
        for index, layer in enumerate(model.model.layers):
            for kv_head in range(self.layout.kv_heads):
                self._write_key_value(layer.self_attn, index, kv_head)
            for head in range(self.layout.n_heads):
                self._write_query_output(layer.self_attn, index, head)
        if self.layout.meter is not None:
            self._write_steps(model.model.layers[self.layout.meter[0]].mlp)
        model.generation_config.pad_token_id = PAD
        return model

    def _config(self) -> LlamaConfig:
        from transformers import LlamaConfig

        layout = self.layout
        return LlamaConfig(
            vocab_size=layout.vocab,
            hidden_size=layout.hidden,
            intermediate_size=max(8, 2 * len(layout.steps)),
            num_hidden_layers=layout.layers,
            num_attention_heads=layout.n_heads,
            num_key_value_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            max_position_embeddings=layout.positions,
            rope_parameters={"rope_type": "default", "rope_theta": layout.rotary.theta},
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=None,
            tie_word_embeddings=False,
        )

    def _embedding(self) -> Tensor:
        columns = self.layout.residual
        out = torch.zeros(self.layout.vocab, self.layout.hidden, dtype=torch.float64)
        out[:, columns["const", ()]] = CONSTANT
        out[BOS, columns[BOS_SLOT]] = 1.0
        out[:, columns["token", ()]] = self.codes
        for slot, column in columns.items():
            if slot[0] == "tokens":
                for token in slot[1]:
                    out[token, column] = 0.5 if token == BOS else 1.0
        return out.float()

    def _reader(self, slot: Slot) -> Tensor:
        """[width, hidden]: the slot's feature as a linear function of the normalised residual stream."""
        columns, layout = self.layout.residual, self.layout
        out = torch.zeros(layout.width(slot), layout.hidden, dtype=torch.float64)
        what, detail = slot
        if what == "positions":
            for p in detail:
                if p == 0:
                    out[0, columns[BOS_SLOT]] += 0.5
                else:
                    out[0, columns["step", (p,)]] += 1.0
                    out[0, columns["step", (p + 1,)]] -= 1.0
        elif what == "block":
            rows = self._block_codes(detail[0])[0]
            out[:, columns["const", ()]] = rows[0, :, None] / CONSTANT
            for m in range(1, len(rows)):
                out[:, columns["step", (m * detail[0],)]] = (rows[m] - rows[m - 1])[:, None]
        else:
            out[:, columns[slot]] = torch.eye(layout.width(slot), dtype=torch.float64)
        return out

    def _block_codes(self, width: int) -> tuple[Tensor, float]:
        return codes(self.layout.blocks(width), self.layout.width(("block", (width,))), self.seed + 1)

    def _write_key_value(self, attention: LlamaAttention, layer: int, kv_head: int) -> None:
        """K: the constant on the fast pairs (BOS has none) and every slot of the group. V: token code, then the BOS flag."""
        layout, columns, turning = self.layout, self.layout.residual, self.layout.rotary
        key = torch.zeros(layout.head_dim, layout.hidden, dtype=torch.float64)
        key[: turning.fast, columns["const", ()]] = 1 / CONSTANT
        key[: turning.fast, columns[BOS_SLOT]] = -1.0
        for slot, dims in layout.groups[layer, kv_head].items():
            key[list(dims)] = self._reader(slot)
        value = torch.zeros_like(key)
        value[: layout.code_dims] = self._reader(("token", ()))
        value[layout.code_dims] = self._reader(BOS_SLOT)[0]
        rows = slice(kv_head * layout.head_dim, (kv_head + 1) * layout.head_dim)
        attention.k_proj.weight[rows] = key.float()
        attention.v_proj.weight[rows] = value.float()

    def _write_query_output(self, attention: LlamaAttention, layer: int, head: int) -> None:
        layout, columns = self.layout, self.layout.residual
        rows = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
        kind, place, code = layout.heads[layer, head], (layer, head), layout.code_dims
        dims = layout.groups[layer, head // (layout.n_heads // layout.kv_heads)]
        attention.q_proj.weight[rows] = (self._query(kind, dims) * math.sqrt(layout.head_dim)).float()
        output = attention.o_proj.weight[:, rows]
        if place == layout.feeder:
            output[columns["previous", ()], :code] = torch.eye(code)
        if isinstance(kind, Induction) and kind.copies:
            output[columns["copy", ()], :code] = torch.eye(code)
        if place == layout.meter:
            output[columns["meter", ()], code] = 1.0

    def _query(self, kind: Kind, dims: Mapping[Slot, tuple[int, ...]]) -> Tensor:
        """[head_dim, hidden]: the query that meets the table of tiers, for scores that are not scaled."""
        layout, m = self.layout, self.margin
        const = layout.residual["const", ()]
        out = torch.zeros(layout.head_dim, layout.hidden, dtype=torch.float64)

        def constant(slot: Slot, value: float) -> None:
            out[list(dims[slot]), const] = value / CONSTANT

        def match(slot: Slot, feature: Slot, scale: float) -> None:
            out[list(dims[slot])] = scale * self._reader(feature)

        if isinstance(kind, Uniform):
            return out
        if isinstance(kind, Duplicate):
            match(("token", ()), ("token", ()), self.gain)
        elif isinstance(kind, BlockLocal):
            slot: Slot = ("block", (kind.width,))
            match(slot, slot, m / (1 - self._block_codes(kind.width)[1]))
        elif isinstance(kind, Induction):
            match(("previous", ()), ("token", ()), 2 * self.gain)
            constant(BOS_SLOT, self.gain * (1 + self.worst))
        elif isinstance(kind, Offset):
            turning = layout.rotary
            out[:, const] = (2 * m / turning.gap * turning.query(kind.delta) / CONSTANT)[:, None]
            constant(BOS_SLOT, 2 * m / turning.gap * (turning.fast - turning.gap / 2))
        else:
            constant(BOS_SLOT, m)
            if not isinstance(kind, Sink):
                constant(slots(kind)[1], 2 * m)
        return out

    def _write_steps(self, mlp: LlamaMLP) -> None:
        """Units 2i and 2i + 1 of step i see z +- L, z = G (1 / (p + 1/2) - meter); G, L and the constant are dyadic, so that the two
        round alike and their difference is exact."""
        columns = self.layout.residual
        const, meter = columns["const", ()], columns["meter", ()]
        mlp.up_proj.weight[: 2 * len(self.layout.steps), const] = 1 / CONSTANT
        for i, p in enumerate(self.layout.steps):
            steep = 2.0 ** math.ceil(math.log2(4 * _HALF_STEP * (p + 1) * (p + 0.5)))
            bias = round(8 * steep / (p + 0.5)) / 8
            for unit, shift in ((2 * i, _HALF_STEP), (2 * i + 1, -_HALF_STEP)):
                mlp.gate_proj.weight[unit, const] = (bias + shift) / CONSTANT
                mlp.gate_proj.weight[unit, meter] = -steep
                mlp.down_proj.weight[columns["step", (p,)], unit] = math.copysign(1 / (2 * _HALF_STEP), shift)
