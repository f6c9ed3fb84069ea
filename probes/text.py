"""The texts that probes look at: natural prose, a block of random tokens repeated, one token repeated.

One rule keeps profiles cheap: every probe names a kind of text, and all probes of a kind share one forward pass. The repeated text has R =
4 blocks, as RazorAttention wants it; detectors that were defined on R = 2 read only the first two blocks, which by causality is exactly the
text that they were defined on. So one pass serves both, and neither number is an approximation of the other.

Random tokens are drawn without replacement and never from the special tokens: a token that stands twice in a block has two right answers,
and a special token inside the text is a sink of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from headscope.errors import ProbeError, refusal

if TYPE_CHECKING:
    from torch import Tensor

TextKind = Literal["natural", "repeated_random", "repeated_token"]
REPEATS = 4
REPEATED_TOKEN_LENGTH = 64
MIN_BLOCK = 4


@dataclass(frozen=True, slots=True, eq=False)
class ProbeText:
    """One sequence for one forward pass.

    `ids` int64 [N]. `first`: index of the first token of the text proper (1 after a BOS). `block` K and `repeats` R of a repeated text:
    token first + r * K + i is the same for every r. `segments` int64 [N]: sentence number per token, -1 for none. `text` and `strings` (one
    piece per token) are what people read; `name` is where it comes from; `seed` what it was drawn with.
    """

    kind: TextKind
    ids: Tensor
    first: int = 0
    block: int | None = None
    repeats: int | None = None
    segments: Tensor | None = None
    text: str | None = None
    strings: tuple[str, ...] | None = None
    name: str = "token ids"
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Checksum of what the model saw: the ids as little-endian int64."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @classmethod
    def natural(cls, ids: Tensor, segments: Tensor | None = None, *, text: str | None = None, name: str = "token ids") -> ProbeText:
        """A natural text given as ids [N], with sentence numbers [N] where a probe needs them."""
        return cls("natural", ids.to("cpu", torch.int64), segments=segments, text=text, name=name)

    def __repr__(self) -> str:
        shape = f", {self.repeats} x {self.block} tokens" if self.kind == "repeated_random" else ""
        return f"ProbeText({self.kind}, {self.name!r}, N={len(self)}{shape})"


@dataclass(frozen=True, slots=True)
class TokenPool:
    """The ordinary tokens of a vocabulary and its BOS (None where a tokenizer has none: texts then begin with their first token)."""

    ordinary: np.ndarray
    bos: int | None

    @classmethod
    def of(cls, scope: Any) -> TokenPool:
        """From a Scope: every id that has an embedding and is not special."""
        tokenizer = getattr(scope, "tokenizer", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        size = int(scope.model.get_input_embeddings().weight.shape[0])
        special: set[int] = set()
        bos = None
        if tokenizer is not None:
            size = min(size, len(tokenizer))
            special = set(tokenizer.all_special_ids)
            added = getattr(tokenizer, "added_tokens_decoder", {})
            special |= {number for number, token in added.items() if getattr(token, "special", False)}
            bos = tokenizer.bos_token_id
        return cls(np.array([number for number in range(size) if number not in special], dtype=np.int64), bos)


def repeated_random(source: Any, *, block: int, repeats: int = REPEATS, seed: int = 0) -> ProbeText:
    """[BOS] + `block` different random ordinary tokens, `repeats` times over. `source`: a Scope or a TokenPool."""
    pool = source if isinstance(source, TokenPool) else TokenPool.of(source)
    if block > len(pool.ordinary):
        raise refusal(
            ProbeError,
            f"a block of {block} tokens",
            f"the vocabulary has {len(pool.ordinary)} ordinary ones and none may come twice",
            "use a smaller block",
        )
    if repeats < 2 or block < MIN_BLOCK:
        raise refusal(
            ProbeError,
            f"{repeats} blocks of {block} tokens",
            "a repetition has 2 blocks or more, of 4 tokens or more",
            "use a longer context",
        )
    drawn = np.random.default_rng(seed).permutation(pool.ordinary)[:block]
    begin = [] if pool.bos is None else [pool.bos]
    ids = torch.tensor(begin + list(drawn) * repeats, dtype=torch.int64)
    name = f"{repeats} x {block} random tokens"
    return ProbeText("repeated_random", ids, first=len(begin), block=block, repeats=repeats, name=name, seed=seed)


def block_for(context: int, vocabulary: int, repeats: int = REPEATS) -> int:
    """K for a context: context / (R + 1), so that the text stays well inside the trained positions, and never more than there are
    tokens.
    """
    return min(context // (repeats + 1), vocabulary)


def repeated_token(source: Any, *, length: int = REPEATED_TOKEN_LENGTH, seed: int = 0) -> ProbeText:
    """One ordinary token `length` times, without a BOS: every hidden state is then equal, up to what positions do."""
    pool = source if isinstance(source, TokenPool) else TokenPool.of(source)
    token = int(np.random.default_rng(seed).choice(pool.ordinary))
    ids = torch.full((length,), token, dtype=torch.int64)
    return ProbeText("repeated_token", ids, block=1, repeats=length, name=f"token {token}, {length} times", seed=seed)


_SENTENCE_END = re.compile("[.!?\u2026]+[\"'\u201d\u2019)\\]]*(?=\\s)|\\n+")


def sentence_segments(text: str, starts: Sequence[int], *, special: Sequence[bool] | None = None) -> Tensor:
    """Sentence number per token [N] int64; -1 for special tokens.

    A sentence ends after . ! ? (and closing quotes) before white space, and at a line break. The white space belongs to the sentence that
    follows, since that is where byte-pair tokens carry it. Abbreviations end sentences too; at the level of averages over sentences that
    does no harm.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    numbers = np.searchsorted(np.array(ends, dtype=np.int64), np.asarray(starts, dtype=np.int64), side="right")
    numbers = np.unique(numbers, return_inverse=True)[1]  # an empty sentence between two ends has no number
    if special is not None:
        numbers = np.where(np.asarray(special, dtype=bool), -1, numbers)
    return torch.from_numpy(np.asarray(numbers, dtype=np.int64))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that stand for no text: the special tokens, but not the one for unknown words, which stands where a word stood."""
    return set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text, [N] strings. A token is decoded after its neighbour, since some tokenizers drop a leading space
    otherwise.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    special = special_ids(tokenizer)
    cache: dict[tuple[int, int], str] = {}
    out = []
    for place, number in enumerate(ids):
        previous = ids[place - 1] if place else -1
        key = (previous, number)
        if key not in cache:
            if number in special or previous < 0 or previous in special:
                cache[key] = tokenizer.decode([number])
            else:
                before = tokenizer.decode([previous])
                cache[key] = tokenizer.decode([previous, number])[len(before) :]
        out.append(cache[key])
    return tuple(out)


def natural_probe_text(natural: Any, tokenizer: Any) -> ProbeText:
    """A ProbeText from a `headscope.data.NaturalText`: pieces and sentences are found where there is a tokenizer to read them with."""
    ids = natural.ids
    if tokenizer is None:
        return ProbeText("natural", ids, name=natural.name)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    marks = special_ids(tokenizer)
    special = [int(number) in marks for number in ids]
    first = 1 if special and special[0] else 0
    if natural.text is not None and natural.starts is not None:
        text, starts = natural.text, natural.starts
        stops = (*starts[1:], len(text))
        strings = tuple(
            tokenizer.decode([int(number)]) if mark else text[start:stop]
            for number, mark, start, stop in zip(ids, special, starts, stops, strict=True)
        )
    else:
        strings = token_pieces(tokenizer, ids.tolist())
        text = "".join(strings)
        lengths = [len(piece) for piece in strings]
        starts = tuple(int(place) for place in np.cumsum([0, *lengths[:-1]])) if lengths else ()
    segments = sentence_segments(text, starts, special=special)
    return ProbeText("natural", ids, first=first, segments=segments, text=text, strings=strings, name=natural.name)
