"""The kinds of heads that can be planted, each with the rule that says which keys share a row.

The rule is the specification: the weights in `build` are one way to reach it, `saturated` below is the same thing without any weights. All
kinds fall back to the first token (BOS) on rows that have no target, as trained heads do; without a defined fallback a saturated softmax
would pick whichever key is nearest by accident, and no closed form would hold for those rows.

Positions count from the sequence's first real token, so left padding changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What a head attends to. `name` is its entry in the truth table."""

    name: ClassVar[str] = ""

    def targets(self, tokens: Tensor) -> Tensor:
        """tokens [N] int64, BOS first -> [N, N] bool: key s is a target of row t (causality is applied later)."""
        raise NotImplementedError(f"{type(self).__name__} names no targets")


@dataclass(frozen=True)
class Uniform(Kind):
    """Every visible key equally: q = 0. A head that nothing was planted in is this one."""

    name: ClassVar[str] = "uniform"

    def targets(self, tokens: Tensor) -> Tensor:
        return torch.ones(len(tokens), len(tokens), dtype=torch.bool)


@dataclass(frozen=True)
class Sink(Kind):
    """The first token, from every row."""

    name: ClassVar[str] = "sink"

    def targets(self, tokens: Tensor) -> Tensor:
        return (torch.arange(len(tokens)) == 0).expand(len(tokens), -1)


@dataclass(frozen=True)
class Offset(Kind):
    """The key exactly `delta` tokens back (0: the row's own); rows t < delta fall back to BOS."""

    delta: int
    name: ClassVar[str] = "offset"

    def targets(self, tokens: Tensor) -> Tensor:
        at = torch.arange(len(tokens))
        return at[:, None] - at == self.delta


@dataclass(frozen=True)
class Previous(Offset):
    """The previous token. The first one planted also writes the previous token's code to the residual stream, for induction."""

    delta: int = 1
    name: ClassVar[str] = "previous"


@dataclass(frozen=True)
class Duplicate(Kind):
    """All occurrences of the row's own token, itself included."""

    name: ClassVar[str] = "duplicate"

    def targets(self, tokens: Tensor) -> Tensor:
        return tokens[:, None] == tokens


@dataclass(frozen=True)
class Induction(Kind):
    """The keys that follow an earlier occurrence of the row's token, found by K-composition with a `Previous` head of an earlier layer.

    With `copies`, W_V and W_O carry the attended token to the logits, so that the model really predicts repeated text; ablating the head,
    or the previous-token head that feeds it, takes the prediction away.
    """

    copies: bool = True
    name: ClassVar[str] = "induction"

    def targets(self, tokens: Tensor) -> Tensor:
        before = tokens.roll(1)
        before[0] = -1
        return tokens[:, None] == before


@dataclass(frozen=True)
class Vertical(Kind):
    """Fixed columns: either every key at one of `positions` (absolute), or every key whose token is one of `tokens`.

    Positions need a uniform head in an earlier layer, which measures them (see `build`).
    """

    positions: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    name: ClassVar[str] = "vertical"

    def targets(self, tokens: Tensor) -> Tensor:
        hit = torch.isin(tokens, torch.tensor(self.tokens, dtype=torch.long))
        hit |= torch.isin(torch.arange(len(tokens)), torch.tensor(self.positions, dtype=torch.long))
        return hit.expand(len(tokens), -1)


@dataclass(frozen=True)
class VisionLabel(Kind):
    """Every key whose token is one of `tokens`, the ids that stand for image patches."""

    tokens: tuple[int, ...]
    name: ClassVar[str] = "vision"

    def targets(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, torch.tensor(self.tokens, dtype=torch.long)).expand(len(tokens), -1)


@dataclass(frozen=True)
class BlockLocal(Kind):
    """The keys of the row's own block of `width` positions (blocks aligned to position 0), up to the row itself.

    Needs a uniform head in an earlier layer, like `Vertical(positions=...)`.
    """

    width: int
    name: ClassVar[str] = "block_local"

    def targets(self, tokens: Tensor) -> Tensor:
        block = torch.arange(len(tokens)) // self.width
        return block[:, None] == block


def saturated(kind: Kind, tokens: Tensor) -> Tensor:
    """The kind's attention in the limit of infinite sharpness: tokens [N] -> A [N, N] float64, rows sum to one."""
    hit = kind.targets(tokens).tril()
    hit = hit | ((~hit.any(-1, keepdim=True)) & (torch.arange(len(tokens)) == 0))
    return hit.double() / hit.sum(-1, keepdim=True)
