"""What streaming costs a head's output, in one pass: a stand-in for DuoAttention's trained gates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.circuits import head_weights
from headscope.errors import CaptureError, ProbeError
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import check_streaming, context_of, each_call, not_readable, streaming_rows
from headscope.probes.passkeys import PasskeyMaker, PasskeyText

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope


@dataclass(frozen=True)
class DuoSurrogate(ActiveProbe):
    """How much of a head's output is lost when it sees a few first keys and a recent window only.

    `duo_error` = sum over rows of ||(o_full - o_stream) W_O^h||^2 / sum over rows of ||o_full W_O^h||^2, over the rows of a passkey text's
    questions and answers. o_stream is exact: the softmax of the row's scores over the first `sink` and the `recent` latest keys.
    DuoAttention trains a gate per key head for the same question; this asks it of each head alone, without an optimiser. 0: nothing is
    lost; 1: as much as the output itself is; above 1 the streaming output is longer than the full one. `duo_change` is the numerator alone,
    per row: what the residual stream would notice. The probe `duo_gates` reports the rank agreement of both with its gates; a head that
    writes little loses a large share of it cheaply, so in a deep model `duo_change` is the one that agrees.

    Parameters: `sink`, `recent` (None: context / 16 up to 128 and context / 8 up to 256, DuoAttention's own from 2,048 tokens on); `texts`;
    `task` (see `headscope.probes.passkeys`).

    Departures: not a method of the paper. Sums over rows, not a mean of the rows' ratios: rows whose output is near 0 (heads that rest on
    the first key) would dominate that. Cost: one forward pass per text, and a small attention of the answer rows.
    """

    sink: int | None = None
    recent: int | None = None
    texts: int = 1
    task: str = "auto"

    name: ClassVar[str] = "duo_surrogate"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("duo_error", "share of the output's energy", "streaming changes what this head writes", (0.0, None)),
        Metric("duo_change", "squared length in the stream", "streaming this head changes the residual stream", (0.0, None)),
        Metric(
            "duo_error_group", "share of the output's energy", "streaming changes what this key head's group writes", (0.0, None), "kv_head"
        ),
        Metric(
            "duo_change_group", "squared length in the stream", "streaming this group changes the residual stream", (0.0, None), "kv_head"
        ),
    )
    data: ClassVar[str] = "passkeys"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass, and small attention on the answer rows"
    source: ClassVar[str] = "headscope, after DuoAttention, arXiv:2410.10819, mit-han-lab/duo-attention"

    def unfit(self, scope: Scope) -> str | None:
        missing = next((module.name for module in scope.topology.main if module.output is None), None)
        return super().unfit(scope) or not_readable(scope) or (f"{missing} has no output projection W_O" if missing else None)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        sink, recent, texts = streaming_setup(self.name, scope, data, work, self.sink, self.recent, self.task, self.texts)
        lost = whole = torch.zeros((), dtype=torch.float64)
        rows = 0
        for number in work.each(range(len(texts)), "streaming error"):
            found = work.unit(f"text {number}", partial(_unit, scope, texts[number], sink, recent))
            lost, whole = lost + found["lost"], whole + found["whole"]
            rows += int(texts[number].answer.sum())
        scores = {"duo_error": share_of(lost, whole), "duo_change": lost / rows}
        lost, whole = over_groups(scope, lost), over_groups(scope, whole)
        scores |= {"duo_error_group": share_of(lost, whole), "duo_change_group": lost / rows}
        return Findings(scores, data=[texts[0].facts(len(texts))], notes=[f"{texts[0].task} task, sink {sink}, recent {recent}"])


def _unit(scope: Scope, text: PasskeyText, sink: int, recent: int) -> dict[str, Any]:
    lost, whole = surrogate_sums(scope, text, sink, recent)
    return {"lost": lost, "whole": whole}


def share_of(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; a head that writes nothing has lost what streaming makes it write."""
    return torch.where(whole == 0, part, part / whole)


def over_groups(scope: Scope, values: Tensor) -> Tensor:
    """[L, H] -> [L, H]: each head's value replaced by the sum over the heads that share its key head."""
    out = values.clone()
    for place, module in enumerate(scope.topology.main):
        row = values[place, : module.heads].view(module.kv_heads, module.group).sum(1)
        out[place, : module.heads] = row.repeat_interleave(module.group)
    return out


def default_window(context: int) -> tuple[int, int]:
    """(sink, recent): DuoAttention's 128 and 256 from 2,048 tokens on, as much of a shorter context below."""
    return max(min(128, context // 16), 1), max(min(256, context // 8), 1)


def streaming_setup(
    name: str, scope: Scope, data: Any, work: Work, sink: int | None, recent: int | None, task: str, count: int
) -> tuple[int, int, list[PasskeyText]]:
    """Sink, recent and `count` texts (or those given as `data`), checked."""
    texts = given_passkeys(name, data)
    if texts is None:
        maker = PasskeyMaker.of(scope, context_of(scope, work), task)
        texts = [maker.text(maker.context, work.generator(1, number)) for number in range(max(count, 1))]
        usual = default_window(maker.context)
    else:
        usual = default_window(max(len(text) for text in texts))
    shortest = min(len(text) for text in texts)
    chosen = (usual[0] if sink is None else sink, usual[1] if recent is None else recent)
    check_streaming(name, *chosen, shortest)
    return *chosen, texts


def given_passkeys(name: str, data: Any) -> list[PasskeyText] | None:
    """The user's PasskeyTexts, or None when none were given."""
    if data is None:
        return None
    listed = [data] if isinstance(data, PasskeyText) else list(data) if isinstance(data, list | tuple) else []
    if not listed or not all(isinstance(one, PasskeyText) for one in listed):
        raise ProbeError(f"data for probe {name!r}: it reads texts with marked answers; pass PasskeyTexts, or none")
    return listed


@torch.no_grad()
def surrogate_sums(scope: Scope, text: PasskeyText, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """(sum of ||(o_full - o_stream) W_O||^2, sum of ||o_full W_O||^2), [L, H] float64 each, over the answer rows of one text."""
    lost: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    rows = text.answer.nonzero().flatten()
    start, stop = int(rows[0]), int(rows[-1]) + 1
    outputs = {module.name: _weights(scope, module.layer) for module in scope.topology.main}

    def see(call: AttentionCall, output: Tensor) -> None:
        full = output[0, start:stop].transpose(0, 1).double()[:, rows.to(output.device) - start]
        near = streaming_rows(call, start, stop, sink, recent)[0].double()[:, rows.to(output.device) - start]
        o = outputs[call.module].to(full)
        lost[call.module] = ((full - near) @ o).square().sum((1, 2)).cpu()
        whole[call.module] = (full @ o).square().sum((1, 2)).cpu()

    each_call(scope, text.ids, see)
    order = [module.name for module in scope.topology.main]
    return stack(lost[name] for name in order), stack(whole[name] for name in order)


def _weights(scope: Scope, layer: int | None) -> Tensor:
    """[Hq, Dv, d] W_O by head."""
    try:
        return head_weights(scope, layer if layer is not None else "").o
    except CaptureError as error:
        raise ProbeError(f"streaming error on {scope.name}: {error}") from None
