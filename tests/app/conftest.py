"""A small run written through the store, with the attention matrices it was made from as the oracle."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
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


class Visit:
    """A page in a real browser, the address of the server, and everything that went wrong."""

    WAIT = 20_000  # ms; the machine may be busy
    GRID = "#grid .heatmaplayer image"
    MAP = ".viewer canvas"
    SHARP = "(() => { const v = document.querySelector('.viewer').hsViewer; return v && v.stats.sharp > 0; })()"
    Z_OF_CELL = "([id, row, column]) => document.querySelector(`#${id} .js-plotly-plot`).calcdata[0][0].z[row][column]"

    def __init__(self, browser: Any, base: str, scheme: str = "light") -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme).new_page()
        self.base = base
        self.wrong: list[str] = []
        wrong = self.wrong.append
        self.page.on("console", lambda message: wrong(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: wrong(str(error)))
        self.page.on("request", lambda request: None if request.url.startswith((base, "data:", "blob:")) else wrong(request.url))
        self.page.on("response", lambda answer: wrong(f"{answer.status} {answer.url}") if answer.status >= 400 else None)

    def go(self, path: str, drawn: str) -> None:
        """Opens a page and waits until the application has taken over from the first one."""
        self.page.goto(self.base + path)
        self.until("!document.getElementById('first')")
        self.see(drawn)

    def see(self, drawn: str) -> None:
        self.page.wait_for_selector(drawn, state="attached", timeout=self.WAIT)

    def sharp(self) -> None:
        """Waits until every tile in sight is there."""
        self.until(self.SHARP)

    def viewer(self, expression: str) -> Any:
        """An expression of the viewer `v`."""
        return self.page.evaluate(f"(() => {{ const v = document.querySelector('.viewer').hsViewer; return {expression}; }})()")

    def middle_of(self, query: float, key: float) -> tuple[float, float]:
        """Where a cell of the map is on the page."""
        box = self.page.locator(".viewer").first.bounding_box()
        assert box is not None
        x, y = self.viewer(f"[v.box.x + ({key} + 0.5 - v.view.k) / v.view.s, v.box.y + ({query} + 0.5 - v.view.q) / v.view.s]")
        return box["x"] + x, box["y"] + y

    def z(self, graph: str, row: int, column: int) -> float:
        return float(self.page.evaluate(self.Z_OF_CELL, [graph, row, column]))

    def until(self, expression: str) -> None:
        """Waits until an expression is true in the page; asked from here, since the page's policy forbids it to evaluate strings."""
        end = time.monotonic() + self.WAIT / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(30)

    def wait_for_url(self, pattern: str) -> None:
        self.page.wait_for_url(re.compile(pattern), timeout=self.WAIT)

    def close(self) -> None:
        self.page.context.close()
        assert self.wrong == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    arguments = ["--enable-precise-memory-info", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[[Path], str]]:
    """Serves the dashboard on a directory until the module's tests are over; returns its address."""
    from waitress import create_server

    servers = []

    def serve(path: Path) -> str:
        server = create_server(create_app(path).server, host="127.0.0.1", port=0, threads=4)
        threading.Thread(target=server.run, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.effective_port}"

    yield serve
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def gallery(synthetic: Synthetic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs to look at: a small one, the same with other numbers, one of 2,000 tokens with q and k, one with pictures; and a plan."""
    from headscope.plans import SparsePlan
    from headscope.plans.patterns import Streaming
    from headscope.plans.plan import PlanModel
    from headscope.store import PictureFacts, Pictures, open_run
    from headscope.store.read import read_card
    from headscope.store.synthetic import write_synthetic_run

    folder = tmp_path_factory.mktemp("gallery")
    shutil.copytree(synthetic.path, folder / "tiny")
    card, table = {**read_card(synthetic.path), "files": {}}, synthetic.table.copy()
    table["sink"] = table["sink"][::-1].to_numpy()
    write_run(folder / "after", card, table, open_run(synthetic.path))
    write_synthetic_run(folder / "long", tokens=2000, layers=2, heads=2, kv_heads=1, width=16, block=16)
    model = PlanModel("synthetic", (0, 1), (2, 2), (1, 1), (16, 16))
    SparsePlan.uniform(model, Streaming(4, 100)).save(folder / "stream.json")
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(24), (LAYERS, HEADS, 3)).astype(np.float32)
    facts = PictureFacts("answer", ("two", "red", "cats"), (4, 6), "what is there?", "two red cats")
    picture = Pictures(facts, rng.integers(0, 255, (1, 40, 60, 3), dtype=np.uint8), weights)
    write_run(folder / "seen", card, synthetic.table, RunContent(tuple(range(LAYERS)), pictures=picture))
    return folder


@pytest.fixture(scope="module")
def gallery_address(gallery: Path, serving: Callable[[Path], str]) -> str:
    return serving(gallery)


@pytest.fixture
def open_visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens pages of any server; each must end without an error."""
    opened: list[Visit] = []

    def visit_of(base: str, scheme: str = "light") -> Visit:
        opened.append(Visit(browser, base, scheme))
        return opened[-1]

    yield visit_of
    for one in opened:
        one.close()


@pytest.fixture
def visit(open_visit: Callable[..., Visit], gallery_address: str) -> Visit:
    """A page of the gallery."""
    return open_visit(gallery_address)
