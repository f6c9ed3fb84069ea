"""Layer stages: what each layer of a vision-language model does on the way from picture to answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.interventions.base import Intervention
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric
from headscope.probes.pictures import Sample, facts_of, first_word, samples_of, unseeing
from headscope.probes.vision_mass import masses

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

FLOWS = ("image_to_question", "image_to_answer", "question_to_answer")
STAGES = ("looking", "reading", "answering")
"""What a layer does whose strongest flow is the one at the same place in FLOWS."""
IDLE = "none"
PAPER_WINDOW = 9 / 40
"""Nine layers of LLaVA-1.5-13B's forty."""


@dataclass(frozen=True)
class LayerStage(ActiveProbe):
    """Which flow of information a layer carries, by cutting it: picture to question, picture to answer, question to answer.

    Attention knockout: in a window of layers around the layer, the rows of the target may not look at the tokens of the source. The target
    "answer" is the last row of the prompt, "question" the text rows between the picture and it. With p the probability of the model's own
    first answer token, a flow's number is the share of p that is lost, 1 - p(cut) / p, mean over questions (negative: the cut helped).

    A layer's stage is the flow whose cut costs most, if that is at least `least`: "looking" (the question's words take in the picture),
    "reading" (the answer takes from the picture itself), "answering" (the answer gathers what the question's words know); else "none".
    Beside it stand the layer's attention in the last row, mean over heads: `stage_image_mass`, `stage_text_mass` (question and other text),
    `stage_sink_mass` (the first token) and `stage_entropy`.

    The knockout and the three flows are the paper's, which finds early layers to move the picture into the question, in general and then in
    particular, and later ones to move it on to the last token. The names of the stages and the threshold are ours: no publication gives a
    rule. `window`: layers cut together; None takes the paper's 9 of 40 as a share of the depth, rounded up. Masses alone do not make a
    stage: a layer may look at the picture and add nothing.

    Departures: the paper counts only questions that were answered rightly; here p is that of the model's own answer, right or not, and
    where the right answer is known, questions answered wrongly are left out.
    """

    name: ClassVar[str] = "layer_stage"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("stage_image_to_question", "share of p lost", "the question needs to see the picture in this layer", (None, 1.0), "layer"),
        Metric("stage_image_to_answer", "share of p lost", "the answer needs to see the picture in this layer", (None, 1.0), "layer"),
        Metric("stage_question_to_answer", "share of p lost", "the answer needs to see the question in this layer", (None, 1.0), "layer"),
        Metric("stage_image_mass", "probability", "the layer looks at the picture", (0.0, 1.0), "layer"),
        Metric("stage_text_mass", "probability", "the layer looks at text", (0.0, 1.0), "layer"),
        Metric("stage_sink_mass", "probability", "the layer rests on the first token", (0.0, 1.0), "layer"),
        Metric("stage_entropy", "nats", "the layer spreads its looks", (0.0, None), "layer"),
    )
    data: ClassVar[str] = "pictures"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "images")
    cost: ClassVar[str] = "3 forward passes a layer and 2 more, a question; 12 questions"
    source: ClassVar[str] = (
        "Cross-modal Information Flow in Multimodal LLMs, arXiv:2411.18620 (knockout); stage names and threshold are ours"
    )

    window: int | None = None
    least: float = 0.1
    samples: int = 12

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise refusal(ProbeError, f"window={self.window}", "it counts layers", "pass 1 or more, or None")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or unseeing(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """All cuts of every question; see the class."""
        samples = samples_of(scope, data, count=self.samples, seed=work.seed)
        units = [work.unit(f"question {n}", partial(self.question, scope, sample)) for n, sample in work.each(enumerate(samples))]
        kept = [unit for unit, sample in zip(units, samples, strict=True) if sample.wanted in (None, unit["said"])]
        if not kept:
            raise refusal(
                ProbeError,
                f"probe 'layer_stage' on {scope.name}",
                f"none of {len(units)} questions was answered rightly (first: {samples[0].question!r}, token {units[0]['said']})",
                "use a model that can answer them, or pass other questions",
            )
        notes = (
            []
            if len(kept) == len(units)
            else [f"{len(units) - len(kept)} of {len(units)} questions were answered wrongly and do not count"]
        )
        lost = torch.stack([unit["lost"] for unit in kept]).mean(0)  # [flows, L]
        looks = torch.stack([unit["looks"] for unit in kept]).mean(0)  # [4, L]
        named = {f"stage_{flow}": row for flow, row in zip(FLOWS, lost, strict=True)}
        named |= {f"stage_{what}": row for what, row in zip(("image_mass", "text_mass", "sink_mass", "entropy"), looks, strict=True)}
        heads = torch.tensor([module.heads for module in scope.topology.main])
        absent = torch.arange(int(heads.max())) >= heads[:, None]
        scores = {name: row[:, None].expand(absent.shape).masked_fill(absent, float("nan")) for name, row in named.items()}
        numbers = {"stage_questions": float(len(kept))}
        return Findings(scores, numbers, [facts_of(samples, data)], {"stages": self._table(scope, named, lost)}, notes)

    def question(self, scope: Scope, sample: Sample) -> Unit:
        """One question: the share of p lost [flows, L] by each cut, attention of the last row [4, L], the token said and its p."""
        last, count = len(sample.ids) - 1, len(scope.topology.main)
        p = first_word(scope, sample.inputs)
        said = int(p.argmax())
        question = torch.arange(sample.end, last)
        rows = {"question": question, "answer": torch.tensor([last])}
        keys = {"image": sample.image.nonzero()[:, 0], "question": question}
        width = self.window or ceil(PAPER_WINDOW * count)
        lost = torch.zeros(len(FLOWS), count, dtype=torch.float64)
        for number, flow in enumerate(FLOWS):
            source, _, target = flow.partition("_to_")
            if not len(rows[target]) or not len(keys[source]):
                continue  # a prompt without text between picture and last token has nothing to cut
            for place in range(count):
                first = min(max(0, place - (width - 1) // 2), max(0, count - width))
                names = frozenset(module.name for module in scope.topology.main[first : first + width])
                with scope.intervene(Knockout(names, rows[target], keys[source])):
                    lost[number, place] = 1 - float(first_word(scope, sample.inputs)[said] / p[said])
        mass, entropy = masses(scope, sample)
        at = mass[:, :, last].nanmean(1)  # [L, classes]: image, first, text
        looks = torch.stack([at[:, 0], at[:, 2], at[:, 1], entropy[:, :, last].nanmean(1)])
        return {"lost": lost, "looks": looks, "said": said, "p": float(p[said])}

    def _table(self, scope: Scope, named: dict[str, Tensor], lost: Tensor) -> pd.DataFrame:
        import pandas as pd

        best = lost.max(0)
        stages = [STAGES[int(flow)] if float(value) >= self.least else IDLE for value, flow in zip(best.values, best.indices, strict=True)]
        columns = {name.removeprefix("stage_"): row.tolist() for name, row in named.items()}
        return pd.DataFrame({"layer": scope.topology.layers, "stage": stages, **columns})


@dataclass(frozen=True, eq=False)
class Knockout(Intervention):
    """In modules of these names, rows at `rows` may not look at keys at `keys` (absolute positions). What they gave there goes to the other
    keys, as a masked softmax has it.
    """

    modules: frozenset[str]
    rows: Tensor
    keys: Tensor
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def before(self, call: AttentionCall) -> AttentionCall:
        if call.module not in self.modules:
            return call
        shape = (call.q.shape[2], call.k.shape[2], call.query_offset, call.key_offset)
        if shape not in self._masks:
            row = torch.isin(torch.arange(shape[0]) + shape[2], self.rows)
            key = torch.isin(torch.arange(shape[1]) + shape[3], self.keys)
            self._masks[shape] = ~(row[:, None] & key)[None, None].to(call.q.device)
        open_ = self._masks[shape]
        allowed = open_ if call.mask.allowed is None else call.mask.allowed & open_
        return replace(call, mask=replace(call.mask, allowed=allowed))


__all__ = ["FLOWS", "IDLE", "STAGES", "Knockout", "LayerStage"]
