"""Block-Sparse-Attention's arrays."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.fitting import Fitted, rectangular
from headscope.export.imported import Found, Hints
from headscope.export.masks import tables
from headscope.export.tensors import load_tensors, save_tensors
from headscope.plans.patterns import BLOCK, Blocks, Dense, Pattern, Streaming
from headscope.plans.plan import SparsePlan


class BlockSparseAttention(Format):
    """Per layer `head_mask_type` [Hq] (0 dense, -1 streaming, k > 0 the k-th block mask), `streaming_info` [2 Hq] (sink blocks, local
    blocks) and `base_blockmask` [K, n, n], as block_sparse_attn_func takes them (mit-han-lab/Block-Sparse-Attention), in safetensors.

    Blocks are 128 tokens and the diagonal block counts as local: the first row of a block sees one key of it, so l local blocks promise a
    window of (l - 1) 128 + 1, and rows further down a block see up to 127 keys more.
    """

    name: ClassVar[str] = "block-sparse-attention"
    title: ClassVar[str] = "Block-Sparse-Attention arrays"
    engine: ClassVar[str] = "Block-Sparse-Attention (mit-han-lab/Block-Sparse-Attention), prefill"
    reader: ClassVar[str] = "block_sparse_attn.block_sparse_attn_func"
    main: ClassVar[str] = "block_sparse.safetensors"
    holds: ClassVar[tuple[str, ...]] = (
        "dense, streaming or a block mask per query head",
        "a sink and a window of its own per head, in blocks of 128",
        "any rule on positions as a mask of blocks, at one length",
    )
    lacks: ClassVar[tuple[str, ...]] = (
        "windows in tokens",
        "keys chosen per input",
        "decoding",
        "single columns and diagonals: whole blocks are kept",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Whole blocks."""
        rectangular(plan.model, "heads", "Block-Sparse-Attention")
        fitted = Fitted.of(plan)
        fitted.windows("Block-Sparse-Attention", export.known)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if isinstance(pattern, Streaming):
                whole = Streaming(-(-pattern.sink // BLOCK) * BLOCK, -(-(pattern.window - 1) // BLOCK) * BLOCK + 1)
                return whole, "streaming heads count blocks of 128, the diagonal one among the local ones"
            if isinstance(pattern, Dense) or (isinstance(pattern, Blocks) and pattern.block == BLOCK):
                return pattern, ""
            found = tables(pattern, export.tokens("a block mask")) if pattern.static else None
            if found is None:
                return Dense(), "its keys are chosen per input, and the arrays are fixed"
            return _tiles(pattern, export.tokens("a block mask")), "masks are of whole blocks of 128; each block that it touches is kept"

        fitted.each(rule)
        fitted.notes += [
            "a streaming row sees its sink blocks and local blocks whole: up to 127 keys more than the window written",
            "the kernel computes prefills; decoding is another engine's",
        ]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The arrays, and the block masks of heads that need one."""
        plan, model = export.patterns(), export.model
        kinds = [pattern for pattern in dict.fromkeys(plan.patterns.values()) if isinstance(pattern, Blocks)]
        types = np.zeros((len(model.layers), model.heads[0]), dtype=np.int32)
        info = np.zeros((len(model.layers), 2 * model.heads[0]), dtype=np.int32)
        content: dict[str, np.ndarray] = {"layers": np.array(model.layers, dtype=np.int64)}
        for at, (layer, heads) in enumerate(zip(model.layers, model.heads, strict=True)):
            masks: list[Blocks] = []
            for head in range(heads):
                pattern = plan[layer, head]
                if isinstance(pattern, Streaming):
                    types[at, head] = -1
                    info[at, 2 * head : 2 * head + 2] = pattern.sink // BLOCK, (pattern.window - 1) // BLOCK + 1
                elif isinstance(pattern, Blocks):
                    if pattern not in masks:
                        masks.append(pattern)
                    types[at, head] = masks.index(pattern) + 1
            if masks:
                count = -(-export.tokens("a block mask") // BLOCK)
                content[f"layer.{layer}.base_blockmask"] = np.stack([_mask(one, count) for one in masks])
        if kinds:
            export.notes.append(f"block masks are made for {export.tokens('a block mask'):,} tokens")
        return {self.main: save_tensors({"head_mask_type": types, "streaming_info": info, **content})}

    def decode(self, path: Path, hints: Hints) -> Found:
        """A pattern per head; streaming heads with the window that every row is promised."""
        t = load_tensors(path)
        if not {"head_mask_type", "streaming_info"} <= set(t) or t["head_mask_type"].ndim != 2:
            raise refusal(
                ExportError, str(path), "it has no head_mask_type and streaming_info", "pass block_sparse.safetensors of headscope"
            )
        types, info = t["head_mask_type"], t["streaming_info"]
        numbers = [int(one) for one in t.get("layers", np.arange(len(types)))]
        if info.shape != (len(types), 2 * types.shape[1]) or len(numbers) != len(types):
            raise refusal(ExportError, str(path), f"head_mask_type {types.shape}, streaming_info {info.shape}", "copy the export again")
        model = hints.shape([types.shape[1]] * len(types), layers=numbers)
        patterns: dict[tuple[int, int], Pattern] = {}
        known: dict[bytes, Blocks] = {}
        for at, layer in enumerate(numbers):
            for head, kind in enumerate(types[at].tolist()):
                sink, local = (int(one) for one in info[at, 2 * head : 2 * head + 2])
                if kind == 0:
                    patterns[layer, head] = Dense()
                elif kind == -1 and sink >= 0 and local >= 1:
                    patterns[layer, head] = Streaming(sink * BLOCK, (local - 1) * BLOCK + 1)
                else:
                    masks = t.get(f"layer.{layer}.base_blockmask")
                    if masks is None or not 0 < kind <= len(masks):
                        raise refusal(
                            ExportError, str(path), f"head {layer}.{head} has mask type {kind}", "there is no such mask; copy it again"
                        )
                    mask = np.tril(masks[kind - 1])
                    key = mask.tobytes()
                    known.setdefault(key, Blocks(tuple(tuple(np.flatnonzero(row).tolist()) for row in mask), BLOCK))
                    patterns[layer, head] = known[key]
        return Found(model, SparsePlan(model, patterns, "imported from Block-Sparse-Attention"))

    def load(self, export: Export) -> str:
        """The kernel's arguments."""
        return (
            f't = safetensors.torch.load_file("{self.main}", device="cuda"); at = layers.index(layer)\n'
            "out = block_sparse_attn_func(q, k, v, cu_q, cu_k, t['head_mask_type'][at], t['streaming_info'][at],\n"
            "    t.get(f'layer.{layer}.base_blockmask', empty)[None], n_q, n_k, 0.0, is_causal=True)"
        )


def _mask(pattern: Blocks, count: int) -> np.ndarray:
    """[n, n] bool of a pattern's blocks."""
    out = np.zeros((count, count), dtype=bool)
    for row in range(count):
        out[row, list(pattern.row(row))] = True
    return out


def _tiles(pattern: Pattern, length: int) -> Blocks:
    """The blocks of 128 that a pattern touches."""
    one = tables(pattern, length)
    assert one is not None
    rows = []
    for row in range(-(-length // BLOCK)):
        low, high = row * BLOCK, min(length, (row + 1) * BLOCK)
        seen = one.visible(np.arange(low, high), np.arange(high)).any(0)
        rows.append(tuple(sorted({int(key) // BLOCK for key in np.flatnonzero(seen)})))
    return Blocks(tuple(rows), BLOCK)
