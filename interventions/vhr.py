"""VHR: louder outputs for the heads whose output is there because of the picture.

How far a head's output moves when the picture is taken away needs a second run without it, which no intervention can make in the middle
of a forward pass. So `VHR.prepared(scope, inputs)` makes that run first and keeps each head's output; heads are then chosen while the
prompt is read, layer by layer, behind the layers already reinforced, and stay chosen for the rest of the generation.

The silent failures this avoids: a reference that belongs to another question (the ids are compared), and text that moved (a question
without its picture starts earlier; its positions are held unless asked otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import register
from headscope.interventions.head_edit import HeadEdit, Site
from headscope.interventions.prompts import (
    inputs_of,
    last_rows,
    one_of,
    prompt_digest,
    real_tokens,
    refuse_blind,
    refuse_other_prompt,
    repeated,
)
from headscope.interventions.record import record_heads
from headscope.interventions.running import outputs_of
from headscope.interventions.score_edits import _number
from headscope.interventions.values import Values
from headscope.kernels.partial import head_index

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

DISTANCES = ("l2", "relative", "cosine")
SHARE = 14 / 32
"""The paper reinforces the second and the last 14 of LLaVA-1.5's 32 layers."""


@register("vhr")
@dataclass(frozen=True)
class VHR(HeadEdit):
    """Vision-aware head reinforcement (He et al. 2025, arXiv 2412.13949; the official code was not obtainable).

        VHD_i = || z_i(picture, question) - z_i(question) ||      at the last token of the prompt, z before W_O
        VHD_i := 0 where VHD_i and ||z_i(question)||^2 both are above mean + standard deviation of their layer    (`outliers`)
        z_i *= alpha for the heads with VHD_i above their layer's median, in this row and all that follow

    Make it with `VHR.prepared(scope, inputs)`, which runs the prompt without its picture; it acts on that prompt only, batch and padding
    as you like. `heads`: whole layers as a rule; median and deviations are over those of a layer that are named, and `prepared` takes the
    paper's layers (the second, and the last 14/32 of them; for InstructBLIP the paper has the last 18).

    - `alpha`: 2 in the paper. `distance`: "l2" (the paper's), "relative", ||a - b|| / (||a|| + ||b||), or "cosine".
    - `reference` [B, heads, Dv]: z without the picture; `lengths`, `prompt`: what it belongs to.

    The published text leaves open which rows of the prompt are reinforced, and whether the second run is: here the last row, and a plain
    second run. Several answers to a prompt (beams) share its selection.
    """

    heads: Any = "all"
    alpha: float = 2.0
    distance: Literal["l2", "relative", "cosine"] = "l2"
    outliers: bool = True
    reference: Any = None
    lengths: tuple[int, ...] = ()
    prompt: str = ""
    _chosen: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    site: ClassVar[Site] = "Z"
    always_written: ClassVar[tuple[str, ...]] = ("alpha",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("alpha", self.alpha)
        if self.distance not in DISTANCES:
            raise unknown_name(InterventionError, "distance", self.distance, DISTANCES)
        object.__setattr__(self, "reference", Values.of(self.reference))
        object.__setattr__(self, "lengths", tuple(self.lengths))

    @classmethod
    def prepared(
        cls,
        scope: Scope,
        inputs: Any,
        heads: Any = None,
        *,
        without: Literal["removed", "blank"] = "removed",
        text_positions: Literal["keep", "shift"] = "keep",
        **options: Any,
    ) -> VHR:
        """VHR for these prompts: one run of each without its picture, in whatever interventions are active.

        `inputs`: model inputs [B, N], a (picture, question), or a Sample. `without`: "removed" takes the picture's tokens out (the paper);
        "blank" shows an even gray, for a model that never read a prompt without a picture. `text_positions`: "keep" leaves every word where
        it stood beside the picture, "shift" lets the text close up. `options`: VHR's own.
        """
        refuse_blind(scope, "VHR")
        for name, value, known in (("without", without, ("removed", "blank")), ("text_positions", text_positions, ("keep", "shift"))):
            if value not in known:
                raise unknown_name(InterventionError, name, value, known)
        if heads is None:
            layers = paper_layers(len(scope.topology.main))
            heads = [(m.layer, head) for place, m in enumerate(scope.topology.main) if place in layers for head in range(m.heads)]
        made = cls(heads, **options)
        given = inputs_of(scope, inputs)
        real = real_tokens(given)
        found = _blank_outputs(scope, given, real) if without == "blank" else _text_outputs(scope, given, real, text_positions)
        by_layer = {module.name: z for module, z in zip(scope.topology.main, found, strict=True)}
        reference = torch.stack([by_layer[scope.topology[layer].name][:, head] for layer, head in made.pairs(scope)], 1)
        rest = {one.name: getattr(made, one.name) for one in fields(made) if not one.name.startswith("_")}
        rest |= {"reference": reference, "lengths": tuple(real.sum(1).tolist()), "prompt": prompt_digest(given["input_ids"], real)}
        return cls(**rest)

    def bind(self, scope: Scope) -> VHR:
        """A copy that knows its heads. InterventionError for a model that reads no pictures, and without a reference."""
        refuse_blind(scope, "VHR")
        if self.reference is None:
            raise refusal(
                InterventionError,
                "VHR without a reference",
                "which heads see the picture shows only beside a run without it",
                "use VHR.prepared(scope, inputs)",
            )
        bound = super().bind(scope)
        shape, pairs = self.reference.shape, self.pairs(scope)
        if len(shape) != 3 or shape[0] != len(self.lengths) or shape[1] != len(pairs):
            raise refusal(
                InterventionError,
                f"a reference {list(shape)}",
                f"it is [{len(self.lengths)} prompts, {len(pairs)} heads, Dv]",
                "use VHR.prepared(scope, inputs)",
            )
        return bound

    @property
    def selected(self) -> list[tuple[tuple[str, int], ...]]:
        """Per sequence of the batch that ran last, the heads (module, head) that are reinforced; empty before any ran."""
        if not self._chosen:
            return []
        batch = len(next(iter(self._chosen.values())))
        table = {name: value.nonzero().tolist() for name, value in self._chosen.items()}
        return [tuple((name, head) for name, pairs in table.items() for place, head in pairs if place == row) for row in range(batch)]

    # ---- acting -------------------------------------------------------------------------------------------------

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The outputs, reinforced from the last row of the prompt on; heads are chosen in whatever phase."""
        heads = self.heads_in(call)
        if not heads or self.alpha == 1.0:
            return output
        batch, count = output.shape[:2]
        first, state = call.query_offset, self.bound.state
        ends, last = self._ends(call)
        if first == 0:
            state.pop(call.module, None)
        here = [(b, end - first) for b, end in enumerate(ends) if first <= end < first + count]
        if here:
            if call.module == next(iter(self.bound.heads)):
                refuse_other_prompt(call, self.lengths, self.prompt, "VHR")
            self._select(call, output, heads, here)
        rows = self.rows_in(call)
        if rows is None or min(ends) >= first + count:
            return output
        chosen: Tensor | None = state.get(call.module)
        if chosen is None or chosen.shape[0] != batch:
            raise refusal(
                InterventionError,
                f"VHR in {call.module} from position {first} on",
                "heads are chosen at the last token of the prompt, which did not run in this block",
                "open the block before the prompt is read",
            )
        mine = torch.arange(first, first + count, device=output.device)[None] >= last[:, None]
        if rows is not True:
            mine = mine & rows
        louder = output.new_ones(batch, count, len(heads)).masked_fill(mine[:, :, None] & chosen[:, None], float(self.alpha))
        if len(heads) < output.shape[2] or heads != sorted(heads):
            factor = output.new_ones(batch, count, output.shape[2])
            factor[:, :, head_index(tuple(heads), output.device)] = louder
            louder = factor
        return output * louder[..., None]

    def _ends(self, call: AttentionCall) -> tuple[list[int], Tensor]:
        """Where each prompt ends, [B] absolute positions, here and on the call's device. Asked once a pass: looking at where padding ends
        waits for the device."""
        state, padded = self.bound.state, call.first_token is not None
        key = (call.q.shape[0], padded, call.q.device)
        known = state.get("ends")
        if known is None or known[0] != key or (padded and call.module == next(iter(self.bound.heads))):
            last = last_rows(call, self.lengths, "VHR")
            known = state["ends"] = (key, last.tolist(), last)
        return known[1], known[2]

    def _select(self, call: AttentionCall, output: Tensor, heads: list[int], here: list[tuple[int, int]]) -> None:
        """Choose among the layer's heads for the sequences whose last prompt row is in this call: `here` (sequence, row)."""
        known = self.bound.state.get(call.module)
        device = output.device
        chosen = torch.zeros(output.shape[0], len(heads), dtype=torch.bool, device=device) if known is None else known
        reference = self.reference.like(output.new_empty(0, dtype=torch.float64))
        without = repeated(reference[:, head_index(tuple(self.places_in(call)), device)], call, "VHR")
        sequences, rows = (head_index(tuple(one), device) for one in zip(*here, strict=True))
        index = head_index(tuple(heads), device)
        chosen[sequences] = self.choice(output[sequences, rows][:, index].detach().double(), without[sequences])
        self.bound.state[call.module] = chosen
        record = torch.zeros(output.shape[0], output.shape[2], dtype=torch.bool, device=device)
        record[:, index] = chosen
        self._chosen[call.module] = record

    def choice(self, seen: Tensor, unseen: Tensor) -> Tensor:
        """Bool [B, h]: the heads of one layer to reinforce, from their outputs [B, h, Dv] with the picture and without."""
        from headscope.probes.vhd import distance

        apart = distance(seen, unseen, self.distance)
        if self.outliers:
            apart = apart.masked_fill(_high(apart) & _high(unseen.square().sum(-1)), 0.0)
        ordered, count = apart.sort(-1).values, apart.shape[-1]
        return apart > (ordered[..., (count - 1) // 2] + ordered[..., count // 2])[..., None] / 2

    def what(self) -> str:
        """In words."""
        rule = ", outliers aside" if self.outliers else ""
        return f"multiply by {self.alpha:g} the outputs of the half of each layer's heads that the picture moves most{rule}"

    def cost(self) -> str:
        """In words."""
        return "one run without the picture beforehand; a copy of the heads' outputs, O(N d)"


def _high(values: Tensor) -> Tensor:
    """Above mean and (population) standard deviation of the layer, [B, h]."""
    spread, mean = torch.std_mean(values, -1, correction=0, keepdim=True)
    return values > mean + spread


def paper_layers(count: int) -> set[int]:
    """Places of the layers that the paper reinforces, as a share of the depth: the second, and the last 14 of 32."""
    return {min(1, count - 1), *range(count - max(1, round(SHARE * count)), count)}


def _blank_outputs(scope: Scope, inputs: dict[str, Any], real: Tensor) -> list[Tensor]:
    """Per layer z [B, H, Dv] of the prompts' last rows, every pixel at 0."""
    pixels = {name: torch.zeros_like(value) for name, value in inputs.items() if name.startswith("pixel_values")}
    if not pixels:
        raise refusal(InterventionError, "inputs without pixel_values", "there is nothing to blank", "pass without='removed'")
    with record_heads(scope, sites=("z",), to_cpu=True) as record:
        outputs_of(scope, {**inputs, **pixels})
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return [record.z(module.name)[torch.arange(len(real)), last].double() for module in scope.topology.main]


def _text_outputs(scope: Scope, inputs: dict[str, Any], real: Tensor, positions: str) -> list[Tensor]:
    """Per layer z [B, H, Dv] of the prompts' last rows, their pictures taken out. Texts of one length run together."""
    from headscope.probes.pictures import last_row

    texts = [_text_of(scope, one_of(inputs, row), positions) for row in range(len(real))]
    groups: dict[int, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(text["input_ids"].shape[1], []).append(row)
    found: dict[int, list[Tensor]] = {}
    for rows in groups.values():
        together = {name: torch.cat([texts[row][name] for row in rows], -2) for name in texts[0]}
        with record_heads(scope, sites=("z",), to_cpu=True) as record:
            outputs_of(scope, {**together, **last_row(scope)})
        layers = [record.z(module.name)[:, -1].double() for module in scope.topology.main]
        found |= {row: [z[place] for z in layers] for place, row in enumerate(rows)}
    return [torch.stack(layer) for layer in zip(*(found[row] for row in range(len(texts))), strict=True)]


def _text_of(scope: Scope, inputs: dict[str, Any], positions: str) -> dict[str, Any]:
    """Inputs of one prompt, its picture taken out."""
    from headscope.probes.pictures import samples_of
    from headscope.probes.vhd import last_outputs, text_only

    sample = samples_of(scope, [inputs], count=1, seed=0)[0]
    places: Tensor | None = None
    if positions == "keep":
        places = torch.arange(len(sample.ids))[None]
        if hasattr(getattr(scope.model, "model", scope.model), "get_rope_index"):  # positions of its own: read them off a run
            if not any(name.startswith("pixel_values") for name in inputs):
                raise refusal(
                    InterventionError,
                    "a padded batch of prompts",
                    f"the positions of {scope.name} depend on the picture's shape",
                    "prepare one prompt at a time, or pass text_positions='shift' or without='blank'",
                )
            places = last_outputs(scope, sample.inputs)[1]
    return text_only(sample, places)


__all__ = ["VHR", "paper_layers"]
