"""A small run written through the store, with the attention matrices it was made from as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from headscope.app.factory import create_app
from headscope.app.runs import Run, RunIndex
from headscope.profile.roles import assign_roles
from headscope.store import MapInfo, RunContent, Tokens, write_run
from headscope.store.pyramid import build_pyramid

LAYERS, HEADS, TOKENS, BLOCK = 3, 4, 200, 16
PIECES = (" the", " cat", "\n", " <b>sat</b>", " on", ",", " mat", " &amp;")


@dataclass(frozen=True)
class Synthetic:
    """The run directory, the table it holds, and A [L, H, N, N] float64."""

    path: Path
    table: pd.DataFrame
    attention: np.ndarray
    strings: tuple[str, ...]


def causal_attention(rng: np.random.Generator) -> np.ndarray:
    """Random causal attention with a sink on the first key that grows with the layer."""
    scores = rng.normal(0, 1.5, (LAYERS, HEADS, TOKENS, TOKENS))
    scores[..., 0] += 2.0 * np.arange(LAYERS)[:, None, None]
    scores = np.where(np.tril(np.ones((TOKENS, TOKENS), dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def blocks_of(matrix: np.ndarray, block: int, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    """A [N, N] reduced over blocks, the border filled up with zeros."""
    cells = -(-matrix.shape[0] // block)
    padded = np.zeros((cells * block, cells * block))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return reduce(padded.reshape(cells, block, cells, block), axis=(1, 3))


def card_of(layers: int, heads: int, metrics: list[str], name: str = "Synthetic-1B") -> dict[str, Any]:
    """A card with every field that the store asks for."""
    return {
        "model": {
            "name": name,
            "source": "test",
            "revision": "1",
            "class": "LlamaForCausalLM",
            "fingerprint": "0123456789abcdef",
            "layers": layers,
            "heads": heads,
            "kv_heads": heads // 2,
            "head_dim": 8,
            "parameters": 1_234_000_000,
            "dtype": "float32",
            "device": "cpu",
        },
        "data": [{"name": "a text", "kind": "natural", "sha256": "ab" * 32, "sequences": 1, "tokens": TOKENS}],
        "probes": [{"name": "sink", "parameters": {}, "source": "arXiv:2410.10781"}],
        "metrics": {"sink": {"probe": "sink", "unit": "probability", "higher_is": "a sink", "range": [0.0, 1.0], "data": "natural"}},
        "numbers": {"sink_rate": 0.25},
        "attention_kernels": ["sdpa"],
        "statistics_kernel": "blocked",
        "parameters": {},
        "seeds": {},
        "versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux", "cpus": 2},
        "seconds": {"total": 1.5},
        "headscope_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
    }


def table_of(values: dict[str, np.ndarray]) -> pd.DataFrame:
    """A heads table from metrics [L, H]."""
    layers, heads = next(iter(values.values())).shape
    places = [(layer, head) for layer in range(layers) for head in range(heads)]
    table = pd.DataFrame(places, columns=["layer", "head"])
    table["kv_head"], table["module"], table["kind"] = table["head"] // 2, [f"layers.{layer}.attn" for layer, _ in places], "full"
    for name, grid in values.items():
        table[name] = grid.reshape(-1)
    table["roles"], table["reasons"] = assign_roles(table)
    return table


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """The run, in a directory `runs` of its own."""
    rng = np.random.default_rng(0)
    attention = causal_attention(rng)
    steps = np.arange(TOKENS)
    distance = steps[:, None] - steps[None]
    later = np.maximum(TOKENS - steps, 1)
    statistics = {
        "row/entropy": -(attention * np.log(np.maximum(attention, 1e-300))).sum(-1),
        "row/row_max": attention.max(-1),
        "row/distance": (attention * distance).sum(-1),
        "row/sink_mass": attention[..., :4].sum(-1),
        "column/column_sum": attention.sum(-2),
        "column/sink_importance": attention.sum(-2) / later,
    }
    arrays = {name: values.astype(np.float32) for name, values in statistics.items()}
    arrays["row/argmax"] = attention.argmax(-1).astype(np.int32)
    pyramids = {}
    for plane, reduce in (("block_mass", np.sum), ("block_max", np.max)):
        finest = np.stack([[blocks_of(head, BLOCK, reduce) for head in layer] for layer in attention])
        pyramids[plane] = build_pyramid(finest.astype(np.float32), plane)
    info = MapInfo(BLOCK, TOKENS, True, tuple(pyramids), tuple(level.shape[-1] for level in pyramids["block_mass"]))
    table = table_of(
        {
            "sink": statistics["column/sink_importance"][..., 0],
            "distance": statistics["row/distance"].mean(-1),
            "induction": np.linspace(0.0, 0.9, LAYERS * HEADS).reshape(LAYERS, HEADS),
            "receiver": rng.normal(0, 2, (LAYERS, HEADS)),
        }
    )
    strings = tuple(PIECES[index % len(PIECES)] for index in range(TOKENS))
    content = RunContent(tuple(range(LAYERS)), Tokens("".join(strings), tuple(range(TOKENS)), strings), arrays, pyramids, info)
    path = tmp_path_factory.mktemp("app") / "runs" / "tiny"
    path.parent.mkdir()
    write_run(path, card_of(LAYERS, HEADS, list(table.columns)), table, content)
    return Synthetic(path, table, attention, strings)


@pytest.fixture(scope="session")
def run(synthetic: Synthetic) -> Run:
    """The run as the pages see it."""
    return RunIndex(synthetic.path.parent).open("tiny")


@pytest.fixture
def app(synthetic: Synthetic):
    """The application on the directory of runs."""
    return create_app(synthetic.path.parent)


@pytest.fixture
def request_context(app):
    """Inside a request of the application, where layouts and callbacks run."""
    with app.server.test_request_context("/", headers={"Host": "localhost"}):
        yield app


@pytest.fixture
def plain() -> Callable[[Any], str]:
    """A Dash component or figure as the JSON that is sent, its escapes undone."""
    from dash._utils import to_json

    return lambda value: json.dumps(json.loads(to_json(value)), ensure_ascii=False, separators=(",", ":"))


@pytest.fixture
def damaged(synthetic: Synthetic, tmp_path: Path) -> Path:
    """A runs directory with a whole run, one cut short, one without a card, and things that are no runs."""
    import shutil

    for name in ("whole", "short", "bare"):
        shutil.copytree(synthetic.path, tmp_path / "runs" / name)
    with (tmp_path / "runs" / "short" / "statistics.safetensors").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "runs" / "bare" / "card.json").unlink()
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / ".unfinished").mkdir()
    (tmp_path / "runs" / ".unfinished" / "card.json").write_text(json.dumps({}))
    shutil.copytree(synthetic.path, tmp_path / "outside")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "runs"
