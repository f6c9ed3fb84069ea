"""Soft injection: a task learnt from examples, put into a prompt that shows none.

What ten examples teach shows in the heads' outputs at the last token. Their mean over many such prompts is the task's embedding, one vector
per head, and a gate per head says how far the head is moved towards it. Only the last token of the prompt is edited: the KV cache carries
what it became into every token generated after it, so a generation costs what it costs without examples.

The silent failures this avoids: an edit of "the last token" that edits every generated one as well; a bias of W_O that is lost where the
product with W_O is made by hand; gates that were validated last taken for those that were validated best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import InterventionError, ProbeError, refusal, unknown_name
from headscope.interventions import z_site
from headscope.interventions.base import register
from headscope.interventions.head_edit import Rows, Site
from headscope.interventions.output_edits import ValueEdit, at_places, check_count, per_head
from headscope.interventions.values import Values

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

LEAST = 4
"""Fewest pairs that are held back for validation."""


@register("soft_injection")
@dataclass(frozen=True)
class SoftInjection(ValueEdit):
    """z := (1 - a) z + a t at the last token of the prompt (Soft Injection of Task Embeddings, 2025, arXiv 2507.20906;
    github.com/SNU-DRL/Soft_Injection, read for its formulas).

    `values` [heads, Dv]: t, the task's embedding, in the order of `heads`. `gates`: a, from 0 to 1, one per head or one number.
    `SoftInjection.prepared(scope, examples)` makes both. With a = 0 nothing changes, to the bit; padding may stand on either side.

    A prompt that is handed over in chunks has a last token in each of them: hand it over whole, or name it by positions=.
    """

    gates: Any = 0.5
    positions: Any = field(default="last_prompt", kw_only=True)

    site: ClassVar[Site] = "Z"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gates", per_head(self.gates, "gates"))
        low, high = (self.gates, self.gates) if isinstance(self.gates, float) else self.gates.tensor.aminmax()
        if not 0.0 <= float(low) <= float(high) <= 1.0:
            raise refusal(InterventionError, f"gates from {float(low):g} to {float(high):g}", "they are shares", "pass numbers from 0 to 1")
        if len(self.values.shape) != 2:
            raise refusal(InterventionError, f"values {list(self.values.shape)}", "a task is one vector per head", "pass [heads, Dv]")

    @classmethod
    def prepared(
        cls,
        scope: Scope,
        examples: Sequence[tuple[str, str]],
        *,
        shots: int = 10,
        prompts: int = 50,
        steps: int = 400,
        every: int = 50,
        rate: float = 0.2,
        form: str = "qa",
        seed: int = 0,
        journal: str | Path | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> SoftInjection:
        """The task's embedding and the gates, learnt from (question, answer) pairs; every head of the main stack has its own.

        Three quarters of the pairs are shown and trained on, one quarter validates. The embedding is the mean over `prompts` prompts with
        `shots` examples; gates start at 0.5 and follow Adam (`rate`) for `steps` prompts without examples, against the cross entropy of the
        answer's first token; every `every` steps they are validated, and the best are kept (see the probe of the same name). Prompts read
        `SoftInjection.prompt(question, form)`: "qa", "Q: hot" and "A:" on two lines, or "arrow", "hot ->", which works only where texts
        begin with a token of their own (elsewhere the question stands first, where a model can hardly read it). `journal`: a folder that
        keeps finished units, so that a killed run goes on.

        DataError for what is no list of pairs, InterventionError for too few of them and for what the probe refuses.
        """
        from headscope.probes.soft_injection import SoftInjection as Probe
        from headscope.probes.soft_injection import given_pairs

        try:
            probe = Probe(shots=shots, prompts=prompts, steps=steps, every=every, rate=rate, form=form)
            probe.check(scope)
            pairs = given_pairs(examples)
            work = probe.work(scope, pairs, None, seed, progress, journal)
            work.name = f"prepared-{work.name}"  # the probe splits the same pairs in another way
            held = max(len(pairs) // 4, LEAST)
            if len(pairs) - held <= shots:
                given, why = f"{len(pairs)} pairs", f"{held} of them validate, and {shots} of the others are shown beside one that is asked"
                raise refusal(InterventionError, given, why, "pass more pairs, or fewer shots")
            order = torch.randperm(len(pairs), generator=work.generator(0)).tolist()
            parts = {"train": [pairs[i] for i in order[held:]], "validation": [pairs[i] for i in order[:held]]}
            means = work.unit("means", lambda: {"means": probe._means(scope, parts["train"], work, 1)})["means"]
            logits, _ = probe._optimise(scope, parts, means, work)
        except ProbeError as error:
            raise InterventionError(str(error)) from None
        return cls("all", means.to(torch.float32), torch.sigmoid(logits).to(torch.float32), **options)

    @staticmethod
    def prompt(question: str, form: str = "qa") -> str:
        """How a question without examples is asked."""
        from headscope.probes.soft_injection import FORMS

        if form not in FORMS:
            raise unknown_name(InterventionError, "form of a prompt", form, FORMS)
        return FORMS[form][0].format(question)

    def bind(self, scope: Scope) -> SoftInjection:
        """A copy that knows its heads by module; InterventionError for values or gates of other heads."""
        check_count(self.gates, len(self.pairs(scope)), "gates")
        return super().bind(scope)

    def edit_output(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows) -> Tensor:
        """Heads moved towards the task at the last token; the very output where every gate is shut."""
        gates = at_places(self.gates, self.places_in(call), output)
        if self.gates == 0.0 or (isinstance(self.gates, Values) and not bool(self.gates.tensor[self.places_in(call)].any())):
            return output
        return z_site.lerp(call, output, heads, self.values_in(call, output, rows), gates, rows)

    def algebra(self) -> str:
        """Depends on what it meets."""
        return "lerp"

    def what(self) -> str:
        """In words."""
        if isinstance(self.gates, float):
            return f"move the head's output by {self.gates:g} towards a task's mean output"
        open_ = int((self.gates.tensor > 0.5).sum())
        return f"move each head's output towards a task's mean output by its own gate ({open_} of {len(self.gates.tensor)} above a half)"


__all__ = ["SoftInjection"]
