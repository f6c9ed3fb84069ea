"""Soft injection: which heads carry a task that was learnt from examples?

A question without examples must not stand first in its prompt. Many models keep the first token as a resting place for attention, and what
stands there can hardly be read. Asked as "hot ->", where no token that begins a text is put in front, a model that answers nearly every
question with ten examples answered a tenth to a fifth with the task injected; asked as "Q: hot", it answered as with examples. Nothing in
the numbers says why, so the form is a setting, and its default has words before the question, as the authors' prompts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import DataError, ProbeError, refusal, unknown_name
from headscope.interventions.base import Intervention
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import not_readable
from headscope.probes.contrast import last_logits
from headscope.probes.icl_tasks import ICL_TASKS
from headscope.probes.ov_copying import why_no_unembedding

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.active import Unit
    from headscope.scope import Scope

Pair = tuple[str, str]
FEWEST_PAIRS = 12
FIRST = "a prompt begins with its question, and many models can hardly read their first token: form='qa' puts words before it"
BATCH = 16
"""Most prompts of one length that are answered together."""
FORMS: dict[str, tuple[str, str]] = {"qa": ("Q: {}\nA:", "\n\n"), "arrow": ("{} ->", "\n")}
"""How a question is asked, and what stands between an answer and the next question; a blank and the answer follow the question."""


@dataclass(frozen=True)
class SoftInjection(ActiveProbe):
    """A gate per head, trained so that the mean activations of a task, mixed in, replace its examples.

    t_h is the mean over `prompts` prompts with `shots` examples of head h's output before W_O at the last token. In a prompt without
    examples the last token's output becomes z = (1 - a_h) z + a_h t_h, a = sigmoid(logit), all 0.5 at the start; Adam (learning rate
    `rate`, `steps` steps, one prompt a step) lowers the cross entropy of the answer's first token. Every `every` steps the gates are
    validated on pairs that are not trained on, and the best ones are kept.

    soft_gate = a. High: the head's activations carry the task; low: the prompt's own are needed. The numbers compare, on test pairs that
    neither examples nor training nor validation saw: accuracy without examples, with examples, with the gates, and with the gates and the
    means of `control`, another task, which should do nothing. The table "validation" has the loss at each check.

    Data: `task` "opposites", "capitals", "past" or "plurals" (pairs of words written by us), "capitalize", "first_letter",
    "first_of_three" or "last_of_three" (made of nouns), or your own list of (question, answer) pairs. `form` "qa" asks "Q: hot", newline,
    "A:", as the official code does; "arrow" asks "hot ->", which is for models that begin every text with a token of its own.
    Departures: the official code never updates its best loss, so that it keeps the gates validated last, and it multiplies by W_O itself,
    which drops a bias; neither happens here.
    """

    task: str = "opposites"
    shots: int = 10
    prompts: int = 50
    steps: int = 400
    every: int = 50
    rate: float = 0.2
    control: str = "plurals"
    form: str = "qa"

    name: ClassVar[str] = "soft_injection"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("soft_gate", "gate", "carries the task that examples teach"),)
    data: ClassVar[str] = "pairs of words"
    requires: ClassVar[tuple[str, ...]] = ("text", "tokenizer", "causal", "unembedding")
    cost: ClassVar[str] = "50 forward passes with examples, then 400 forward and backward passes without"
    source: ClassVar[str] = "Soft Injection of Task Embeddings, arXiv:2507.20906, SNU-DRL/Soft_Injection"

    def __post_init__(self) -> None:
        for field in ("task", "control"):
            if getattr(self, field) not in ICL_TASKS:
                raise unknown_name(ProbeError, f"{field} of probe {self.name!r}", getattr(self, field), ICL_TASKS)
        if self.form not in FORMS:
            raise unknown_name(ProbeError, f"form of probe {self.name!r}", self.form, FORMS)
        if min(self.shots, self.prompts, self.steps, self.every) < 1 or self.rate <= 0 or self.steps % self.every:
            given = f"shots={self.shots}, prompts={self.prompts}, steps={self.steps}, every={self.every}, rate={self.rate}"
            raise refusal(ProbeError, given, "all are positive and steps is a multiple of every", "pass e.g. steps=400, every=50")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope) or why_no_unembedding(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        import pandas as pd

        pairs = given_pairs(data) if data is not None else ICL_TASKS[self.task]
        parts = split(pairs, self.shots, work)
        few = work.unit("few shot", lambda: self._score(scope, parts["test"], parts["train"], None, work))
        if float(few["accuracy"]) == 0:
            said = f"it solves none of {len(parts['test'])} questions with {self.shots} examples: {few['said']}"
            raise refusal(ProbeError, f"probe {self.name!r} on {scope.name}", said, "choose a task that it can do from examples")
        means = work.unit("means", lambda: {"means": self._means(scope, parts["train"], work, 1)})["means"]
        other = ICL_TASKS[self.control]
        against = work.unit("control means", lambda: {"means": self._means(scope, other, work, 2)})["means"]
        logits, checks = self._optimise(scope, parts, means, work)
        none = work.unit("zero shot", lambda: self._score(scope, parts["test"], (), None, work))
        soft = work.unit("injected", lambda: self._score(scope, parts["test"], (), Injection(logits, means, offsets(scope)), work))
        wrong = work.unit("control", lambda: self._score(scope, parts["test"], (), Injection(logits, against, offsets(scope)), work))
        gates = torch.sigmoid(logits)
        counts = [module.heads for module in scope.topology.main]
        best = min(checks, key=lambda row: row[1])
        return Findings(
            {"soft_gate": stack(gates.split(counts))},
            numbers={
                "accuracy_zero_shot": float(none["accuracy"]),
                "accuracy_few_shot": float(few["accuracy"]),
                "accuracy_injected": float(soft["accuracy"]),
                "accuracy_control": float(wrong["accuracy"]),
                "loss_zero_shot": float(none["loss"]),
                "loss_few_shot": float(few["loss"]),
                "loss_injected": float(soft["loss"]),
                "loss_control": float(wrong["loss"]),
                "best_step": float(best[0]),
                "gates_above_half": float((gates > 0.5).sum()),
            },
            data=[self._fact(scope, pairs)],
            tables={"validation": pd.DataFrame(checks, columns=["step", "loss"])},
            notes=[FIRST] if len({int(encoded(scope, pair, [], self.form)[0][0]) for pair in pairs}) > 1 else [],
        )

    # ---- parts --------------------------------------------------------------------------------------------------

    def _means(self, scope: Scope, pairs: Sequence[Pair], work: Work, stream: int) -> Tensor:
        """[heads, Dv] float64: mean z at the last token over prompts with examples."""
        from headscope.interventions.record import record_heads

        draw = work.generator(stream)
        total: Tensor | None = None
        for number in work.each(range(self.prompts), "task means"):
            question = pairs[number % len(pairs)]
            ids, _ = encoded(scope, question, examples(pairs, question, self.shots, draw), self.form)
            with torch.no_grad(), record_heads(scope, sites=("z",)) as record:
                last_logits(scope, [ids])
            listed = [record.z(layer)[0, -1].double().cpu() for layer in scope.topology.layers]
            if len({one.shape[1] for one in listed}) > 1:
                raise refusal(ProbeError, scope.name, "its layers have heads of different widths", "name other probes")
            one = torch.cat(listed)
            total = one if total is None else total + one
        assert total is not None
        return total / self.prompts

    def _optimise(self, scope: Scope, parts: dict[str, list[Pair]], means: Tensor, work: Work) -> tuple[Tensor, list[tuple[int, float]]]:
        """The best validated logits [heads] float64, and (step, validation loss) of every check."""
        state: Unit = {name: torch.zeros(len(means), dtype=torch.float64) for name in ("logits", "exp_avg", "exp_avg_sq")}
        best, best_loss = state["logits"], float("inf")
        checks: list[tuple[int, float]] = []
        for number in work.each(range(self.steps // self.every), "gates"):
            state = work.unit(f"steps {number}", partial(self._chunk, scope, parts, means, work, state, number))
            checks.append(((number + 1) * self.every, float(state["loss"])))
            if checks[-1][1] < best_loss:
                best, best_loss = state["logits"], checks[-1][1]
        return best, checks

    def _chunk(self, scope: Scope, parts: dict[str, list[Pair]], means: Tensor, work: Work, before: Unit, number: int) -> Unit:
        """`every` steps from a state, and the validation after them."""
        logits = before["logits"].clone().requires_grad_(True)
        adam = torch.optim.Adam([logits], lr=self.rate)
        if number:
            moments = {name: before[name].clone() for name in ("exp_avg", "exp_avg_sq")}
            adam.state[logits] = {"step": torch.tensor(float(number * self.every)), **moments}
        draw = work.generator(3, number)
        train = parts["train"]
        for _ in range(self.every):
            question = train[int(torch.randint(len(train), (1,), generator=draw))]
            (logits.grad,) = torch.autograd.grad(injected_loss(scope, question, logits, means, self.form), [logits])
            adam.step()
        kept = adam.state[logits]
        done = logits.detach().clone()
        check = self._score(scope, parts["validation"], (), Injection(done, means, offsets(scope)), work)
        return {"logits": done, "exp_avg": kept["exp_avg"], "exp_avg_sq": kept["exp_avg_sq"], "loss": check["loss"]}

    def _score(self, scope: Scope, asked: Sequence[Pair], shown: Sequence[Pair], injection: Injection | None, work: Work) -> Unit:
        """Accuracy and mean cross entropy of the first answer token, with examples from `shown`; one thing that was said."""
        draw = work.generator(4)
        prompts = [encoded(scope, one, examples(shown, one, self.shots, draw) if shown else [], self.form) for one in asked]
        right, losses, said = 0, 0.0, ""
        for listed in alike([ids for ids, _ in prompts]):
            with torch.no_grad():
                logits = run(scope, [prompts[place][0] for place in listed], injection).double().cpu()
            answers = torch.tensor([prompts[place][1] for place in listed])
            losses += float(torch.nn.functional.cross_entropy(logits, answers, reduction="sum"))
            guesses = logits.argmax(-1)
            right += int((guesses == answers).sum())
            for place, guess, answer in zip(listed, guesses.tolist(), answers.tolist(), strict=True):
                if guess != answer and not said:
                    decode = scope.text_tokenizer.decode
                    said = f"{asked[place][0]!r} -> {decode([guess])!r} where {decode([answer])!r} was right"
        return {"accuracy": right / len(asked), "loss": losses / len(asked), "said": said}

    def _fact(self, scope: Scope, pairs: Sequence[Pair]) -> dict[str, Any]:
        from headscope.profile.journal import digest

        tokens = max(len(encoded(scope, pair, [], self.form)[0]) for pair in pairs)
        return {"name": self.task, "kind": self.data, "sha256": digest(list(pairs)), "sequences": len(pairs), "tokens": tokens}


@dataclass(frozen=True)
class Injection(Intervention):
    """z := (1 - a) z + a t at the last token of a prefill, for every head of the main stack. `logits` [heads] of the gates a, `means`
    [heads, Dv], `rows` module -> its first and last place in both; differentiable in the logits.
    """

    logits: Any
    means: Any
    rows: Any

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        where = self.rows.get(call.module)
        if where is None or call.query_offset:
            return output
        gate = torch.sigmoid(self.logits[where[0] : where[1]]).to(output)[:, None]
        mean = self.means[where[0] : where[1]].to(output)
        last = output[:, -1:]
        return torch.cat([output[:, :-1], last + gate * (mean - last)], 1)


def offsets(scope: Scope) -> dict[str, tuple[int, int]]:
    """Module -> (first, end) of its heads in one list of all heads."""
    out, first = {}, 0
    for module in scope.topology.main:
        out[module.name] = (first, first + module.heads)
        first += module.heads
    return out


def run(scope: Scope, ids: Sequence[Tensor], injection: Injection | None) -> Tensor:
    """Logits [n, V] after prompts of one length, under an injection."""
    if injection is None:
        return last_logits(scope, ids)
    with scope.intervene(injection):
        return last_logits(scope, ids)


def alike(prompts: Sequence[Tensor], most: int = BATCH) -> list[list[int]]:
    """Places of prompts of one length, at most `most` together, in the order in which the lengths come."""
    lengths: dict[int, list[int]] = {}
    for place, ids in enumerate(prompts):
        lengths.setdefault(len(ids), []).append(place)
    return [listed[first : first + most] for listed in lengths.values() for first in range(0, len(listed), most)]


def injected_loss(scope: Scope, question: Pair, logits: Tensor, means: Tensor, form: str = "qa") -> Tensor:
    """Cross entropy of the answer's first token after the question alone, differentiable in the gates' logits [heads]."""
    ids, answer = encoded(scope, question, [], form)
    with torch.enable_grad():
        out = run(scope, [ids], Injection(logits, means, offsets(scope)))
        out = out.float() if out.dtype != torch.float64 else out
        return torch.nn.functional.cross_entropy(out, torch.tensor([answer], device=out.device))


def encoded(scope: Scope, question: Pair, shown: Sequence[Pair], form: str = "qa") -> tuple[Tensor, int]:
    """(ids [N] of the prompt, id of the answer's first token). ProbeError where text and answer share a token, or do not fit the model."""
    ask, between = FORMS[form]
    begin = "".join(f"{ask.format(asked)} {answer}{between}" for asked, answer in shown) + ask.format(question[0])
    prompt = scope.encode(begin)[0].cpu()
    whole = scope.encode(f"{begin} {question[1]}")[0].cpu()
    if len(whole) <= len(prompt) or not torch.equal(whole[: len(prompt)], prompt):
        raise refusal(
            ProbeError, f"{question[0]!r} -> {question[1]!r}", "the tokenizer of this model joins question and answer", "pass other pairs"
        )
    limit = scope.max_length
    if limit is not None and len(prompt) > limit:
        raise refusal(ProbeError, f"a prompt of {len(prompt)} tokens", f"{scope.name} was made for {limit}", "use fewer shots")
    return prompt, int(whole[len(prompt)])


def examples(pairs: Sequence[Pair], question: Pair, shots: int, draw: torch.Generator) -> list[Pair]:
    """`shots` different pairs, none of them the question."""
    others = [pair for pair in pairs if pair != question]
    return [others[i] for i in torch.randperm(len(others), generator=draw)[:shots].tolist()]


def split(pairs: Sequence[Pair], shots: int, work: Work) -> dict[str, list[Pair]]:
    """Half of the pairs to train on and to show, a quarter to validate, a quarter to test. ProbeError for too few."""
    if len(pairs) < FEWEST_PAIRS or len(pairs) // 2 <= shots:
        why = f"half of them are shown as {shots} examples, and {FEWEST_PAIRS} pairs are the least"
        raise refusal(ProbeError, f"{len(pairs)} pairs", why, "pass more pairs, or fewer shots")
    order = [pairs[i] for i in torch.randperm(len(pairs), generator=work.generator(0)).tolist()]
    half, rest = len(pairs) // 2, 3 * len(pairs) // 4
    return {"train": order[:half], "validation": order[half:rest], "test": order[rest:]}


def given_pairs(data: Any) -> tuple[Pair, ...]:
    """The user's (question, answer) pairs; DataError for anything else."""
    fits = isinstance(data, Sequence) and not isinstance(data, str)
    listed = [tuple(one) if isinstance(one, Sequence) and not isinstance(one, str) else () for one in data] if fits else []
    if not listed or any(len(one) != 2 or not all(isinstance(text, str) and text.strip() for text in one) for one in listed):
        raise refusal(DataError, f"a {type(data).__name__} as pairs", "a pair is a question and an answer", 'pass [("hot", "cold"), ...]')
    return tuple((str(one[0]), str(one[1])) for one in dict.fromkeys(listed))
