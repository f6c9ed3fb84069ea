"""What HeadHunter's heads do to pictures of bundled:dit: distance to the nearest digit under guidance, on seeds the search never drew.

The search scores pictures by their distance to the training digits, and the report measures others by their distance to digits held out,
so neither the noise nor the reference is shared. Every set of heads draws from the same noise, and differences are taken picture by
picture: pictures differ far more than sets do. The Frechet distance stands beside it, since nearness alone can be had by drawing the same
few digits again and again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headscope.bench.effects_stats import Estimate, block, difference

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Head
    from headscope.interventions.head_hunter import Hunt
    from headscope.scope import Scope

STEPS = 8
SEED = 1000
"""Of the first batch of reported pictures; searches count from 7."""
SETS = ("set", "heads", "distance", "closer than no guidance", "closer than the hunted set", "Frechet")


@dataclass(frozen=True)
class Sizes:
    """How much is measured: `searched` pictures per candidate, 0 to take the heads in FOUND; `shown` per reported set in batches of
    `batch`; `randoms` triples of `per_random` pictures; `weights` of the guidance; `us` of SoftPAG for the hunted heads; `rounds` of the
    search."""

    searched: int = 0
    shown: int = 256
    batch: int = 256
    randoms: int = 5
    per_random: int = 128
    weights: tuple[float, ...] = (3.0,)
    us: tuple[float, ...] = (0.5, 0.75)
    rounds: int = 1


FULL = Sizes(512, 4096, 2048, 60, 2048, (3.0, 1.0), tuple(number / 8 for number in range(1, 8)), 3)

FOUND: dict[float, dict[str, tuple[Head, ...]]] = {
    3.0: {"hunted": ((4, 5), (5, 4), (3, 1)), "one-shot, best 3": ((4, 5), (5, 4), (5, 3)), "worst 3": ((2, 3), (2, 0), (4, 4))},
    1.0: {"hunted": ((4, 3), (3, 1), (2, 5)), "one-shot, best 3": ((4, 3), (4, 5), (5, 4)), "worst 3": ((4, 2), (2, 0), (4, 4))},
}
"""What the searches of FULL found, by weight."""


class Pictures:
    """Draws pictures from a scope under guidance by heads, and judges them."""

    def __init__(self, scope: Scope, batch: int) -> None:
        from headscope.models.bundled.data_dit import pictures

        self.scope, self.batch = scope, batch
        self.held, self.seen = (pictures(side)[0].flatten(1).double() for side in (True, False))

    def draw(self, heads: Sequence[Head], count: int, *, w: float, u: float = 1.0, seed: int = SEED) -> Tensor:
        """[count, 1, 8, 8] on the CPU; no heads: without guidance."""
        from headscope.interventions import SoftPAG, guided
        from headscope.models.bundled.flow import sample

        parts = []
        for first in range(0, count, self.batch):
            many, source = min(self.batch, count - first), seed + first // self.batch
            if heads:
                with guided(self.scope, SoftPAG(list(heads), u), w=w):
                    parts.append(sample(self.scope.model, many, steps=STEPS, seed=source).cpu())
            else:
                parts.append(sample(self.scope.model, many, steps=STEPS, seed=source).cpu())
        return torch.cat(parts)

    def distance(self, drawn: Tensor, *, held: bool = True) -> Tensor:
        """[n] float64: the Euclidean distance of each picture to the nearest digit, held out or of the training."""
        flat = drawn.double().flatten(1).clamp(-1, 1)
        return torch.cdist(flat, self.held if held else self.seen).amin(1)


def measure(scope: Scope, sizes: Sizes, say: Callable[[str], None], *, journal: Path | None = None) -> list[dict[str, Any]]:
    """Two tables per weight: sets of heads, and u of the hunted one."""
    return [one for w in sizes.weights for one in _weight(scope, w, sizes, say, journal)]


def hunt(
    scope: Scope, pictures: Pictures, sizes: Sizes, w: float, *, seed: int = 7, held: bool = False, journal: Path | None = None
) -> Hunt:
    """The search; its first round ranks single heads. `held`: by distance to the held-out digits, which the report measures as well."""
    from headscope.interventions import HeadHunter
    from headscope.models.bundled.flow import sample

    hunter = HeadHunter(
        draw=lambda source: sample(scope.model, sizes.searched, steps=STEPS, seed=source),
        objective=lambda drawn, _: -float(pictures.distance(drawn.cpu(), held=held).mean()),
        conditions=[seed],
        w=w,
        rounds=sizes.rounds,
        k=1 if sizes.rounds > 1 else 3,
        name=f"nearness of {sizes.searched} pictures, held {held}",
    )
    return hunter.hunt(scope, journal=journal, progress=False)


def _weight(scope: Scope, w: float, sizes: Sizes, say: Callable[[str], None], journal: Path | None) -> list[dict[str, Any]]:
    from headscope.interventions import SoftPAG
    from headscope.models.bundled.evaluate_dit import quality

    pictures = Pictures(scope, sizes.batch)
    sets, searched = FOUND.get(w, {}), "search of another run"
    if sizes.searched or not sets:
        found = hunt(scope, pictures, sizes, w, journal=journal)
        ranked, searched = found.ranking(1), f"search on {sizes.searched} pictures"
        sets = {"hunted": tuple(found.heads), "one-shot, best 3": tuple(ranked[:3]), "worst 3": tuple(ranked[-3:])}
        say(f"w {w:g}: {found}")
    every, hunted = SoftPAG("all", stream="all").bind(scope).pairs(scope), sets["hunted"]
    plain = pictures.draw((), sizes.shown, w=w)
    base, kept = pictures.distance(plain), {}

    def row(label: str, heads: Sequence[Head], named: bool = True) -> list[Any]:
        drawn = plain if not heads else pictures.draw(heads, sizes.shown, w=w)
        kept[label] = one = pictures.distance(drawn)
        names = ", ".join(f"{layer}.{head}" for layer, head in heads) if named else ""
        against = str(difference(kept["hunted"], one)) if "hunted" in kept and label != "hunted" else ""
        return [label, names, str(Estimate.of(one)), str(difference(base, one)) if heads else "", against, quality(drawn)["frechet"]]

    rows = [row("hunted", hunted), row("no guidance", ())]
    rows += [row(label, heads) for label, heads in sets.items() if label != "hunted"]
    layers = dict.fromkeys(layer for layer, _ in every)
    rows += [row(f"layer {layer}", [one for one in every if one[0] == layer], named=False) for layer in layers]
    title = f"HeadHunter, {scope.name}, w = {w:g}, {searched}, report on {sizes.shown} of other seeds"
    tables = [block(f"{title}; distance to held-out digits, smaller is better", SETS, rows)]
    tables.append(_randoms(pictures, hunted, every, w, sizes, kept["hunted"]))
    curve, before = [], base
    for u in (*sizes.us, 1.0):
        drawn = pictures.draw(hunted, sizes.shown, w=w, u=u) if u < 1.0 else None
        one = kept["hunted"] if drawn is None else pictures.distance(drawn)
        frechet = rows[0][-1] if drawn is None else quality(drawn)["frechet"]
        curve.append([f"{u:g}", str(Estimate.of(one)), str(difference(before, one)), frechet])
        before = one
    columns = ("u", "distance", "closer than at the u before", "Frechet")
    return [*tables, block(f"SoftPAG's u on the hunted heads, w = {w:g}", columns, curve)]


def _randoms(pictures: Pictures, hunted: Sequence[Head], every: Sequence[Head], w: float, sizes: Sizes, own: Tensor) -> dict[str, Any]:
    """Triples of heads that were not hunted; the margin and its error over triples."""
    pool = [one for one in every if one not in hunted]
    own = own[: sizes.per_random]
    triples = [random.Random(seed).sample(pool, 3) for seed in range(sizes.randoms)]
    means = [float(pictures.distance(pictures.draw(heads, sizes.per_random, w=w)).mean()) for heads in triples]
    mine = float(own.mean())
    best = min(range(len(means)), key=means.__getitem__)
    margin = Estimate.of([one - mine for one in means])
    names = ", ".join(f"{layer}.{head}" for layer, head in triples[best])
    rows: list[list[Any]] = [
        ["hunted", f"{Estimate.of(own)}", ""],
        [f"mean of {len(means)} triples", f"{sum(means) / len(means):.3f}", str(margin)],
        [f"nearest triple ({names})", f"{means[best]:.3f}", f"{means[best] - mine:.3f}"],
        ["triples as near as the hunted one", sum(one <= mine for one in means), ""],
    ]
    title = f"random triples, w = {w:g}, {sizes.per_random} pictures each"
    return block(title, ("set", "distance", "hunted nearer by (error over triples)"), rows)


__all__ = ["FOUND", "FULL", "Pictures", "Sizes", "hunt", "measure"]
