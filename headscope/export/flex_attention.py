"""FlexAttention: BlockMask tensors and the mask_mod that goes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.fitting import Fitted
from headscope.export.imported import Found, Hints
from headscope.export.masks import Tables, common_side, pattern_of, refine, tables
from headscope.export.tensors import load_tensors, save_tensors
from headscope.plans.patterns import BLOCK, Dense, Pattern
from headscope.plans.plan import SparsePlan

MODULE = '''"""BlockMask and mask_mod of every layer, written by headscope.

    masks = load("block_masks.safetensors")
    out = flex_attention(q, k, v, block_mask=masks[layer], enable_gqa=True)
"""

from safetensors.torch import load_file
from torch.nn.attention.flex_attention import BlockMask


def mask_mod_of(columns, diagonals, tiles, has_tiles, kind, side):
    """s is visible to t when columns[kind, s], or diagonals[kind, t - s], or tiles[kind, t // side, s // side], and s <= t."""

    def mask_mod(b, h, q_idx, kv_idx):
        p = kind[h]
        back = q_idx - kv_idx
        seen = columns[p, kv_idx] | diagonals[p, back.clamp(min=0)]
        if has_tiles:
            seen = seen | tiles[p, q_idx // side, kv_idx // side]
        return seen & (back >= 0)

    return mask_mod


def load(path="block_masks.safetensors", device="cpu"):
    """Layer number -> BlockMask of its query heads, for sequences of {length} tokens."""
    t = load_file(path, device=device)
    side, length = int(t["side"]), int(t["length"])
    found = {{}}
    for layer in t["layers"].tolist():
        kind = t[f"layer.{{layer}}.kind"]
        pick = lambda name: t[name][kind.long()][None]
        mod = mask_mod_of(t["columns"], t["diagonals"], t["tiles"], t["tiles"].numel() > 0, kind, side)
        found[layer] = BlockMask.from_kv_blocks(
            pick("kv_num_blocks"),
            pick("kv_indices"),
            pick("full_kv_num_blocks"),
            pick("full_kv_indices"),
            BLOCK_SIZE={block},
            mask_mod=mod,
            seq_lengths=(length, length),
        )
    return found
'''


class FlexAttention(Format):
    """Per distinct pattern the four tensors of a BlockMask (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices; blocks of 128)
    and the tables its mask_mod looks keys up in, in safetensors; per layer the number of each head's pattern; and a module that builds the
    BlockMasks (torch.nn.attention.flex_attention). Exact for every pattern that is a rule on positions, at one length.
    """

    name: ClassVar[str] = "flex-attention"
    title: ClassVar[str] = "FlexAttention block masks"
    engine: ClassVar[str] = "torch.nn.attention.flex_attention (torch 2.6 and later)"
    reader: ClassVar[str] = "BlockMask.from_kv_blocks, flex_attention"
    main: ClassVar[str] = "block_masks.safetensors"
    holds: ClassVar[tuple[str, ...]] = ("every pattern that is a rule on positions, per query head, exactly, at one length",)
    lacks: ClassVar[tuple[str, ...]] = (
        "keys chosen per input",
        "compensation tokens",
        "other lengths than the one it was made for (a span is fixed at it)",
        "fast decoding: masks that differ by head leave the split-KV kernel unused",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Static patterns; spans fixed at the length."""
        length = export.tokens("flex-attention")
        fitted = Fitted.of(plan)
        fitted.windows("FlexAttention", length)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if not pattern.static:
                return Dense(), "a mask cannot be chosen per input"
            return pattern, ""

        fitted.each(rule)
        fitted.notes.append(f"masks of exactly {length:,} tokens, in blocks of {BLOCK}; windows count the row's own key")
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """Tensors and module."""
        length, plan, model = export.tokens("flex-attention"), export.patterns(), export.model
        kinds = list(dict.fromkeys(plan.patterns.values()))
        found = [one for pattern in kinds if (one := tables(pattern, length)) is not None]
        side = common_side(found)
        count = -(-length // BLOCK)
        small = -(-length // side) if any(one.tiles.size for one in found) else 0
        tiles = np.zeros((len(kinds), small, small), dtype=bool)
        for number, one in enumerate(found):
            if one.tiles.size:
                tiles[number] = refine(one, side)
        blocks = [block_lists(one, count) for one in found]
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        content: dict[str, np.ndarray] = {
            **{name: np.stack([parts[at] for parts in blocks]).astype(np.int32) for at, name in enumerate(names)},
            "columns": np.stack([one.columns for one in found]),
            "diagonals": np.stack([one.diagonals for one in found]),
            "tiles": tiles,
            "side": np.array([side], dtype=np.int64),
            "length": np.array([length], dtype=np.int64),
            "layers": np.array(model.layers, dtype=np.int64),
        }
        number_of = {pattern: number for number, pattern in enumerate(kinds)}
        for layer, heads in zip(model.layers, model.heads, strict=True):
            content[f"layer.{layer}.kind"] = np.array([number_of[plan[layer, head]] for head in range(heads)], dtype=np.int32)
        return {self.main: save_tensors(content), "flex_masks.py": MODULE.format(length=f"{length:,}", block=BLOCK).encode()}

    def decode(self, path: Path, hints: Hints) -> Found:
        """Patterns with the masks of the tables."""
        t = load_tensors(path)
        needed = {"columns", "diagonals", "tiles", "side", "length", "layers"}
        if not needed <= set(t):
            raise refusal(
                ExportError, str(path), f"it lacks {', '.join(sorted(needed - set(t)))}", "pass block_masks.safetensors of headscope"
            )
        length, side, numbers = (t[name].reshape(-1).tolist() for name in ("length", "side", "layers"))
        kinds = len(t["columns"])
        if not (len(length) == len(side) == 1 and all(isinstance(one, int) for one in (*length, *side, *numbers))):
            raise refusal(ExportError, str(path), "its length, side or layers are no whole numbers", "copy the export again")
        length, side = length[0], side[0]
        if t["columns"].shape != (kinds, length) or t["diagonals"].shape != (kinds, length) or len(t["tiles"]) != kinds or side < 1:
            raise refusal(ExportError, str(path), "its tables do not fit its length", "copy the export again")
        patterns = [pattern_of(t["columns"][at], t["diagonals"][at], t["tiles"][at], side) for at in range(kinds)]
        rows: dict[int, np.ndarray[Any, Any]] = {}
        for layer in numbers:
            row = t.get(f"layer.{layer}.kind")
            if row is None or row.ndim != 1 or not len(row) or row.min() < 0 or row.max() >= kinds:
                raise refusal(ExportError, str(path), f"layer {layer} names patterns that are not there", "copy the export again")
            rows[layer] = row
        model = hints.shape([len(rows[layer]) for layer in numbers], layers=numbers)
        given = {(layer, head): patterns[int(rows[layer][head])] for layer, head in model.places}
        notes = [f"masks of {length:,} tokens"]
        return Found(
            model, SparsePlan(model, given, "imported from FlexAttention", {"length": length}, tuple(notes)), {}, notes, {"length": length}
        )

    def load(self, export: Export) -> str:
        """The module's loader."""
        return (
            f'from flex_masks import load; masks = load("{self.main}", device="cuda")\n'
            "out = torch.compile(flex_attention)(q, k, v, block_mask=masks[layer], enable_gqa=True)"
        )


def block_lists(one: Tables, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(partial counts [n], partial indices [n, n], full counts [n], full indices [n, n]) of a pattern in blocks of 128.

    A block is whole where one of the tables fills it, and there is nothing where none touches it; only where several touch it and none
    fills it are its entries looked at, so that 131,072 tokens take no longer than they must.
    """
    length = len(one.columns)
    some, every, touched = _from_tables(one, count)
    below = np.tri(count, dtype=bool)
    every &= np.tri(count, k=-1, dtype=bool)
    for row, column in np.argwhere(some & below & ~every & (touched > 1)).tolist():
        at, keys = (np.arange(tile * BLOCK, min(length, (tile + 1) * BLOCK)) for tile in (row, column))
        every[row, column] = row > column and one.visible(at, keys).all()
    if length % BLOCK:  # the last row of blocks is not complete
        last = count - 1
        every[last] = False
        seen = one.visible(np.arange(last * BLOCK, length), np.arange(length)).any(0)
        some[last] = np.logical_or.reduceat(seen, np.arange(0, length, BLOCK))
    some &= below
    return (*_lists(some & ~every), *_lists(every))


def _from_tables(one: Tables, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, n] each: whether a table touches a block, whether one fills it, and how many touch it."""
    padded = np.pad(one.columns, (0, count * BLOCK - len(one.columns))).reshape(count, BLOCK)
    some = [np.broadcast_to(padded.any(1), (count, count))]
    every = [np.broadcast_to(padded.all(1), (count, count))]
    sums = np.concatenate([[0], np.cumsum(np.pad(one.diagonals, (0, count * BLOCK + BLOCK - len(one.diagonals))))])
    gap = np.arange(count) * BLOCK
    low, high = np.maximum(gap - BLOCK + 1, 0), gap + BLOCK
    between = sums[high] - sums[low]
    apart = np.abs(np.arange(count)[:, None] - np.arange(count))
    some.append((between > 0)[apart])
    every.append((between == high - low)[apart])
    if one.tiles.size:
        edges = np.arange(count) * BLOCK
        first, last = edges // one.side, np.minimum(edges + BLOCK - 1, len(one.columns) - 1) // one.side + 1
        total = np.pad(one.tiles.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        found = total[last][:, last] - total[first][:, last] - total[last][:, first] + total[first][:, first]
        some.append(found > 0)
        every.append(found == (last - first)[:, None] * (last - first))
    return np.any(some, 0), np.any(every, 0), np.sum(some, 0)


def _lists(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and indices with the listed ones first, as FlexAttention orders them."""
    order = np.argsort(~flags, axis=-1, kind="stable")
    return flags.sum(-1), order
