"""VAR: take attention off sink tokens and give it to what the picture shows, in the heads and rows that look at the picture.

Sinks are told by hidden states: a few dimensions in which the first token is massive, and every token that is massive in them. They are
found while the prompt is read and kept for the rest of the generation; which heads are edited is settled in every row anew.

The hidden states are the inputs of layers, which no attention call holds; hooks read them while the block is open. The silent failures
this avoids: sink dimensions of one model used on another, a condition on the share of sinks taken for one on the share of the rest, and
the last layer being edited because a flag was set in the wrong class.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import InterventionError, ProbeError, refusal, unknown_name
from headscope.interventions.base import register
from headscope.interventions.fold import Fold, shift
from headscope.interventions.head_edit import HeadEdit, Rows, Site
from headscope.interventions.p_site import redistribute
from headscope.interventions.prompts import refuse_blind
from headscope.interventions.score_edits import _number
from headscope.interventions.where import phase_of, token_class
from headscope.kernels.partial import head_index
from headscope.kernels.shifted import Gate, runs_triton

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A call's keys: bool [1 or B, Nk] `image` tokens; their codes (`kernels.triton_keys`) `if_sink`, source and watched on the image, and
    `if_none`, target on the image; `tokens` [1 or B] how many are of the image."""

    image: Tensor
    if_sink: Tensor
    if_none: Tensor
    tokens: Tensor


VARIANTS = ("paper", "official")
RHO = {"paper": 0.8, "official": 0.2}
PER_WEIGHT = 1e-6
"""What the official code adds to every visual weight before it divides."""


@register("var")
@dataclass(frozen=True)
class VAR(HeadEdit):
    """Visual attention redistribution (Kang et al. 2025, arXiv 2503.03321; github.com/seilk/VisAttnSink, read for its formulas).

    A token is a sink of a layer when phi = max over `dimensions` of |x_d / RMS(x)| >= `tau`, x its hidden state at the layer's input. Of a
    head's row, with V the attention on image tokens and r the share of V that rests on no sink:

        V >= min_visual and r >= rho:   A_j *= 1 - p for all sinks j, text ones included; what is freed goes to the image tokens that are
                                        no sinks, in proportion to their weights

    - `rho`: 0.8 for general questions, 0.5 against hallucination, 0.9 for questions about details (the paper tuned it per benchmark).
      `p`: 0.6. `rho=0, min_visual=0` edits every head. `positions`: all text queries. `layers` None: all but the last one.
    - `dimensions` None: found from the model when it is bound, by one pass over its BOS alone: the `count` dimensions in which it is
      largest. `tau` None: 20 for hidden states of 1,600 dimensions and more, and the same share of the largest phi there is below.
    - `variant`: "official" takes `rho` and `p` as the released code does: sinks keep p (0.6 moves 40 %), a row is edited when the share of
      *sinks* is at most rho (None: 0.2) with 1e-6 added to each weight below the line, and `layers` None is all from the third on, the last
      one included.

    Sinks come from the rows of the prompt; generated tokens are none. Works in batches, whatever their padding. A row with nothing to give
    to is left alone.
    """

    heads: Any = "all"
    rho: float | None = None
    p: float = 0.6
    tau: float | None = None
    min_visual: float = 0.2
    dimensions: tuple[int, ...] | None = None
    count: int = 2
    variant: Literal["paper", "official"] = "paper"
    positions: Any = field(default="text", kw_only=True)

    site: ClassVar[Site] = "P"
    folds: ClassVar[bool] = True
    always_written: ClassVar[tuple[str, ...]] = ("p",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise unknown_name(InterventionError, "variant", self.variant, VARIANTS)
        for name in ("rho", "p", "min_visual"):
            value = getattr(self, name)
            if value is not None and not 0 <= _number(name, value) <= 1:
                raise refusal(InterventionError, f"{name}={value}", "it is a share", "pass a number from 0 to 1")
        if self.tau is not None and not _number("tau", self.tau) > 0:
            raise refusal(InterventionError, f"tau={self.tau}", "every token would be a sink", "pass tau=20, or None")
        if self.dimensions is not None:
            object.__setattr__(self, "dimensions", tuple(int(one) for one in self.dimensions))
        if self.count < 1 or self.dimensions == ():
            raise refusal(InterventionError, "no sink dimension", "phi is a maximum over at least one", "pass count=2, or dimensions=(...)")

    @property
    def keep(self) -> float:
        """What a sink keeps."""
        return float(self.p) if self.variant == "official" else 1.0 - float(self.p)

    @property
    def limit(self) -> float:
        """rho as it is used."""
        return RHO[self.variant] if self.rho is None else float(self.rho)

    # ---- binding ------------------------------------------------------------------------------------------------

    def bind(self, scope: Scope) -> VAR:
        """A copy that knows its heads and sink dimensions. InterventionError for a model that reads no pictures, and for a threshold or
        dimension that its hidden states do not have."""
        refuse_blind(scope, "VAR")
        depth = len(scope.topology.main)
        layers = self.layers or ((2, depth) if self.variant == "official" else (0, depth - 1))
        if not layers[0] < layers[1]:
            raise refusal(InterventionError, f"VAR on {depth} layers", f"the {self.variant} variant leaves them all out", "pass layers=")
        bound = super(VAR, replace(self, layers=layers)).bind(scope)
        width = int(scope.model.get_input_embeddings().weight.shape[1])
        dimensions = self.dimensions or sink_dimensions(scope, self.count)
        if max(dimensions) >= width or min(dimensions) < 0:
            raise refusal(InterventionError, f"dimensions={dimensions}", f"hidden states have 0..{width - 1}", "pass some of these")
        first = next(module.name for module in scope.topology.main if module.name in bound.bound.heads)
        bound.bound.state.update(dimensions=dimensions, tau=_threshold(scope, self.tau, width), first=first)
        return bound

    @contextmanager
    def opened(self, scope: Scope) -> Iterator[None]:
        """Read the layers' inputs while the block is open."""
        from headscope.probes.layer_inputs import watching

        if self.keep == 1.0:
            yield
            return
        names = [module.name for module in scope.topology.main]
        state, thread = self.bound.state, threading.get_ident()

        def see(place: int, hidden: Tensor) -> None:
            if threading.get_ident() == thread:
                state["hidden"] = (names[place], hidden) if place < len(names) and names[place] in self.bound.heads else None

        with _as_intervention_errors(), watching(scope, see):
            yield

    # ---- acting -------------------------------------------------------------------------------------------------

    def passes_over(self, module: str) -> bool:
        """For modules without one of its heads."""
        return module not in self.bound.heads

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        """The outputs with attention redistributed. Sinks are found in every phase, also where nothing is edited."""
        heads = self.heads_in(call)
        if not heads or self.keep == 1.0:
            return output
        sinks = self._sinks(call)
        if call.module == self.bound.state.get("first", call.module):  # a new pass: what earlier ids said is forgotten
            self.bound.state.pop("picture", None)
            self.bound.state.pop("rows", None)
        rows = self._rows(call)
        return output if rows is None else self._redistributed(call, output, heads, rows, sinks)

    def _redistributed(self, call: AttentionCall, output: Tensor, heads: list[int], rows: Rows, sinks: Tensor) -> Tensor:
        sinks = sinks[:, call.key_offset : call.key_offset + call.k.shape[2]]
        if call.mask.key_valid is not None:
            sinks = sinks & call.mask.key_valid
        picture, fold = self._picture(call), Fold.of(call)
        gate = self.gate(picture.tokens)
        if fold.fused(heads):
            from headscope.kernels.triton_keys import listed

            codes = torch.where(sinks, picture.if_sink, picture.if_none)[:, None]
            return shift(fold, output, heads, listed(codes, 2), keep=self.keep, others=False, rows=rows, gate=gate)
        shown, visual = picture.image & ~sinks, picture.image & sinks
        return redistribute(call, output, heads, sinks, shown, keep=self.keep, rows=rows, gate=gate, watched=visual, apart=True)

    def gate(self, tokens: Tensor | None) -> Gate:
        """The rows to edit, by their attention on image tokens that are no sinks (target) and on those that are (watched); `tokens` [B]:
        how many image tokens there are."""
        if self.variant == "official":
            return Gate(float(self.min_visual), self.limit, True, None if tokens is None else PER_WEIGHT * tokens)
        return Gate(float(self.min_visual), self.limit)

    def _picture(self, call: AttentionCall) -> Picture:
        """What the call's ids say of its keys. Looked up once for all layers that are given the same ids."""
        ids, state = call.facts.get("tokens"), self.bound.state
        key = (call.key_offset, call.k.shape[2], call.q.device)
        known = state.get("picture")
        if known is None or known[0] is not ids or known[1] != key or ids is None:
            image = token_class(call, "image", self.bound.image_token, "key")
            bits = image.to(torch.int8)
            known = state["picture"] = (ids, key, Picture(image, 1 + 4 * bits, 2 * bits, image.sum(1)))
        found: Picture = known[2]
        return found

    def _rows(self, call: AttentionCall) -> Rows:
        """`rows_in`, looked up once for all layers that are given the same ids, as long as these are all it depends on."""
        ids, state = call.facts.get("tokens"), self.bound.state
        if ids is None or call.mask.query_valid is not None or self.branches is not None or self.steps is not None:
            return self.rows_in(call)
        key = (call.query_offset, call.q.shape[2], call.q.device)
        known = state.get("rows")
        if known is None or known[0] is not ids or known[1] != key:
            known = state["rows"] = (ids, key, self.rows_in(call))
        return known[2]

    def _sinks(self, call: AttentionCall) -> Tensor:
        """Bool [B, positions so far]: the layer's sinks."""
        state, start = self.bound.state, call.query_offset
        known: Tensor | None = state.get(call.module) if start else None
        if start and (known is None or known.shape[0] != call.q.shape[0] or known.shape[1] > start):
            raise refusal(
                InterventionError,
                f"VAR in {call.module} from position {start} on",
                "the sinks of earlier tokens are not known (the block was opened, or the batch changed, in the middle)",
                "open the block before the prompt is read",
            )
        if known is not None and known.shape[1] < start:
            known = torch.nn.functional.pad(known, (0, start - known.shape[1]))
        if phase_of(call) == "decode" and known is not None:
            return torch.nn.functional.pad(known, (0, 1))
        seen = state.pop("hidden", None)
        if seen is None or seen[0] != call.module or seen[1].shape[1] != call.q.shape[2]:
            raise refusal(
                InterventionError, f"VAR in {call.module}", "the input of its layer was not seen", "run the whole model in the block"
            )
        found = _massive(seen[1], state["dimensions"], state["tau"]).to(call.q.device)
        state[call.module] = found if known is None else torch.cat([known, found], 1)
        out: Tensor = state[call.module]
        return out

    def algebra(self) -> str:
        """It meets what earlier redistributions left."""
        return "redistribute"

    def what(self) -> str:
        """In words."""
        rule = f"at most {self.limit:g} of it on sinks" if self.variant == "official" else f"at least {self.limit:g} of it past sinks"
        return (
            f"in rows with at least {self.min_visual:g} of their attention on the picture and {rule}, "
            f"move {1 - self.keep:.0%} of the attention on sinks to the picture's other tokens"
        )

    def where(self) -> str:
        """The last layer is left out without being named."""
        usual = {"paper": ", all layers but the last", "official": ", layers from 2 on"}[self.variant]
        return super().where() + ("" if self.layers else usual)

    def cost(self) -> str:
        """In words."""
        found = "" if self.dimensions else "one pass over one token beforehand; "
        return f"{found}these heads' normalisers by one pass of the statistics kernel and sums over the picture's tokens, O(N |image| d)"


def sink_dimensions(scope: Scope, count: int = 2) -> tuple[int, ...]:
    """The `count` dimensions of the residual stream in which the model's first token is largest, BOS run alone.

    It runs in a thread of its own, where neither interventions nor observers of this one are active.
    """
    from headscope.probes.pictures import Sample
    from headscope.probes.visual_sinks import first_token

    config = getattr(scope.model.config, "text_config", scope.model.config)
    bos = None if scope.tokenizer is None else scope.text_tokenizer.bos_token_id
    bos = getattr(config, "bos_token_id", None) if bos is None else bos
    if not isinstance(bos, int):
        raise refusal(
            InterventionError,
            f"VAR's sink dimensions in {scope.name}",
            "they are read off BOS, and the model names none",
            "pass dimensions=(d, ...)",
        )
    nothing = torch.zeros(1, dtype=torch.bool)
    alone = Sample({"input_ids": torch.tensor([[bos]])}, nothing, nothing)
    with _as_intervention_errors(), ThreadPoolExecutor(1) as pool:
        sizes = pool.submit(first_token, scope, alone).result()
    return tuple(sizes.topk(min(count, len(sizes))).indices.tolist())


def _massive(hidden: Tensor, dimensions: tuple[int, ...], tau: float) -> Tensor:
    """Bool [B, N]: phi >= tau of hidden states [B, N, d]; in one kernel on a CUDA device that runs Triton's."""
    from headscope.probes.visual_sinks import sink_phi

    if runs_triton(hidden):
        from headscope.kernels.triton_keys import massive

        return massive(hidden, head_index(dimensions, hidden.device), tau)
    return sink_phi(hidden, dimensions) >= tau


def _threshold(scope: Scope, tau: float | None, width: int) -> float:
    from headscope.probes.visual_sinks import VisualSinks

    with _as_intervention_errors():
        return VisualSinks(tau=tau).threshold(scope, width)


@contextmanager
def _as_intervention_errors() -> Iterator[None]:
    """What the probes refuse, refused here."""
    try:
        yield
    except ProbeError as error:
        raise InterventionError(str(error)) from None


__all__ = ["VAR", "sink_dimensions"]
