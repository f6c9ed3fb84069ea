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
from headscope.plans.patterns import BLOCK, Dense, Pattern, Span
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

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if isinstance(pattern, Span):
                return pattern.at(length), f"a mask is made for one length, here {length:,} tokens"
            if not pattern.static or getattr(pattern, "compensate", False):
                return Dense(), "a mask cannot be chosen per input, nor add a token"
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
    """(partial counts [n], partial indices [n, n], full counts [n], full indices [n, n]) of a pattern in blocks of 128."""
    length = len(one.columns)
    partial, full = np.zeros((count, count), dtype=bool), np.zeros((count, count), dtype=bool)
    starts = np.arange(0, length, BLOCK)
    for row in range(count):
        rows = np.arange(row * BLOCK, min(length, (row + 1) * BLOCK))
        keys = np.arange(min(length, (row + 1) * BLOCK))
        seen = np.add.reduceat(one.visible(rows, keys).sum(0), starts[: row + 1])
        sizes = np.minimum(BLOCK, len(keys) - starts[: row + 1]) * len(rows)
        whole = (seen == sizes) & (sizes == BLOCK * BLOCK)
        full[row, : row + 1] = whole
        partial[row, : row + 1] = (seen > 0) & ~whole
    return (*_lists(partial), *_lists(full))


def _lists(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and indices with the listed ones first, as FlexAttention orders them."""
    order = np.argsort(~flags, axis=-1, kind="stable")
    return flags.sum(-1), order
