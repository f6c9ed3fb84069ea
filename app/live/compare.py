"""What the model writes with its heads changed, beside what it writes without.

Two texts that differ say little: one token that tips over changes everything after it. So the distributions of the first new token are
compared as well, and the plain continuation is read again by the changed model, token by token: its mean log probability under both says
how much the change matters wherever the texts went.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headscope.app.live.watch import watching
from headscope.errors import DataError, refusal

if TYPE_CHECKING:
    import torch

    from headscope.app.live.owner import Job
    from headscope.interventions import Stack
    from headscope.scope import Scope

MOST_NEW = 256
TOP = 8


@dataclass(frozen=True)
class NextToken:
    """A candidate for the first new token and its probability without and with the change."""

    piece: str
    plain: float
    changed: float


@dataclass(frozen=True)
class Comparison:
    """`plain`, `changed`: pieces of the new tokens. `first`: place of the first that differs, None when none does. `kl`: KL(plain ||
    changed) of the first new token, nats. `log_p`: mean natural log probability of the plain continuation without and with the change.
    `explanation`: what was changed, in words.
    """

    prompt: tuple[str, ...]
    plain: tuple[str, ...]
    changed: tuple[str, ...]
    first: int | None
    kl: float
    log_p: tuple[float, float]
    candidates: tuple[NextToken, ...]
    explanation: str


def compare_writing(prompt: str, stack: Stack, new_tokens: int) -> Callable[[Scope, Job], Comparison]:
    """Work that writes `new_tokens` after `prompt`, greedily, without and with `stack`. DataError for a length out of range."""
    if not 1 <= new_tokens <= MOST_NEW:
        raise refusal(DataError, f"{new_tokens} new tokens", f"the page writes 1 to {MOST_NEW}", "ask for fewer")

    def work(scope: Scope, job: Job) -> Comparison:
        import torch

        ids = scope.encode(prompt)
        length = int(ids.shape[1])
        room = scope.max_length
        if room is not None and length + new_tokens > room:
            raise refusal(DataError, f"{length} + {new_tokens} tokens", f"{scope.name} reads {room}", "shorten the prompt")
        stack.check(scope)
        with watching(scope, job, passes=2 * new_tokens + 2):
            plain = scope.generate(ids, max_new_tokens=new_tokens)
            with scope.intervene(*stack):
                changed = scope.generate(ids, max_new_tokens=new_tokens)
            read = plain.ids.to(scope.device)
            before = _log_p(scope, read, length, None)
            after = _log_p(scope, read, length, stack)
        target = read[0, length:, None].cpu()
        means = [float(one.gather(1, target).mean()) for one in (before, after)]
        first_plain, first_changed = before[0].exp(), after[0].exp()
        best = torch.unique(torch.cat([first_plain.topk(TOP).indices, first_changed.topk(TOP).indices]))
        best = best[first_plain[best].argsort(descending=True)]
        last = int(ids[0, -1])
        names = [_pieces(scope, [last, at])[1] for at in best.tolist()]
        one, two = plain.new_ids[0].tolist(), changed.new_ids[0].tolist()
        return Comparison(
            prompt=_pieces(scope, ids[0].tolist()),
            plain=_pieces(scope, plain.ids[0].tolist())[length:],
            changed=_pieces(scope, changed.ids[0].tolist())[length:],
            first=next((at for at in range(max(len(one), len(two))) if one[at : at + 1] != two[at : at + 1]), None),
            kl=float((first_plain * (before[0] - after[0])).nan_to_num().sum()),
            log_p=(means[0], means[1]),
            candidates=tuple(
                NextToken(name, float(first_plain[at]), float(first_changed[at])) for name, at in zip(names, best.tolist(), strict=True)
            ),
            explanation=stack.explain(),
        )

    return work


def _log_p(scope: Scope, ids: torch.Tensor, length: int, stack: Stack | None) -> torch.Tensor:
    """[n, vocabulary] float64 log probabilities of the tokens after the first `length`."""
    import torch

    edit: Any = nullcontext() if stack is None else scope.intervene(*stack)
    with edit, torch.no_grad():
        logits = scope.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, length - 1 : -1].double().log_softmax(-1).cpu()


def _pieces(scope: Scope, ids: list[int]) -> tuple[str, ...]:
    from headscope.probes.text import token_pieces

    return token_pieces(scope.text_tokenizer, ids)
