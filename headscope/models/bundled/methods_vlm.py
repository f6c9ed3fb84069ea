"""What probes and edits of vision heads do on `bundled:vlm`, measured and written to methods.json, from which the card takes its table.

    python -m headscope.models.bundled.methods_vlm --model DIR --device cuda

The setting that hallucinates: the picture is noisy and the question carries a wrong guess. What the edits cost elsewhere is measured on
clean pictures, on noise alone, and with guesses that are right.

Every option of a method is chosen on questions of its own (`DEV`), by its gain in the hallucinating setting among those that cost at most
0.02 in every other setting there; the numbers are from other questions (`TEST`), beside those of the published options. An option tuned
on what it is then judged by would look good on any model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headscope.models.bundled import data_vlm as data
from headscope.models.bundled.training import generator, say, write_json

if TYPE_CHECKING:
    from headscope.interventions import Intervention
    from headscope.scope import Scope

DEV, TEST = 4100, 4200
PART = 256
COST = 0.02
NOISE = 0.3
CASES: dict[str, tuple[float | None, float]] = {
    "wrong guess, noisy": (0.0, NOISE),
    "clean": (None, 0.05),
    "right guess": (1.0, 0.05),
    "wrong guess": (0.0, 0.05),
    "noisy": (None, NOISE),
    "right guess, noisy": (1.0, NOISE),
}
"""Name -> share of right guesses (None: no guess), pixel noise. The first one is where the model hallucinates."""
HALLUCINATING = "wrong guess, noisy"
Edit = Callable[["Scope", dict[str, Any]], "list[Intervention]"]


@dataclass(frozen=True)
class Questions:
    """A batch of prompts of one length: model inputs, and the ids of the right first words [n]."""

    inputs: dict[str, torch.Tensor]
    wanted: torch.Tensor


@lru_cache(maxsize=256)
def questions(kind: str, case: str, count: int, seed: int) -> tuple[Questions, ...]:
    """`count` questions of a kind in a case, in batches."""
    guess, noise = CASES[case]
    source = generator(seed + 10 * data.KINDS.index(kind) + list(CASES).index(case), "cpu")
    out = []
    for start in range(0, count, PART):
        many = min(PART, count - start)
        scene = data.scenes(many, source, held_out=True, noise=noise)
        ids, labels = data.dialogue([kind], scene, source, guesses=[guess])
        place = int((labels[0] >= 0).nonzero()[0, 0])
        kept = ids[:, :place].contiguous()
        inputs = {"input_ids": kept, "attention_mask": torch.ones_like(kept), "pixel_values": data.pixel_values(scene.pixels).contiguous()}
        out.append(Questions(inputs, ids[:, place]))
    return tuple(out)


@torch.no_grad()
def right(scope: Scope, asked: tuple[Questions, ...], edit: Edit | None = None) -> torch.Tensor:
    """Float64 [n]: 1 where the answer's first word is right, under an edit."""
    from headscope.interventions.running import outputs_of

    found = []
    for part in asked:
        with scope.intervene(*edit(scope, part.inputs)) if edit else nullcontext():
            said = outputs_of(scope, {**part.inputs, "logits_to_keep": 1})[:, -1].argmax(-1).cpu()
        found.append((said == part.wanted).double())
    return torch.cat(found)


def table(scope: Scope, edit: Edit | None, count: int, seed: int, plain: dict[str, Any] | None = None) -> dict[str, Any]:
    """case -> kind -> accuracy; with `plain`, the answers of the model itself, case -> kind -> [change, its standard error]."""
    out: dict[str, Any] = {}
    for case in CASES:
        for kind in data.GUESSED:
            now = right(scope, questions(kind, case, count, seed), edit)
            if plain is None:
                out.setdefault(case, {})[kind] = now
            else:
                change = now - plain[case][kind]
                error = change.std().item() / len(change) ** 0.5
                out.setdefault(case, {})[kind] = [round(change.mean().item(), 4), round(error, 4)]
    return out


@torch.no_grad()
def readings(scope: Scope, edit: Edit | None, count: int, seed: int, noise: float = NOISE) -> dict[str, float]:
    """Noisy grids read out word by word: absent, the share of the digits named that are nowhere in the picture; named, digits per picture;
    right, the share of cells read rightly."""
    source, table = generator(seed, "cpu"), data.ids_of()
    absent = named = correct = 0.0
    for start in range(0, count, PART):
        scene = data.scenes(min(PART, count - start), source, held_out=True, noise=noise)
        ids, labels = data.dialogue(["read"], scene, source)
        place = int((labels[0] >= 0).nonzero()[0, 0])
        kept = ids[:, :place].contiguous()
        inputs = {"input_ids": kept, "attention_mask": torch.ones_like(kept), "pixel_values": data.pixel_values(scene.pixels).contiguous()}
        with scope.intervene(*edit(scope, inputs)) if edit else nullcontext():
            said = scope.generate(inputs, max_new_tokens=9, min_new_tokens=9).new_ids.cpu()
        digit = said - table[data.DIGITS[0]]
        is_digit = (digit >= 0) & (digit < 10)
        absent += float((is_digit & (scene.counts().gather(1, digit.clamp(0, 9)) == 0)).sum())
        named += float(is_digit.sum())
        correct += float((said == ids[:, place : place + 9]).sum())
    return {"absent": round(absent / max(1.0, named), 4), "named": round(named / count, 3), "right": round(correct / count / 9, 4)}


def gain(found: dict[str, Any]) -> float:
    """Mean change in the hallucinating setting."""
    return sum(found[HALLUCINATING][kind][0] for kind in data.GUESSED) / len(data.GUESSED)


def worst(found: dict[str, Any]) -> float:
    """The largest loss elsewhere, as a change (negative for a loss)."""
    return float(min(found[case][kind][0] for case in CASES if case != HALLUCINATING for kind in data.GUESSED))


class _Prepared:
    """Edits made for prompts beforehand, each once: a factor changes nothing of what is read for them."""

    def __init__(self, make: Callable[[dict[str, Any]], Any]) -> None:
        self.make = make
        self.made: dict[int, tuple[torch.Tensor, Any]] = {}

    def of(self, inputs: dict[str, Any]) -> Any:
        """The edit for these prompts."""
        key = id(inputs["input_ids"])
        if key not in self.made:
            self.made[key] = (inputs["input_ids"], self.make(inputs))  # the ids are kept, so that no other tensor gets their id
        return self.made[key][1]


def methods(scope: Scope) -> dict[str, dict[str, Edit]]:
    """Method -> options in words -> edit; the first options of each are the published ones."""
    from headscope.interventions import PAINT, VAR, VHR, VisionScale

    every = [(module.layer, head) for module in scope.topology.main for head in range(module.heads)]
    seen: dict[str, dict[str, Edit]] = {"VHR": {}, "VAR": {}, "PAINT": {}, "VisionScale": {}}

    @lru_cache(maxsize=4)
    def reinforced(where: str) -> _Prepared:
        return _Prepared(lambda inputs: VHR.prepared(scope, inputs, every if where == "all layers" else None))

    def vhr(alpha: float, where: str) -> Edit:
        return lambda scope, inputs: [replace(reinforced(where).of(inputs), alpha=alpha)]

    for where in ("the paper's layers", "all layers"):
        for alpha in (2.0, 1.5, 1.25, 1.1):
            seen["VHR"][f"alpha {alpha:g}, {where}"] = vhr(alpha, where)

    def var(**options: Any) -> Edit:
        return lambda scope, inputs: [VAR(**options)]

    for p in (0.6, 0.3, 0.15):
        for rho in (0.8, 0.5):
            seen["VAR"][f"rho {rho:g}, p {p:g}"] = var(rho=rho, p=p)

    boosted = _Prepared(lambda inputs: PAINT.prepared(scope, inputs))

    def paint(alpha: float, beta: float) -> Edit:
        return lambda scope, inputs: [replace(boosted.of(inputs), alpha=alpha, beta=beta)]

    for alpha, beta in ((0.9, 0.3), (0.5, 0.3), (0.3, 0.1)):
        seen["PAINT"][f"alpha {alpha:g}, beta {beta:g}"] = paint(alpha, beta)

    top = ranking(scope)

    def scale(count: int, gamma: float) -> Edit:
        return lambda scope, inputs: [VisionScale(top[:count], gamma)]

    for count in (8, 4):
        for gamma in (1.5, 1.25):
            seen["VisionScale"][f"{count} heads, gamma {gamma:g}"] = scale(count, gamma)
    return seen


def ranking(scope: Scope, count: int = 24) -> list[tuple[int, int]]:
    """All heads by VHD over development questions, the largest first."""
    from headscope.probes import Vhd
    from headscope.probes.pictures import bundled_samples

    return Vhd().run(scope, bundled_samples(count, DEV), progress=False).top("vhd_raw", scope.topology.heads)


def agreement(scope: Scope, count: int = 24) -> dict[str, float]:
    """Spearman's rank correlations of VHD (picture removed, positions held or closed up; picture blank) with vision mass."""
    from scipy.stats import spearmanr

    from headscope.probes import Vhd, VisionMass
    from headscope.probes.pictures import bundled_samples

    samples = bundled_samples(count, TEST)
    mass = VisionMass().run(scope, samples, progress=False)["vision_mass"].flatten()
    out = {}
    for name, probe in (("removed", Vhd()), ("removed, text closed up", Vhd(positions="shift")), ("blank", Vhd(without="blank"))):
        found = probe.run(scope, samples, progress=False)
        for metric in ("vhd_raw", "vhd"):
            out[f"{metric}, {name}"] = round(float(spearmanr(found[metric].flatten(), mass)[0]), 4)
    return out


@torch.no_grad()
def unseen(scope: Scope, inputs: dict[str, Any], heads: list[tuple[int, int]]) -> Intervention:
    """The edit that gives heads, in text rows, what they write when the prompt has no picture (its words where they stood)."""
    from headscope.interventions import HeadMask
    from headscope.interventions.record import record_heads
    from headscope.interventions.running import outputs_of

    ids = inputs["input_ids"]
    place = torch.arange(ids.shape[1])
    kept = torch.cat([place[:1], place[1 + data.TOKENS :]])
    alone = {"input_ids": ids[:, kept], "position_ids": kept.expand(len(ids), -1), "attention_mask": torch.ones(len(ids), len(kept)).long()}
    with record_heads(scope, heads, sites=("z",), to_cpu=True) as record:
        outputs_of(scope, alone)
    found = record.stacked("z", heads)  # [B, heads, N, Dv]
    whole = found.new_zeros(*found.shape[:2], ids.shape[1], found.shape[-1])
    whole[:, :, kept] = found
    return HeadMask(heads, "resample", whole, positions="text")


def ablation(scope: Scope, order: list[tuple[int, int]], count: int, sets: int = 5) -> dict[str, Any]:
    """Accuracy per kind on clean pictures and in the hallucinating setting with heads masked, for the top, the bottom, and random sets of a
    fifth and of two fifths of the heads; zeroed, and left with what they write of the question alone. `effect`: how far answers move from
    those to the question alone (total variation), as a share of the model's own.
    """
    from headscope.interventions import HeadMask, HeadSet

    out: dict[str, Any] = {}
    ways: dict[str, Callable[[list[tuple[int, int]]], Edit]] = {
        "zero": lambda heads: lambda scope, inputs: [HeadMask(heads)],
        "unseen": lambda heads: lambda scope, inputs: [unseen(scope, inputs, heads)],
    }
    for share in (0.2, 0.4):
        size = round(share * len(order))
        top = order[:size]
        chosen = {"top": top, "bottom": order[-size:]}
        chosen |= {
            f"random {seed}": [(int(layer), head) for layer, head in HeadSet.random(scope, size, seed, without=HeadSet(top))]
            for seed in range(sets)
        }
        for way, make in ways.items():
            for name, heads in chosen.items():
                row = {
                    case: {
                        kind: round(right(scope, questions(kind, case, count, TEST), make(heads)).mean().item(), 4) for kind in data.GUESSED
                    }
                    for case in (HALLUCINATING, "clean")
                }
                row["effect"] = {kind: round(effect(scope, questions(kind, "clean", count, TEST), make(heads)), 4) for kind in data.GUESSED}
                out.setdefault(f"{size} heads, {way}", {})[name] = row
    return out


@torch.no_grad()
def effect(scope: Scope, asked: tuple[Questions, ...], edit: Edit) -> float:
    """Total variation between answers under an edit and answers to the question alone, as a share of the model's own."""
    from headscope.interventions.running import outputs_of

    def answers(inputs: dict[str, Any]) -> torch.Tensor:
        return outputs_of(scope, {**inputs, "logits_to_keep": 1})[:, -1].double().softmax(-1)

    apart = torch.zeros(2, dtype=torch.float64)
    for part in asked:
        ids = data.without_picture(part.inputs["input_ids"])
        alone = answers({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        whole = answers(part.inputs)
        with scope.intervene(*edit(scope, part.inputs)):
            edited = answers(part.inputs)
        apart += torch.stack([(one - alone).abs().sum().cpu() for one in (edited, whole)])
    return float(apart[0] / apart[1])


def sinks(scope: Scope, count: int = 24) -> dict[str, Any]:
    """Visual sinks by VAR's rule, and how near the model is to having any: the largest phi of image tokens and of the first token."""
    from headscope.interventions.running import run_once
    from headscope.interventions.var import sink_dimensions
    from headscope.probes import VisionMass, VisualSinks
    from headscope.probes.layer_inputs import watching
    from headscope.probes.pictures import bundled_samples
    from headscope.probes.visual_sinks import sink_phi

    samples = bundled_samples(count, TEST)
    found = VisualSinks().run(scope, samples, progress=False)
    out: dict[str, Any] = {name: round(float(found.numbers[name]), 4) for name in ("visual_sinks", "visual_sink_tau", "phi_largest_visual")}
    dimensions = sink_dimensions(scope)

    def see(place: int, hidden: torch.Tensor) -> None:
        out[f"phi_first_layer_{place}"] = round(float(sink_phi(hidden[0, :1].cpu(), dimensions)), 3)

    with watching(scope, see):
        run_once(scope, samples[0].inputs)
    layers = VisionMass().run(scope, samples, progress=False).tables["layers"]
    return out | {f"{name}": [round(float(one), 4) for one in layers[name]] for name in layers.columns if name != "layer"}


def measured(scope: Scope, count: int) -> Iterator[tuple[str, Any]]:
    """The parts of methods.json, cheapest first."""
    yield "agreement", agreement(scope)
    yield "sinks", sinks(scope)
    order = ranking(scope)
    yield "ranking", [f"{layer}.{head}" for layer, head in order]
    plain = {seed: table(scope, None, count, seed) for seed in (DEV, TEST)}
    yield "accuracy", {case: {kind: round(one.mean().item(), 4) for kind, one in row.items()} for case, row in plain[TEST].items()}
    found: dict[str, Any] = {}
    aloud = {"none": readings(scope, None, count, TEST)}
    for method, options in methods(scope).items():
        tried = {name: table(scope, edit, count, DEV, plain[DEV]) for name, edit in options.items()}
        fit = [name for name in tried if worst(tried[name]) >= -COST]
        best = max(fit, key=lambda name: gain(tried[name]), default=None)
        published = next(iter(options))
        kept = {name: table(scope, options[name], count, TEST, plain[TEST]) for name in dict.fromkeys((published, best or published))}
        found[method] = {
            "development": {name: {"gain": round(gain(one), 4), "worst elsewhere": round(worst(one), 4)} for name, one in tried.items()},
            "published": published,
            "chosen": best,
            "test": {
                name: {"gain": round(gain(one), 4), "worst elsewhere": round(worst(one), 4), "change": one} for name, one in kept.items()
            },
        }
        say(f"{method}: {found[method]['development']} chosen {best}")
        aloud |= {f"{method}: {name}": readings(scope, options[name], count, TEST) for name in kept}
        yield "methods", found
        yield "readings", aloud
    yield "ablation", ablation(scope, order, min(count, 256))


def main() -> None:
    """Command line."""
    import headscope as hs

    parser = argparse.ArgumentParser(description="measure vision heads of bundled:vlm")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=512, help="questions per kind and case")
    given = parser.parse_args()
    scope = hs.load(str(given.model), device=given.device, dtype="float32")
    found: dict[str, Any] = {"questions": given.count}
    for name, part in measured(scope, given.count):
        found[name] = part
        say(f"{name}: {part}" if name in ("agreement", "sinks", "accuracy") else name)
        write_json(given.model / "methods.json", found)


if __name__ == "__main__":
    main()
