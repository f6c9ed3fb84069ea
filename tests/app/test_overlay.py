"""What a plan would drop: shares counted by hand, lost mass against the matrix, and refusals that say why."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.app import overlay, tiles
from headscope.app.components.map_viewer import plan_note
from headscope.app.exact import ExactCells
from headscope.app.factory import create_app
from headscope.app.runs import RunIndex
from headscope.errors import RunError
from headscope.plans import SparsePlan
from headscope.plans.dynamic import Budget, VerticalSlash
from headscope.plans.patterns import Dense, Lines, Streaming
from headscope.plans.plan import PlanModel
from headscope.store.synthetic import write_synthetic_run

TOKENS = 600
LOCAL = {"Host": "localhost", "Accept-Encoding": "gzip"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one layer of four heads, and plans: a good one, one of another model, a file that is no plan."""
    folder = tmp_path_factory.mktemp("plans")
    write_synthetic_run(folder / "run", tokens=TOKENS, layers=1, heads=4, kv_heads=2, width=8, block=16)
    model = PlanModel("synthetic", (0,), (4,), (2,), (8,))
    patterns = {(0, 0): Streaming(4, 50), (0, 1): Dense(), (0, 2): VerticalSlash(40, 100), (0, 3): Budget(keep=16, window=8)}
    SparsePlan(model, patterns, method="test").save(folder / "mine.json")
    (folder / "plans").mkdir()
    SparsePlan(PlanModel("other", (0,), (2,), (1,), (8,)), {(0, 0): Dense(), (0, 1): Dense()}).save(folder / "plans" / "other.json")
    (folder / "notes.json").write_text("{}")
    (folder / "link.json").symlink_to("/etc/hostname")
    return folder


def matrix(root: Path, head: int) -> np.ndarray:
    kept = RunIndex(root).open("run").kept_layer(0)
    q, k = (torch.from_numpy(np.asarray(x)).view(torch.bfloat16).double() for x in (kept.q[head], kept.k[head // 2]))
    scores = (q @ k.T * kept.facts.scale).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    return torch.softmax(scores, -1).numpy()


def test_only_fitting_plans_inside_the_folder_are_offered(root: Path) -> None:
    index = RunIndex(root)
    assert list(index.plans.fitting(index.open("run"))) == ["mine"]
    assert set(index.plans.paths()) == {"mine", "other", "notes"}
    with pytest.raises(RunError, match="not among the plans"):
        index.plans.open("../mine")
    with pytest.raises(RunError, match="not among the plans"):
        index.plans.open("link")


@pytest.mark.parametrize("block", [1, 4])
def test_small_blocks_are_counted_whole(root: Path, block: int) -> None:
    shape = tiles.geometry(RunIndex(root).open("run"), 0)
    share = overlay.kept_share(Streaming(4, 50), shape, block, 0, 0)
    at = np.arange(256 * block)[:TOKENS]
    seen = at[:, None] >= at[None]
    kept = seen & ((at[None] < 4) | (at[:, None] - at[None] < 50))
    side = -(-at.size // block)
    for r, c in [(0, 0), (10, 3), (30, 29), (side - 1, 0), (side - 1, side - 1), (40, 2)]:
        part = np.s_[r * block : (r + 1) * block, c * block : (c + 1) * block]
        if seen[part].any():
            assert share[r, c] == pytest.approx(kept[part].sum() / seen[part].sum()), (r, c)
        else:
            assert np.isnan(share[r, c])


def test_large_blocks_are_near_what_counting_gives(root: Path) -> None:
    shape = tiles.geometry(RunIndex(root).open("run"), 0)
    pattern = Lines((0, 77, 300), (0, 1, 40))
    share = overlay.kept_share(pattern, shape, 16, 0, 0)
    at = torch.arange(TOKENS)
    kept, seen = pattern.visible(at, at).numpy() & (at[:, None] >= at[None]).numpy(), (at[:, None] >= at[None]).numpy()
    for r, c in [(30, 4), (30, 18), (37, 0)]:
        part = np.s_[r * 16 : (r + 1) * 16, c * 16 : (c + 1) * 16]
        assert share[r, c] == pytest.approx(kept[part].sum() / seen[part].sum(), abs=0.07)
    assert share.shape == (38, 38)


def test_the_lost_mass_is_that_of_the_matrix(root: Path) -> None:
    run = RunIndex(root).open("run")
    shape = tiles.geometry(run, 0)
    exact = ExactCells().head("run", run.kept_layer(0), 0, 0)
    coarse = tiles.cells(run, shape, None, 0, 0, "mass", 16, 0, 0)
    found = overlay.loss(Streaming(4, 50), shape, exact, 16, coarse)
    a = matrix(root, 0)
    queries = np.unique(np.linspace(64, TOKENS - 1, 16).astype(int))
    lost = np.array([a[q, 4 : q - 49].sum() for q in queries])
    assert found.exact
    assert found.mean == pytest.approx(lost.mean(), rel=1e-5)
    assert (found.worst, found.at) == (pytest.approx(lost.max(), rel=1e-5), queries[lost.argmax()])
    blurred = overlay.loss(Streaming(4, 50), shape, None, 16, coarse)
    every = np.array([a[q, 4 : max(q - 49, 4)].sum() for q in range(TOKENS)])
    assert blurred.mean == pytest.approx(every.mean(), rel=0.15)
    assert overlay.loss(Dense(), shape, exact, 16, coarse).worst == 0


def test_rules_of_the_input_are_carried_out_where_q_and_k_are_there(root: Path) -> None:
    run, plan = RunIndex(root).open("run"), RunIndex(root).plans.open("mine")
    shape = tiles.geometry(run, 0)
    exact = ExactCells().head("run", run.kept_layer(0), 0, 2)
    chosen = overlay.static_pattern(plan, 0, 2, exact, shape)
    assert isinstance(chosen, Lines)
    last = matrix(root, 2)[-64:].sum(0)
    strongest = [int(key) for key in np.argsort(-last) if key >= 30][:8]  # the first 30 are always among them
    assert {*range(30), *strongest} <= set(chosen.columns)
    with pytest.raises(RunError, match="were not kept"):
        overlay.static_pattern(plan, 0, 2, None, shape)
    with pytest.raises(RunError, match="while decoding"):
        overlay.static_pattern(plan, 0, 3, exact, shape)


def test_the_page_says_what_is_lost_and_why_not(root: Path, plain) -> None:
    with create_app(root).server.test_request_context("/", headers={"Host": "localhost"}):
        run = RunIndex(root).open("run")
        text = plain(plan_note(run, 0, 0, "mine"))
        assert "16 queries, exact" in text
        assert f"keeps {Streaming(4, 50).density(TOKENS):.1%}" in text
        assert "while decoding" in plain(plan_note(run, 0, 3, "mine"))
        assert "no head 0.3" in plain(plan_note(run, 0, 3, "other"))
        assert "not among the plans" in plain(plan_note(run, 0, 0, "nope"))
        assert plan_note(run, 0, 0, "") is None


def test_tiles_of_a_plan_are_served(root: Path) -> None:
    client = create_app(root).server.test_client()
    answer = client.get("/api/run/run/0/0/plan/mine/1/1/0", headers=LOCAL)
    share, kind = tiles.decode(gzip.decompress(answer.data))
    assert kind == tiles.SHARE
    assert share[10, 3] == 1
    assert share[10, 4] == 0
    assert share[0, 255] == 1
    assert "no-cache" in answer.headers["Cache-Control"]
    assert client.get("/api/run/run/0/3/plan/mine/1/0/0", headers=LOCAL).status_code == 404
    assert client.get("/api/run/run/0/0/plan/notes/1/0/0", headers=LOCAL).status_code == 404
