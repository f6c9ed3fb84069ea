"""Massive activations: the few dimensions of the residual stream, at a few tokens, that are larger than all others together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.interventions.running import run_once
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric
from headscope.probes.layer_inputs import first_dimensions, rms_normed, watching
from headscope.probes.text import REPEATS, special_ids, token_pieces
from headscope.profile.texts import build_texts, data_facts

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.probes.text import ProbeText
    from headscope.scope import Scope

LIMIT, RATIO = 100.0, 1000.0
"""The paper's criterion: larger than 100, and about 1,000 times the median of the hidden state."""
ENTRIES = 8
"""Entries of a layer that the table lists at most, the largest first."""


@dataclass(frozen=True)
class MassiveActivations(ActiveProbe):
    """Entries x[t, d] of the residual stream with |x| > `limit` and |x| >= `ratio` times the median |x| of that layer's hidden states.

    Measured in what each layer gives, over a natural text. `massive_ratio`: the largest |x| of the layer over its median;
    `massive_share`: share of massive entries that lie on the first token. The table `entries` lists them, largest first, with token and
    position (of a layer without any, its largest entry, marked as not massive); `dimensions` ranks the residual's dimensions at the first
    token after RMS normalisation, the mean over the layers' inputs from the third on: its head is what VAR calls D_sink. `massive_tokens`
    and `massive_dimensions` count the different tokens and dimensions that are massive somewhere.

    High: the layer writes an attention sink. Heads read the stream through a norm, so a massive entry turns a token's key into the same
    vector whatever the token is.

    Departures: the median is over all tokens of the layer, as in the paper's figures; "around 1,000 times" is taken as `ratio` or more, so
    narrow models (SmolLM2: 576 dimensions) may stay below it with the same structure: the ratio is given for that. The first token is the
    BOS where the tokenizer has one, else whatever the text begins with; a causal model treats it as its sink all the same.
    """

    name: ClassVar[str] = "massive_activations"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("massive_ratio", "times the median", "one entry of the residual stream towers over the rest", (1.0, None), "layer"),
        Metric("massive_share", "share of massive entries", "they lie on the first token", (0.0, 1.0), "layer"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass over a text of 512 tokens"
    source: ClassVar[str] = "Massive Activations in Large Language Models, arXiv:2402.17762, github.com/locuslab/massive-activations"

    limit: float = LIMIT
    ratio: float = RATIO
    tokens: int = 512

    def __post_init__(self) -> None:
        if self.limit < 0 or self.ratio < 1 or self.tokens < 2:
            raise refusal(
                ProbeError,
                f"limit={self.limit}, ratio={self.ratio}, tokens={self.tokens}",
                "an activation is massive above a limit and a multiple of the median, over a text",
                "use 100, 1000 and 512",
            )

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """One pass over one text; see the class. `data`: text, ids or a path in place of the bundled essays."""
        import pandas as pd

        count = min(self.tokens, work.context or self.tokens, scope.max_length or self.tokens)
        if isinstance(data, torch.Tensor):
            count = min(count, data.shape[-1])
        texts = build_texts(scope, "natural", context=count, data=data, texts=1, seed=work.seed, repeats=REPEATS, beyond_context=False)
        unit = work.unit("text", lambda: self.text(scope, texts[0]))
        heads = max(module.heads for module in scope.topology.main)
        present = torch.tensor([[h < module.heads for h in range(heads)] for module in scope.topology.main])

        def per_layer(values: Tensor) -> Tensor:
            return values[:, None].expand(-1, heads).masked_fill(~present, float("nan"))

        entries = self._entries(scope, texts[0], unit)
        found = entries[entries["massive"]]
        numbers = {
            "massive_activations": float(unit["count"].sum()),
            "massive_tokens": float(found["position"].nunique()),
            "massive_dimensions": float(found["dimension"].nunique()),
        }
        order = unit["first"].argsort(descending=True)[:32]
        dimensions = pd.DataFrame({"dimension": order.tolist(), "normed": unit["first"][order].tolist()})
        scores = {"massive_ratio": per_layer(unit["largest"] / unit["median"]), "massive_share": per_layer(unit["share"])}
        return Findings(
            scores, numbers, [data_facts("natural", texts)], {"entries": entries, "dimensions": dimensions}, _notes(scope, texts[0])
        )

    def text(self, scope: Scope, text: ProbeText) -> Unit:
        """Per layer: the median, the number of massive entries, the share of them on token 0, and the ENTRIES largest."""
        layers: list[dict[str, Tensor]] = []
        first: list[Tensor] = []

        def see(place: int, hidden: Tensor) -> None:
            if place < len(scope.topology.main):
                first.append(rms_normed(hidden[0, 0]).abs().cpu())
            if place > 0:
                layers.append(self._layer(hidden[0]))

        with watching(scope, see):
            run_once(scope, text.ids)
        return {**{name: torch.stack([one[name] for one in layers]).cpu() for name in layers[0]}, "first": first_dimensions(first)}

    def _layer(self, hidden: Tensor) -> dict[str, Tensor]:
        """Of one layer's output [N, d]."""
        size = hidden.double().abs()
        median = size.median()
        massive = (size > self.limit) & (size >= self.ratio * median)
        count = massive.sum()
        best = size.flatten().topk(ENTRIES)
        return {
            "median": median,
            "largest": size.max(),
            "count": count.double(),
            "share": massive[0].sum().double() / count.clamp_min(1),
            "place": best.indices // size.shape[1],
            "dimension": best.indices % size.shape[1],
            "value": hidden.double().flatten()[best.indices],
        }

    def _entries(self, scope: Scope, text: ProbeText, unit: Unit) -> pd.DataFrame:
        import pandas as pd

        ids = text.ids.tolist()
        strings = text.strings or (token_pieces(scope.tokenizer, ids) if scope.tokenizer is not None else tuple(map(str, ids)))
        rows = []
        for number, layer in enumerate(scope.topology.layers):
            median = float(unit["median"][number])
            for rank in range(ENTRIES):
                value = float(unit["value"][number, rank])
                massive = abs(value) > self.limit and abs(value) >= self.ratio * median
                if rank and not massive:
                    break
                place = int(unit["place"][number, rank])
                rows.append(
                    {
                        "layer": layer,
                        "position": place,
                        "token": strings[place],
                        "dimension": int(unit["dimension"][number, rank]),
                        "value": value,
                        "ratio": abs(value) / median,
                        "massive": massive,
                    }
                )
        return pd.DataFrame(rows)


def _notes(scope: Scope, text: ProbeText) -> list[str]:
    if scope.tokenizer is None:
        return ["without a tokenizer it is unknown whether the first token is a BOS"]
    tokenizer = scope.text_tokenizer
    if tokenizer.bos_token_id is None:
        return ["the tokenizer has no BOS: the first token is an ordinary one"]
    begins = int(text.ids[0])
    if begins not in special_ids(tokenizer):
        return [f"the tokenizer puts no BOS in front: the first token is {tokenizer.decode([begins])!r}"]
    return []


__all__ = ["ENTRIES", "LIMIT", "RATIO", "MassiveActivations"]
