"""What a plan's executor asks before it acts: what a pattern means in a phase, and whether a freeing cache may serve a call or a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import Budget, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_rules import Choosing
from headscope.plans.indices import Chosen
from headscope.plans.patterns import Dense, Pattern

if TYPE_CHECKING:
    from headscope.call import AttentionCall
    from headscope.scope import Scope


def phase(pattern: Pattern, decode: bool) -> Pattern:
    """What a pattern means in this phase: prefill-only rules decode dense, decode-only rules prefill dense."""
    prefill_only = isinstance(pattern, VerticalSlash | TopBlocks | Choosing)
    decode_only = isinstance(pattern, Budget | TopKeys)
    return Dense() if (decode and prefill_only) or (not decode and decode_only) else pattern


def as_chosen(pattern: Pattern) -> Chosen:
    assert isinstance(pattern, Chosen)
    return pattern


def refuse_holes(call: AttentionCall) -> None:
    """A freeing cache knows where a text starts, and nothing of tokens that are hidden in its middle or at its end."""
    valid = call.mask.key_valid
    if valid is None or call.q.shape[2] == 1:
        return
    start = torch.zeros(1, dtype=torch.int64, device=valid.device) if call.first_token is None else call.first_token.to(valid.device)
    expected = torch.arange(valid.shape[1], device=valid.device) + call.key_offset >= start[:, None]
    if bool((valid != expected).any() | ~valid[:, -1].all()):
        raise refusal(
            PlanError,
            "a mask that hides more than the padding before a text",
            "a freeing cache would keep those tokens as if they were text",
            "pad on the left (tokenizer.padding_side = 'left'), or use the model's own cache",
        )


def refuse_unfreeable(scope: Scope) -> None:
    """A freeing cache needs a causal decoder whose every layer keeps keys and values."""
    why = ""
    if not scope.host.takes_text or not scope.model.can_generate() or scope.model.config.is_encoder_decoder:
        why = "it is not a causal model that generates"
    elif list(scope.topology.layers) != list(range(len(scope.topology.layers))) or any(not module.causal for module in scope.topology.main):
        why = "some of its layers have no causal attention"
    if why:
        raise refusal(PlanError, f"a freeing cache for {scope.name}", why, "run the plan without cache=")
