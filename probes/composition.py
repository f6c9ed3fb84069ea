"""Composition: which earlier head does a head read from?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.ov_copying import check_norms, no_data, weights_fact
from headscope.probes.stream import all_weights, read_stream, why_no_weights

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.circuits import HeadWeights
    from headscope.probes.stream import Stream
    from headscope.scope import Scope

KINDS = ("q", "k", "v")


@dataclass(frozen=True)
class Composition(ActiveProbe):
    """How much of what an earlier head writes is read by a head's queries, keys or values, from the weights alone.

    For a writer A and a reader B of a later layer, with ||.|| the Frobenius norm and W_OV = W_V W_O, W_QK = W_Q W_K^T (rows x W):

        Q: ||W_OV^A W_QK^B|| / (||W_OV^A|| ||W_QK^B||)      K: the same with (W_QK^B)^T      V: with W_OV^B

    q_composition, k_composition, v_composition are, for each reader, the largest value over all heads of earlier layers (NaN in the first
    layer). The table "pairs" has the `top` pairs of each kind. A previous-token head and an induction head stand out in K.

    Matrices [d, d] are never made. With thin factorisations W_V^A = Q R and W_K^B = Q' R' the orthonormal factors drop out of the norm, so
    a pair is the norm of the [Dv, D] matrix (R W_O^A) (W_Q^B R'^T); a layer of readers is one matrix product with all earlier writers.

    Two unrelated heads do not score 0: with B turned at random, the expected square is exactly 1 / d, whatever the spectra, so 1 / sqrt(d)
    is the level of chance. It is in `numbers` as composition_baseline; baseline=True subtracts it from the three metrics.

    norms: "fold" includes the gains of the norms that heads read through; "ignore" takes the weights as they stand, as TransformerLens does
    on weights that it has not processed. Rotary embedding, query-key norms, biases and everything between the two heads (MLPs, other heads)
    are left out, so this says what is wired, not what is used: path patching says that.

    Departures: Elhage et al. subtract a baseline drawn from random matrices; the closed form here is what such draws average to.
    """

    norms: str = "ignore"
    baseline: bool = False
    top: int = 50

    name: ClassVar[str] = "composition"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("q_composition", "share of norm", "its queries read what one earlier head writes", (None, 1.0)),
        Metric("k_composition", "share of norm", "its keys read what one earlier head writes", (None, 1.0)),
        Metric("v_composition", "share of norm", "its values read what one earlier head writes", (None, 1.0)),
    )
    data: ClassVar[str] = "weights"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "W_O")
    cost: ClassVar[str] = "weights only: O(heads^2 D^2 d), a minute for 270 heads on one core"
    source: ClassVar[str] = (
        "A Mathematical Framework for Transformer Circuits (Elhage et al. 2021, transformer-circuits.pub); "
        "In-context Learning and Induction Heads, arXiv:2209.11895; TransformerLensOrg/TransformerLens composition_scores"
    )

    def __post_init__(self) -> None:
        check_norms(self.name, self.norms)
        if self.top < 1:
            raise refusal(ProbeError, f"top={self.top}", "a table has at least one row", "pass top=50")

    def unfit(self, scope: Scope) -> str | None:
        few = "it has one layer, and heads compose across layers" if len(scope.topology.main) < 2 else None
        return super().unfit(scope) or few or why_no_weights(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        import pandas as pd

        no_data(self, data)
        stream, weights = read_stream(scope, logits=False), all_weights(scope)
        chance = 1 / math.sqrt(stream.width)
        parts: dict[int, Factors] = {}
        rows: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        found: list[tuple[str, int, int, int, int, float]] = []
        for layer in work.each(scope.topology.layers):
            parts[layer] = factors(weights[layer], stream, layer, self.norms == "fold")
            earlier = [one for one in scope.topology.layers if one < layer]
            if not earlier:
                for kind in KINDS:
                    rows[kind].append(torch.full((len(weights[layer].q),), float("nan"), dtype=torch.float64))
                continue
            unit = work.unit(f"layer {layer}", partial(pairs_of, parts, earlier, layer))
            places = [(one, head) for one in earlier for head in range(len(weights[one].q))]
            for kind in KINDS:
                scores = unit[kind] - (chance if self.baseline else 0.0)  # [readers, writers]
                rows[kind].append(scores.amax(1))
                best = scores.flatten().topk(min(self.top, scores.numel()))
                for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    writer = places[index % len(places)]
                    found.append((kind.upper(), layer, index // len(places), *writer, value))
        table = pd.DataFrame(found, columns=["kind", "reader_layer", "reader_head", "writer_layer", "writer_head", "score"])
        table = table.sort_values("score", ascending=False, kind="stable").groupby("kind").head(self.top)
        table = table.sort_values(["kind", "score"], ascending=[True, False], kind="stable").reset_index(drop=True)
        return Findings(
            {f"{kind}_composition": stack(rows[kind]) for kind in KINDS},
            numbers={"composition_baseline": chance},
            data=[weights_fact(scope)],
            tables={"pairs": table},
        )


@dataclass(frozen=True, eq=False)
class Factors:
    """Of one layer, float64: `writes` [H, Dv, d] = R_V W_O; `reads` kind -> [H, d, D], what composes with them; `ov`, `qk` [H] norms."""

    writes: Tensor
    reads: dict[str, Tensor]
    ov: Tensor
    qk: Tensor


def factors(heads: HeadWeights, stream: Stream, layer: int, fold: bool) -> Factors:
    """What is needed of a layer's heads, every matrix [d, d] as a thin one whose norm is the same."""
    part = stream.layers[layer]
    q, k, v, o = (one.double().cpu() for one in (heads.q, heads.k, heads.v, heads.o))
    if fold and part.reads is not None:
        q, k, v = (part.reads.fold(one) for one in (q, k, v))
    if fold and part.writes is not None:
        o = part.writes.fold(o.transpose(1, 2)).transpose(1, 2)
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    writes = _triangle(v) @ o
    reads = {
        "q": q @ _triangle(k).transpose(1, 2),
        "k": k @ _triangle(q).transpose(1, 2),
        "v": v @ _triangle(o.transpose(1, 2)).transpose(1, 2),
    }
    return Factors(writes, reads, writes.flatten(1).norm(dim=1), reads["q"].flatten(1).norm(dim=1))


def _triangle(tall: Tensor) -> Tensor:
    """R [H, n, n] of tall [H, d, n] = Q R."""
    return torch.linalg.qr(tall, mode="r").R


def pairs_of(parts: dict[int, Factors], earlier: list[int], layer: int) -> dict[str, Tensor]:
    """kind -> [heads of the layer, heads of all earlier layers] float64; 0 where a head's matrix is 0."""
    reader = parts[layer]
    out: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for one in earlier:
        writer = parts[one]
        for kind in KINDS:
            products = torch.einsum("wvd,rdn->rwvn", writer.writes, reader.reads[kind])
            size = (reader.ov if kind == "v" else reader.qk)[:, None] * writer.ov
            out[kind].append(products.flatten(2).norm(dim=2) / size.clamp_min(torch.finfo(torch.float64).tiny))
    return {kind: torch.cat(rows, 1) for kind, rows in out.items()}
