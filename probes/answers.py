"""A model's answer to a prompt, and what its heads looked at while they wrote it.

The row that writes generated token i stands at position N - 1 + i of the whole sequence (N the prompt's length): the first answer token is
written by the prompt's last row. Reading the row of the token itself instead, one later, is the silent failure here: it says where the
model looks after the token was written.

Two ways give the same numbers, by causality. "decode" reads every row in its own step, with the KV cache, as the model generates.
"teacher_forced" lets the model generate with nothing attached, and then reads all rows of the answer in one pass over prompt and answer.
Only the rows of the answer are computed, O(answer * N) per head; the model runs as it would without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.capture.verify import check_output, signature
from headscope.errors import CaptureError, refusal
from headscope.kernels.gather import _scores
from headscope.probes.rouge import rouge1_recall, words
from headscope.probes.trials import Trial

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope
    from headscope.topology import Topology

Mode = Literal["decode", "teacher_forced"]
MODES = ("decode", "teacher_forced")
Reading = Callable[["Tensor"], "Tensor"]
"""What to keep of rows: weights [H, rows, keys] float32, keys from position 0 on -> [H, rows, ...]."""
ENTRIES = 1 << 24
"""Weights computed at a time."""


@torch.no_grad()
def row_weights(call: AttentionCall, rows: Tensor) -> Tensor:
    """A of query rows (indices into q) of the first sequence: [H, len(rows), Nk] float32 (float64 where q is); hidden keys are 0."""
    heads, groups = call.q.shape[1], call.k.shape[1]
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    q = call.q[:1, :, rows].to(dtype).reshape(1, groups, call.group * len(rows), -1)
    products = (q @ call.k[:1].to(dtype).transpose(-1, -2)).view(1, heads, len(rows), -1)
    b = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=call.q.device)
    h = torch.arange(heads, device=call.q.device)[None, :, None, None]
    columns = torch.arange(call.k.shape[2], device=call.q.device)
    scores = _scores(call, products, b, h, rows[None, None, :, None], columns[None, None, None, :])
    lse = torch.logsumexp(scores, -1)
    if call.sink_logits is not None:
        lse = torch.logaddexp(lse, call.sink_logits.to(dtype)[:, None])
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])[0]


@dataclass(eq=False)
class RowReader:
    """Reads the rows of positions [first, end) of every layer of the main stack, whatever way the model is run. An observer of a scope."""

    topology: Topology
    first: int
    end: int
    read: Reading
    _rows: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    _checked: set[Any] = field(default_factory=set)

    def observe(self, call: AttentionCall, output: Tensor, host: Any, run: Any, state: Any) -> None:
        """Reads the wanted rows of a call; the first call of a kind is checked against the model's own output."""
        if call.layer is None or call.is_cross:
            return
        begin = max(self.first - call.query_offset, 0)
        stop = min(self.end - call.query_offset, call.q.shape[2])
        if begin >= stop:
            return
        if host.ran and signature(call) not in self._checked:
            check_output(call, output, {**host.kwargs, "attention_mask": host.mask})
            self._checked.add(signature(call))
        step = max(1, ENTRIES // (call.q.shape[1] * call.k.shape[2]))
        for part in torch.arange(begin, stop, device=call.q.device).split(step):
            weights = row_weights(call, part)
            if call.key_offset:  # a sliding cache has dropped the first keys
                weights = torch.nn.functional.pad(weights, (call.key_offset, 0))
            self._rows.setdefault(call.module, []).append((call.query_offset + int(part[0]), self.read(weights).cpu()))

    def forward_ended(self) -> None:
        """Nothing waits for the end of a pass."""

    def result(self, count: int) -> list[Tensor]:
        """Per layer [H, count, ...]: rows first .. first + count - 1. CaptureError when they are not all there."""
        out = []
        for module in self.topology.main:
            parts = sorted(self._rows.get(module.name, []), key=lambda one: one[0])
            whole = torch.cat([values for _, values in parts], 1) if parts else torch.zeros(module.heads, 0)
            starts = [place for place, _ in parts]
            ends = [place + values.shape[1] for place, values in parts]
            if whole.shape[1] < count or starts[:1] != [self.first] or starts[1:] != ends[:-1]:
                raise refusal(
                    CaptureError,
                    f"{module.name}: rows {self.first}..{self.first + count - 1}",
                    f"{whole.shape[1]} of them were seen, or one twice",
                    "generate greedily, one sequence at a time",
                )
            out.append(whole[:, :count])
        return out


@contextmanager
def reading(scope: Scope, first: int, end: int, read: Reading) -> Iterator[RowReader]:
    """Read the rows of positions [first, end) while the model runs in the block."""
    reader = RowReader(scope.topology, first, end, read)
    with scope._attachment.active("observer", reader):
        yield reader


@dataclass(frozen=True, eq=False)
class Answer:
    """`ids` [n] int64, what the model wrote; `text` of it; `recall`: ROUGE-1 recall of the trial's reference; `rows`: per layer what was
    read of the n rows that wrote it, [H, n, ...].
    """

    ids: Tensor
    text: str
    recall: float
    rows: list[Tensor]


def answer(scope: Scope, trial: Trial, read: Reading | None = None, *, mode: Mode = "decode", limit: int = 50, stem: bool = True) -> Answer:
    """The model's greedy answer of at most `limit` tokens, and what `read` keeps of the rows that wrote it (None: nothing)."""
    prompt = trial.ids[None].to(scope.device)
    first = len(trial.ids) - 1
    options: dict[str, Any] = {"max_new_tokens": limit, "stopping_criteria": [_ended(scope, trial)]}
    if read is None or mode == "teacher_forced":
        ids = scope.generate(prompt, **options).new_ids[0]
    else:
        with reading(scope, first, first + limit, read) as reader:
            ids = scope.generate(prompt, **options).new_ids[0]
    rows: list[Tensor] = []
    if read is not None:
        if mode == "teacher_forced":
            whole = torch.cat([trial.ids, ids[:-1]])[None].to(scope.device)
            with torch.no_grad(), reading(scope, first, first + len(ids), read) as reader:
                scope._run_once({"input_ids": whole})
        rows = reader.result(len(ids))
    return Answer(ids, *judged(scope, trial, ids, stem), rows)


def judged(scope: Scope, trial: Trial, ids: Tensor, stem: bool = True) -> tuple[str, float]:
    """(text, ROUGE-1 recall) of an answer: over words where the trial has a reference in words, else over ids."""
    if scope.tokenizer is None or not trial.reference:
        wanted = trial.ids[slice(*trial.answer)].tolist()
        return " ".join(str(one) for one in ids.tolist()), rouge1_recall(wanted, ids.tolist())
    text = str(scope.text_tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    return text, rouge1_recall(words(trial.reference, stem=stem), words(text, stem=stem))


def _ended(scope: Scope, trial: Trial) -> Callable[..., Tensor]:
    """The stopping criterion of a trial: one of its ids, or its text behind something that is not blank."""
    start = len(trial.ids)
    stops = set(trial.stop_ids)

    def ended(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        done = int(ids[0, -1]) in stops
        if trial.stop and scope.tokenizer is not None and not done:
            done = trial.stop in str(scope.text_tokenizer.decode(ids[0, start:].tolist(), skip_special_tokens=True)).lstrip()
        return torch.full((ids.shape[0],), done, dtype=torch.bool, device=ids.device)

    return ended
