"""PlantedModel: the built model with its truth table and the attention, in closed form, that it must show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.errors import DataError, refusal
from headscope.models.planted.kinds import Induction, Kind, saturated
from headscope.models.planted.layout import BOS, PAD, Place
from headscope.models.planted.tokenizer import word_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(eq=False)
class PlantedModel:
    """A live model and what is known about it.

    - `model`: an ordinary `LlamaForCausalLM`; `bos`, `pad`: its special ids; tokens are pad + 1 .. vocab - 1.
    - `heads`: (layer, head) -> kind, for every head. `feeds`: a head -> the head of an earlier layer that it cannot do without.
    - `codes` [vocab, n] float32, the tokens' unit codes (zero for BOS and padding); `gain`: logit of a copied token.
    """

    model: LlamaForCausalLM
    heads: dict[Place, Kind]
    feeds: dict[Place, Place]
    sharpness: float
    codes: Tensor = field(repr=False)
    gain: float
    max_positions: int
    bos: int = BOS
    pad: int = PAD

    @property
    def truth(self) -> dict[Place, str]:
        """(layer, head) -> name of its kind, "uniform" where nothing was planted."""
        return {place: kind.name for place, kind in self.heads.items()}

    def places(self, name: str) -> list[Place]:
        """Where a kind was planted, by its name in the truth table."""
        return [place for place, kind in self.truth.items() if kind == name]

    def prompt(self, block: int = 25, repeats: int = 4, *, seed: int = 0) -> Tensor:
        """BOS, then `block` distinct tokens `repeats` times: [1, 1 + block * repeats] int64."""
        free = len(self.codes) - self.pad - 1
        if not 1 <= block <= free or repeats < 1 or 1 + block * repeats > self.max_positions:
            why = f"there are {free} tokens and {self.max_positions} positions"
            raise refusal(DataError, f"{repeats} x {block} tokens", why, "pass a shorter block or fewer repeats")
        order = torch.randperm(free, generator=torch.Generator().manual_seed(seed))[:block] + self.pad + 1
        return torch.cat([torch.tensor([self.bos]), order.repeat(repeats)])[None]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Words "t2", "t3", ... for the ids, with BOS put first: for what needs text or special ids, e.g. Scope(model, tokenizer)."""
        return word_tokenizer(len(self.codes), self.max_positions)

    def expected(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[Place, Tensor]:
        """The attention of every head in the limit of infinite sharpness: (layer, head) -> [B, N, N] float64.

        ids [N] or [B, N]; attention_mask [B, N], nonzero on real tokens (default: all). Rows of padding are NaN, its columns zero. Raises
        DataError where the closed form does not hold: no BOS at the start, a second BOS, padding among the real tokens.
        """
        ids = ids[None] if ids.ndim == 1 else ids
        valid = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        for row, keep in zip(ids, valid, strict=True):
            self._check(row[keep])
        out = {}
        for place, kind in self.heads.items():
            out[place] = torch.stack([_scatter(kind, row, keep) for row, keep in zip(ids, valid, strict=True)])
        return out

    def expected_logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits in the same limit, [B, N, vocab] float64: gain times each token's code . what the induction heads copy."""
        ids = ids[None] if ids.ndim == 1 else ids
        codes = self.codes.double()
        attention = self.expected(ids, attention_mask)
        copied = torch.zeros(*ids.shape, codes.shape[1], dtype=torch.float64)
        for place, kind in self.heads.items():
            if isinstance(kind, Induction) and kind.copies:
                copied = copied + attention[place] @ codes[ids]
        return self.gain * copied @ codes.T

    def _check(self, tokens: Tensor) -> None:
        given, last = f"a sequence of {len(tokens)} tokens", len(self.codes) - 1
        if len(tokens) == 0 or int(tokens[0]) != self.bos or bool((tokens[1:] == self.bos).any()):
            why = f"planted heads fall back to the one BOS (id {self.bos}) at the start"
            raise refusal(DataError, given, why, "start with BOS and use it nowhere else")
        if bool((tokens == self.pad).any()) or int(tokens.min()) < 0 or int(tokens.max()) > last:
            why = f"tokens are {self.pad + 1}..{last}, and {self.pad} is padding"
            raise refusal(DataError, given, why, "use ids of tokens, and mask padding")
        if len(tokens) > self.max_positions:
            why = f"the model has {self.max_positions} positions"
            raise refusal(DataError, given, why, "pass fewer tokens, or plant with a larger max_positions")

    def __repr__(self) -> str:
        config = self.model.config
        planted = ", ".join(f"{layer}.{head} {name}" for (layer, head), name in self.truth.items() if name != "uniform")
        shape = f"{config.num_hidden_layers} layers x {config.num_attention_heads} heads ({config.num_key_value_heads} kv)"
        return f"PlantedModel({shape}, head_dim {config.head_dim}: {planted or 'all uniform'})"


def _scatter(kind: Kind, row: Tensor, keep: Tensor) -> Tensor:
    """The kind's saturated attention of the kept tokens, put back among the padding."""
    out = torch.full((len(row), len(row)), float("nan"), dtype=torch.float64)
    out[keep] = 0.0
    at = keep.nonzero()[:, 0]
    out[at[:, None], at] = saturated(kind, row[at])
    return out
