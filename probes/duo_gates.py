"""DuoAttention's gates: which key heads need all keys, found by optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.interventions.record import record_heads
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import check_streaming, context_of, full_output, not_differentiable, not_readable, streaming_output
from headscope.probes.duo_surrogate import default_window, given_passkeys, over_groups, share_of, surrogate_sums
from headscope.probes.passkeys import PasskeyMaker, PasskeyText

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.call import AttentionCall
    from headscope.scope import Scope

LENGTHS = 50
"""How many context lengths the texts are drawn from."""
Teacher = Literal["branch", "same_inputs"]


@dataclass(frozen=True)
class DuoGates(ActiveProbe):
    """A gate per key head: 1 where the head needs all keys, 0 where a few first keys and a recent window do.

    Every key head gets a gate a, and its query heads give a * full + (1 - a) * streaming, where streaming sees the first `sink` and the
    `recent` latest keys only. The model's weights are frozen; the gates alone are trained, on texts whose answers lie far back, to keep the
    final hidden state: loss = mean over answer tokens of mean_d (h_full - h_mixed)^2 + `penalty` * mean |a|. Gates start at 1 and are
    clamped to [0, 1] after every step. AdamW without weight decay, learning rate `rate`, warmed up over the first fifth of the steps and
    brought down to a tenth over the last. DuoAttention then keeps the heads above a quantile of the gates.

    `teacher`: what `full` is. "branch", as the official code has it: the head's output in the unchanged model, so that an error of the
    layers before cannot spread through a head that keeps all keys; "same_inputs", as the paper's formula reads: full attention on the mixed
    model's own q, k, v. `task`, `sink`, `recent`: as in `duo_surrogate`; texts have lengths between half and all of the context.

    Departures: `steps` is 200 instead of 2,000 (the rate of .02 moves a gate from 1 to 0 in 50), one text a step instead of eight, and the
    window is exact instead of whole blocks of 128. Passkeys are shortened to fit the context, with our own wording. Gates are kept clamped
    (published ones can be below 0), and nothing random is added to them, so that ties stay ties.

    Numbers: `duo_gates_above_half`, `duo_distill` (mean distillation loss of the last tenth of the steps), and `duo_spearman_error` and
    `duo_spearman_change`, the rank correlations of the gates with `duo_surrogate`'s two numbers per key head. Cost: per step one forward
    pass, and a forward and a backward pass with streaming attention; memory is that of the activations of one text.
    """

    steps: int = 200
    rate: float = 0.02
    penalty: float = 0.05
    sink: int | None = None
    recent: int | None = None
    teacher: Teacher = "branch"
    task: str = "auto"
    every: int = 10

    name: ClassVar[str] = "duo_gates"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("duo_gate", "gate", "this key head needs all keys", (0.0, 1.0), "kv_head"),)
    data: ClassVar[str] = "passkeys"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "steps x (two forward passes and a backward one)"
    source: ClassVar[str] = "DuoAttention, arXiv:2410.10819, mit-han-lab/duo-attention"

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope) or not_differentiable(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        if self.teacher not in ("branch", "same_inputs"):
            raise unknown_name(ProbeError, "teacher", self.teacher, ("branch", "same_inputs"))
        if self.steps < 1 or self.every < 1 or not self.rate > 0:
            raise refusal(ProbeError, f"{self!r}", "steps and every count steps, and a rate is positive", "pass steps=200, rate=0.02")
        source = _Texts.of(self.name, scope, data, work, self.task)
        usual = default_window(source.longest)
        sink, recent = usual[0] if self.sink is None else self.sink, usual[1] if self.recent is None else self.recent
        check_streaming(self.name, sink, recent, source.shortest)
        training = _Training(scope, self, sink, recent, source)
        with frozen(scope.model):
            starts = range(0, self.steps, self.every)
            for start in work.each(starts, "gates"):
                stop = min(start + self.every, self.steps)
                kept = work.unit(f"steps {start} to {stop}", partial(training.advance, start, stop))
                training.restore(kept)
        gates = training.by_head()
        numbers, notes = self._numbers(scope, training, sink, recent)
        tables = {"training": training.table()}
        return Findings({"duo_gate": gates}, numbers, [source.first.facts(self.steps)], tables, notes)

    def _numbers(self, scope: Scope, training: _Training, sink: int, recent: int) -> tuple[dict[str, float], list[str]]:
        last = training.losses[-max(len(training.losses) // 10, 1) :]
        found = {
            "duo_gates_above_half": float((training.gates > 0.5).double().mean()),
            "duo_distill": sum(row[0] for row in last) / len(last),
        }
        notes = [f"{training.source.first.task} task, sink {sink}, recent {recent}"]
        try:
            lost, whole = surrogate_sums(scope, training.source.first, sink, recent)
        except ProbeError as why:
            return found, [*notes, f"no rank agreement with duo_surrogate: {why}"]
        change = over_groups(scope, lost)
        error = share_of(change, over_groups(scope, whole))
        for name, values in (("duo_spearman_error", error), ("duo_spearman_change", change)):
            heads = [values[place, : module.heads : module.group] for place, module in enumerate(scope.topology.main)]
            found[name] = rank_agreement(torch.cat(heads), training.gates)
        return found, notes


def rank_agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two vectors, ties at their mean rank; NaN where either is constant."""
    ranks = [pd.Series(one.double().numpy()).rank() for one in (a, b)]
    return float(ranks[0].corr(ranks[1]))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter takes a gradient and the model is in eval mode; both are as before afterwards, whatever happened."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def final_hidden(scope: Scope, ids: Tensor) -> Tensor:
    """[N, d] hidden states behind the last norm, as the unembedding reads them. ProbeError for a model that gives none."""
    extra = {"use_cache": False} if "use_cache" in scope._forward_parameters else {}
    output = scope.model.base_model(input_ids=ids[None].to(scope.device), **extra)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, torch.Tensor):
        raise refusal(ProbeError, f"{type(scope.model).__name__}", "its base model gives no final hidden state", "name other probes")
    return hidden[0]


@dataclass(eq=False)
class _Texts:
    """The texts by step: drawn, of LENGTHS lengths, or the user's in turn."""

    first: PasskeyText
    shortest: int
    longest: int
    work: Work
    maker: PasskeyMaker | None = None
    given: list[PasskeyText] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, scope: Scope, data: Any, work: Work, task: str) -> _Texts:
        given = given_passkeys(name, data)
        if given is not None:
            lengths = [len(text) for text in given]
            return cls(given[0], min(lengths), max(lengths), work, given=given)
        maker = PasskeyMaker.of(scope, context_of(scope, work), task)
        shortest = maker.text(maker.context // 2, work.generator(2))
        return cls(maker.text(maker.context, work.generator(1, 0)), len(shortest), maker.context, work, maker)

    def at(self, step: int) -> PasskeyText:
        if self.maker is None:
            return self.given[step % len(self.given)]
        source = self.work.generator(3, step)
        low, high = self.maker.context // 2, self.maker.context
        length = low + (high - low) * int(torch.randint(LENGTHS, (), generator=source)) // (LENGTHS - 1)
        return self.maker.text(length, source)


@dataclass(eq=False)
class _Mixed:
    """The executor: a * full + (1 - a) * streaming for every gated module. `full`: the teacher's outputs by module, or None."""

    gates: dict[str, Tensor]
    sink: int
    recent: int
    full: dict[str, Tensor] | None

    def execute(self, call: AttentionCall) -> Tensor | None:
        gate = self.gates.get(call.module)
        if gate is None:
            return None
        near = streaming_output(call, self.sink, self.recent)
        full = full_output(call) if self.full is None else self.full[call.module]
        weight = gate.repeat_interleave(call.group).to(near.device)[:, None]
        wide = torch.promote_types(call.q.dtype, torch.float32)
        return (weight * full.to(wide) + (1 - weight) * near.to(wide)).to(call.q.dtype)


class _Training:
    """The gates of all layers in one vector, their optimiser, and the losses of every step."""

    def __init__(self, scope: Scope, probe: DuoGates, sink: int, recent: int, source: _Texts) -> None:
        self.scope, self.probe, self.sink, self.recent, self.source = scope, probe, sink, recent, source
        self.modules = scope.topology.main
        count = sum(module.kv_heads for module in self.modules)
        self.parameter = torch.ones(count, dtype=torch.float32, requires_grad=True)
        self.optimiser = torch.optim.AdamW([self.parameter], lr=probe.rate, weight_decay=0.0)
        self.losses: list[list[float]] = []

    @property
    def gates(self) -> Tensor:
        """[gates] float32, by layer and key head."""
        return self.parameter.detach()

    def advance(self, start: int, stop: int) -> dict[str, Any]:
        """Steps start..stop from the state that is there; the state after them."""
        losses = [self._step(step) for step in range(start, stop)]
        state = self.optimiser.state[self.parameter]
        moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
        return {"gates": self.gates.clone(), **moments, "steps": stop, "losses": losses}

    def restore(self, kept: dict[str, Any]) -> None:
        """Takes over a state that `advance` gave, its own or an earlier process's."""
        with torch.no_grad():
            self.parameter.copy_(kept["gates"])
        self.optimiser.state[self.parameter] = {
            "step": torch.tensor(float(kept["steps"])),
            "exp_avg": kept["exp_avg"].clone(),
            "exp_avg_sq": kept["exp_avg_sq"].clone(),
        }
        self.losses += kept["losses"]

    def _step(self, step: int) -> list[float]:
        text = self.source.at(step)
        rate = self.probe.rate * schedule(step, self.probe.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        with torch.enable_grad():
            distill, penalty = self._loss(text)
            (gradient,) = torch.autograd.grad(distill + penalty, [self.parameter])
        if not bool(gradient.isfinite().all()):
            raise refusal(ProbeError, f"step {step}", "the gradient of the gates is not finite", "load the model in float32 or bfloat16")
        self.parameter.grad = gradient
        self.optimiser.step()
        self.parameter.grad = None
        with torch.no_grad():
            self.parameter.clamp_(0.0, 1.0)
        return [float(distill.detach()), float(penalty.detach()), rate]

    def _loss(self, text: PasskeyText) -> tuple[Tensor, Tensor]:
        answer = text.answer.to(self.scope.device)
        with torch.no_grad(), record_heads(self.scope, sites=("z",)) as record:
            wanted = final_hidden(self.scope, text.ids)[answer]
        branch = None
        if self.probe.teacher == "branch":
            branch = {module.name: record.z(module.name) for module in self.modules}
        pieces = self.parameter.split([module.kv_heads for module in self.modules])
        gates = {module.name: piece for module, piece in zip(self.modules, pieces, strict=True)}
        with self.scope.executing(_Mixed(gates, self.sink, self.recent, branch)):
            mixed = final_hidden(self.scope, text.ids)[answer]
        wide = torch.promote_types(mixed.dtype, torch.float32)
        distill = (wanted.to(wide) - mixed.to(wide)).square().mean(-1).mean()
        return distill, (self.probe.penalty * self.parameter.abs().mean()).to(distill.device)

    def by_head(self) -> Tensor:
        """[L, H] float64: each head's gate."""
        pieces = self.gates.split([module.kv_heads for module in self.modules])
        return stack(piece.repeat_interleave(module.group) for piece, module in zip(pieces, self.modules, strict=True))

    def table(self) -> pd.DataFrame:
        """Losses and rate by step."""
        frame = pd.DataFrame(self.losses, columns=["distill", "penalty", "rate"])
        frame.insert(0, "step", range(len(frame)))
        return frame


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: up from .1 over the first fifth of the steps, down to .1 over the last."""
    edge = max(steps // 5, 1)
    return min(1.0, max((step + 1) / edge, 0.1), max((steps - step) / edge, 0.1))
