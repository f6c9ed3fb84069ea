"""Responses of a model to prompts, and their attention statistics over the response's rows.

The response is generated with whatever kernel the model runs, then prompt and response are read in one teacher-forced pass. By causality
each row is the row of the decode step that wrote it, so nothing is lost; `mode="decode"` reads the steps themselves, and shows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.errors import ProbeError, refusal
from headscope.interventions.running import outputs_of
from headscope.probes.text import sentence_segments, special_ids, token_pieces

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics

Mode = Literal["teacher_forced", "decode"]
MODES = ("teacher_forced", "decode")
PROMPTS = (
    "A farmer has 17 sheep and sells 5 of them. Then she buys twice as many as she sold. How many sheep does she have? Think step by step.",
    "Why does bread rise in the oven? Explain it step by step to a child.",
    "A train leaves at 9:40 and arrives at 12:05. It stops twice for 10 minutes. How long does it move? Think step by step.",
    "Give three reasons why bridges are built as arches, with one sentence on each.",
)
LEAST = 8
"""Tokens of the shortest response that has a rhythm at all."""


@dataclass(frozen=True, eq=False)
class Response:
    """`ids` [N] int64, the prompt and then the response; `first`: where the response begins; `prompt`: its words."""

    ids: Tensor
    first: int
    prompt: str = ""

    @property
    def rows(self) -> Tensor:
        """Bool [N]: rows of response tokens."""
        return torch.arange(len(self.ids)) >= self.first


def prompt_ids(scope: Scope, prompt: Any) -> Tensor:
    """[n] ids of a prompt: text through the chat template where there is one, ids as they are."""
    if isinstance(prompt, str):
        if getattr(scope.text_tokenizer, "chat_template", None):
            told = scope.text_tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            return torch.tensor(scope.text_tokenizer(told, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        return scope.encode(prompt)[0].cpu()
    ids = torch.as_tensor(prompt)
    if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
        raise refusal(ProbeError, f"a prompt of shape {list(ids.shape)}", "a prompt is text or ids [n]", "pass str or a LongTensor")
    return ids.long().cpu()


def prompts_of(scope: Scope, data: Any) -> list[tuple[Any, Any]]:
    """(prompt, response or None) from `data`: None (our prompts), a text, a list of texts or ids, or of (prompt, response) pairs."""
    if data is None:
        return [(prompt, None) for prompt in PROMPTS]
    listed = [data] if isinstance(data, str | torch.Tensor) else data
    if not isinstance(listed, Sequence) or not listed:
        raise refusal(ProbeError, f"data: a {type(data).__name__}", "it is no list of prompts", "pass ['...'] or [(prompt, response)]")
    return [(one[0], one[1]) if isinstance(one, tuple) and len(one) == 2 else (one, None) for one in listed]


def respond(
    scope: Scope, prompt: Any, response: Any, *, tokens: int, temperature: float | None, source: torch.Generator, limit: int | None
) -> Response:
    """The response to a prompt: the one given, or the model's own, without its end-of-text. ProbeError when it is too short, or when the
    context has no room for it.
    """
    ids = prompt_ids(scope, prompt)
    words = prompt if isinstance(prompt, str) else f"{len(ids)} ids"
    room = min(limit or scope.max_length or 1 << 30, scope.max_length or 1 << 30)
    if response is not None:
        more = scope.text_tokenizer(response, add_special_tokens=False)["input_ids"] if isinstance(response, str) else response
        whole = torch.cat([ids, torch.as_tensor(more, dtype=torch.int64).cpu()])
    else:
        if len(ids) + LEAST > room:
            raise refusal(
                ProbeError,
                f"a prompt of {len(ids)} tokens in a context of {room}",
                f"no room is left for a response of at least {LEAST}",
                "use a longer context, or a shorter prompt",
            )
        options: dict[str, Any] = {"do_sample": False}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(source.initial_seed())
            made = scope.generate(ids[None].to(scope.device), max_new_tokens=min(tokens, room - len(ids)), **options)
        whole = unended(scope, made.ids[0], len(ids))
    if len(whole) - len(ids) < LEAST:
        said = scope.text_tokenizer.decode(whole[len(ids) :].tolist()) if scope.tokenizer is not None else whole[len(ids) :].tolist()
        raise refusal(
            ProbeError,
            f"the response to {words[:60]!r}",
            f"it has {len(whole) - len(ids)} tokens ({said!r}) and {LEAST} are the least that have a rhythm",
            "ask for something longer, or pass (prompt, response)",
        )
    if len(whole) > room:
        raise refusal(
            ProbeError, f"prompt and response of {len(whole)} tokens", f"the context is {room}", "use a longer context or a shorter text"
        )
    return Response(whole, len(ids), words)


def unended(scope: Scope, ids: Tensor, first: int) -> Tensor:
    """ids [n] without the end-of-text tokens behind position `first`, when the text ends in such."""
    ends = getattr(scope.model.generation_config, "eos_token_id", None)
    known = set(ends if isinstance(ends, list) else [ends])
    stop = len(ids)
    while stop > first and int(ids[stop - 1]) in known:
        stop -= 1
    return ids[:stop]


def read(scope: Scope, response: Response, mode: Mode, **request: Any) -> HeadStatistics:
    """Statistics over prompt and response, columns and maps over the response's rows only."""
    if mode == "decode":
        prompt, count = response.ids[: response.first], len(response.ids) - response.first
        stats = scope.capture(prompt[None], generate=count, rows=response.rows, **request)
        if stats.tokens is not None and not torch.equal(stats.tokens[0].cpu(), response.ids):
            raise refusal(
                ProbeError,
                f"decode steps of {response.prompt[:40]!r}",
                "the model wrote another text the second time, so this response is not its greedy one",
                "use mode='teacher_forced'",
            )
        return stats
    return scope.capture(response.ids[None], rows=response.rows, **request)


def surprise(scope: Scope, response: Response) -> Tensor:
    """[n] float64: entropy in nats of the distribution that each response token was drawn from (at temperature 1)."""
    inputs: dict[str, Any] = {"input_ids": response.ids[None].to(scope.device)}
    count = len(response.ids) - response.first
    if "logits_to_keep" in scope._forward_parameters:
        inputs["logits_to_keep"] = count + 1
    logits = outputs_of(scope, inputs)[0, -count - 1 : -1]
    out = []
    for part in logits.split(64):
        log = part.double().log_softmax(-1)
        out.append(-(log.exp() * log).sum(-1))
    return torch.cat(out).cpu()


def sentences(scope: Scope, response: Response) -> tuple[Tensor, tuple[str, ...]]:
    """(sentence number of every token [N], -1 in the prompt; the response's tokens as text)."""
    pieces = token_pieces(scope.tokenizer, response.ids.tolist())[response.first :]
    starts = [0]
    for piece in pieces[:-1]:
        starts.append(starts[-1] + len(piece))
    marks = special_ids(scope.text_tokenizer)
    special = [int(one) in marks for one in response.ids[response.first :]]
    numbers = sentence_segments("".join(pieces), starts, special=special)
    return torch.cat([torch.full((response.first,), -1, dtype=torch.int64), numbers]), pieces


__all__ = [
    "LEAST",
    "MODES",
    "PROMPTS",
    "Mode",
    "Response",
    "prompt_ids",
    "prompts_of",
    "read",
    "respond",
    "sentences",
    "surprise",
    "unended",
]
