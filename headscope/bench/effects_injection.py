"""What soft injection does: answers without examples, with ten of them, and with a task's embedding in their place, on questions held out.

A task has few pairs, so they are split into folds: each fold is asked once, by gates and means that the other folds alone made. Every
pair is so a test item of gates that never saw it, and what two ways answer differently is compared pair by pair. The control is the
embedding of another task under that task's own gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headscope.bench.effects_stats import Estimate, block, difference, mcnemar

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions import SoftInjection
    from headscope.scope import Scope

Pair = tuple[str, str]
COLUMNS = (
    "task",
    "pairs",
    "no example",
    "ten examples",
    "injected",
    "another task's",
    "injected - ten examples",
    "exact p",
    "loss, ten",
    "loss, injected",
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: at most `most` pairs of each of `tasks`, in `folds`, of which `asked` are asked; the rest is what
    SoftInjection.prepared takes."""

    tasks: tuple[str, ...] = ("past", "plurals")
    most: int = 48
    folds: int = 4
    asked: int = 1
    steps: int = 200
    prompts: int = 20
    shots: int = 10
    form: str = "qa"
    rate: float = 0.2


FULL = Sizes(
    ("opposites", "capitals", "past", "plurals", "capitalize", "first_letter", "first_of_three", "last_of_three"),
    most=96, asked=4, steps=400, prompts=50,
)  # fmt: skip


@dataclass(eq=False)
class Told:
    """What a task gave: `right` and `loss` by way ("none", "few", "injected", "wrong"), each [pairs]; `pairs` in the order asked; the
    embedding of the last fold."""

    task: str
    pairs: list[Pair]
    right: dict[str, Tensor]
    loss: dict[str, Tensor]
    edit: SoftInjection

    def add(self, way: str, given: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Answers of a way, fold by fold."""
        self.right[way], self.loss[way] = (torch.cat([one[side] for one in given]) for side in (0, 1))

    def row(self) -> list[Any]:
        """Its row in the table."""
        accuracies = [str(Estimate.of(self.right[way])) if way in self.right else "" for way in ("none", "few", "injected", "wrong")]
        injected, few = self.right["injected"], self.right["few"]
        compared = [str(difference(injected, few)), f"{mcnemar(injected, few):.2g}"]
        return [self.task, len(self.pairs), *accuracies, *compared, *(str(Estimate.of(self.loss[way])) for way in ("few", "injected"))]


def measure(scope: Scope, sizes: Sizes, say: Callable[[str], None], *, journal: Path | None = None) -> list[dict[str, Any]]:
    """One table, a row per task."""
    told = []
    for task in sizes.tasks:
        told.append(of_task(scope, task, sizes, journal=journal))
        say("; ".join(f"{name} {value}" for name, value in zip(COLUMNS, told[-1].row(), strict=True)))
    if len(told) > 1:
        for place, one in enumerate(told):
            one.add("wrong", [answers(scope, one.pairs, edit=told[place - 1].edit, form=sizes.form)])
    title = f"Soft injection, {scope.name}, prompts {sizes.form!r}, {sizes.steps} steps: first answer token right"
    return [block(title, COLUMNS, [one.row() for one in told])]


def of_task(scope: Scope, task: str, sizes: Sizes, *, seed: int = 0, journal: Path | None = None) -> Told:
    """A task's folds, each asked with the embedding and the gates of the others."""
    from headscope.interventions import SoftInjection
    from headscope.probes.icl_tasks import ICL_TASKS

    pairs = list(dict.fromkeys(ICL_TASKS[task]))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3)).tolist()
    pairs = [pairs[place] for place in order][: sizes.most]
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {way: [] for way in ("none", "few", "injected")}
    asked: list[Pair] = []
    edit: SoftInjection | None = None
    for fold in range(sizes.asked):
        test, rest = pairs[fold :: sizes.folds], [pair for place, pair in enumerate(pairs) if place % sizes.folds != fold]
        edit = SoftInjection.prepared(
            scope,
            rest,
            shots=sizes.shots,
            prompts=sizes.prompts,
            steps=sizes.steps,
            rate=sizes.rate,
            form=sizes.form,
            seed=seed,
            journal=journal,
            progress=False,
        )
        asked += test
        kinds["none"].append(answers(scope, test, form=sizes.form))
        kinds["few"].append(answers(scope, test, rest, shots=sizes.shots, form=sizes.form, seed=fold))
        kinds["injected"].append(answers(scope, test, edit=edit, form=sizes.form))
    if edit is None:
        raise ValueError("asked must be 1 or more")
    told = Told(task, asked, {}, {}, edit)
    for way, given in kinds.items():
        told.add(way, given)
    return told


@torch.no_grad()
def answers(
    scope: Scope,
    asked: Sequence[Pair],
    shown: Sequence[Pair] = (),
    *,
    shots: int = 10,
    edit: SoftInjection | None = None,
    form: str = "qa",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(whether the answer's first token is the likeliest, bool [n]; its cross entropy [n] float64), with examples from `shown`."""
    from headscope.probes.contrast import last_logits
    from headscope.probes.soft_injection import alike, encoded, examples

    draw = torch.Generator().manual_seed(seed)
    prompts = [encoded(scope, one, examples(shown, one, shots, draw) if shown else [], form) for one in asked]
    right, loss = torch.zeros(len(asked), dtype=torch.bool), torch.zeros(len(asked), dtype=torch.float64)
    for places in alike([ids for ids, _ in prompts]):
        with scope.intervene(edit) if edit is not None else nullcontext():
            logits = last_logits(scope, [prompts[place][0] for place in places]).double().cpu()
        wanted = torch.tensor([prompts[place][1] for place in places])
        right[places] = logits.argmax(-1) == wanted
        loss[places] = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return right, loss


__all__ = ["COLUMNS", "FULL", "Sizes", "Told", "answers", "measure", "of_task"]
