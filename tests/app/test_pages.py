"""Layouts and callbacks as plain functions: what each page holds, what it says when something is missing, how large it gets."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from headscope.app import context
from headscope.app.components.head_steps import neighbours
from headscope.app.factory import create_app
from headscope.app.figures import untyped
from headscope.app.pages import compare, head, heads, not_found, runs
from headscope.app.theme import COOKIE
from headscope.errors import RunError
from headscope.profile.roles import assign_roles
from headscope.store import MapInfo, RunContent, Tokens, write_run
from headscope.store.pyramid import build_pyramid

LIMIT = 2_000_000  # bytes of one response


def inside(path: Path, cookie: str = ""):
    """Inside a request of an application on `path`."""
    headers = {"Host": "localhost", **({"Cookie": f"{COOKIE}={cookie}"} if cookie else {})}
    return create_app(path).server.test_request_context("/", headers=headers)


def test_the_list_shows_runs_and_says_what_is_damaged(damaged: Path, plain) -> None:
    with inside(damaged):
        text = plain(runs.layout())
    assert "3 runs" in text
    assert "Synthetic-1B" in text
    assert "4 heads, 2 KV heads" in text
    assert "cut short" in text


def test_an_empty_directory_says_how_to_make_a_run(tmp_path: Path, plain) -> None:
    with inside(tmp_path):
        text = plain(runs.layout())
    assert "No runs yet" in text
    assert "headscope demo" in text


def test_a_damaged_run_is_shown_with_the_error(damaged: Path, plain) -> None:
    with inside(damaged):
        assert "cut short" in plain(heads.layout("short"))
        assert "cut short" in plain(head.layout("short", "0", "0"))
        assert "card.json" in plain(heads.layout("bare"))


def test_a_file_damaged_after_opening_is_named_by_the_tile_that_needs_it(damaged: Path) -> None:
    client = create_app(damaged).server.test_client()
    address = "/api/run/whole/{}/{}/tile/mass/16/0/0"
    assert client.get(address.format(0, 0), headers={"Host": "localhost"}).status_code == 200
    level = damaged / "whole" / "maps.zarr" / "block_mass" / "0"
    chunk = max((path for path in level.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0xFF
    chunk.write_bytes(bytes(data))
    fresh = create_app(damaged).server.test_client()
    answers = [fresh.get(address.format(layer, number), headers={"Host": "localhost"}) for layer in range(3) for number in range(4)]
    assert sum(b"content is not what was written" in answer.data for answer in answers) == 1
    assert sum(answer.status_code == 200 for answer in answers) == 11


@pytest.mark.parametrize(
    ("layer", "number"), [("3", "0"), ("0", "4"), ("-1", "0"), ("a", "b"), ("", ""), ("99999999999", "0"), ("1.0", "0")]
)
def test_a_head_that_is_not_there(request_context, plain, layer: str, number: str) -> None:
    assert "layers 0 to 2, heads 0 to 3" in plain(head.layout("tiny", layer, number))


def test_the_heads_page_holds_the_run(request_context, plain) -> None:
    text = plain(heads.layout("tiny", metric="induction", scale="rank", roles="sink,nope"))
    for part in ("Synthetic-1B", "1.2 B", "attention: sdpa", "blocked kernel", "Sink rate 0.250", "Strongest heads by role"):
        assert part in text
    assert '"value":"induction"' in text
    assert '"value":["sink"]' in text


def test_the_heads_callback_draws_the_asked_metric(request_context, run) -> None:
    grid, ordered, note = heads.update("tiny", "receiver", "value", ["induction"], "dark")
    np.testing.assert_array_equal(untyped(grid["data"][0]["z"]), run.grid("receiver").T.astype(np.float32))
    assert untyped(ordered["data"][0]["y"])[0] == np.float32(run.grid("receiver").max())
    assert grid["layout"]["font"]["color"] == "#9aa5b5"
    assert "a few sentences" in str(note)
    fallback, _, _ = heads.update("tiny", "no such metric", "no such scale", ["no such role"], "light")
    np.testing.assert_array_equal(untyped(fallback["data"][0]["z"]), run.grid("sink").T.astype(np.float32))


def test_the_table_callback(request_context) -> None:
    rows, columns, note = heads.fill_table("tiny", "distance")
    assert len(rows) == 12
    assert columns[4]["headerName"] == "Distance"
    assert note == "click a row to open the head, tick rows to pin them"


def test_the_head_page_is_drawn_in_the_scheme_of_the_cookie(synthetic, plain) -> None:
    with inside(synthetic.path.parent, "dark"):
        assert '"font":{"family":' in plain(head.layout("tiny", "1", "2", token="40"))
        assert '"size":12,"color":"#9aa5b5"' in plain(head.layout("tiny", "1", "2", token="40"))
    with inside(synthetic.path.parent, "light"):
        assert '"size":12,"color":"#9aa5b5"' not in plain(head.layout("tiny", "1", "2", token="40"))


def test_the_head_callbacks(request_context, synthetic, plain) -> None:
    lines = head.update_series(["entropy"], 5, "light", "tiny", [2, 1])
    assert lines["layout"]["shapes"][0]["x0"] == 5
    data, _ = head.update_strip("entropy", 1, "tiny", [2, 1])
    assert data["label"] == "Entropy"
    assert "token 7" in str(head.update_token(7, "tiny", [2, 1]))
    with pytest.raises(RunError, match="not among the runs"):
        head.update_token(7, "../tiny", [2, 1])
    shown = plain(head.update_lines(77, 3, "light", "tiny", [2, 1]))
    assert "Query 77" in shown
    assert "Key 3" in shown
    assert "block mass, 16 tokens" in shown
    assert "Click the map" in plain(head.update_lines(-1, -1, "light", "tiny", [2, 1]))
    assert "profile again" not in shown


def test_pins_are_links_and_this_head_is_marked(request_context, plain) -> None:
    text = plain(head.show_pinned("2.1,0.3,9.9,x", "tiny", [2, 1]))
    assert "/run/tiny/head/0/3?pins=2.1%2C0.3" in text
    assert "9.9" not in text
    assert "head-here" in text


def test_steps_stop_at_the_border(run) -> None:
    assert neighbours(run, 0, 0) == {"left": None, "right": (1, 0), "up": None, "down": (0, 1)}
    assert neighbours(run, 2, 3) == {"left": (1, 3), "right": None, "up": (2, 2), "down": None}


def test_an_address_that_leads_nowhere(request_context, plain) -> None:
    assert "nothing at this address" in plain(not_found.layout())


def test_a_run_without_text_and_maps_says_how_to_get_them(synthetic, tmp_path: Path, plain) -> None:
    from headscope.store.read import read_card

    write_run(tmp_path / "runs" / "lean", {**read_card(synthetic.path), "files": {}}, synthetic.table)
    with inside(tmp_path / "runs"):
        text = plain(head.layout("lean", "0", "0"))
        assert "profile again with maps=True" in text
        assert "keeps no text" in text
        assert "keep_statistics=True" in plain(head.update_series(None, -1, "light", "lean", [0, 0]))
        assert "made without maps" in plain(head.update_lines(3, 3, "light", "lean", [0, 0]))
        assert "Strongest heads" in plain(heads.layout("lean"))


def test_layers_with_fewer_heads_leave_holes(synthetic, tmp_path: Path) -> None:
    from headscope.store.read import read_card

    table = synthetic.table[(synthetic.table["layer"] != 1) | (synthetic.table["head"] < 2)].reset_index(drop=True)
    table["roles"], table["reasons"] = assign_roles(table)
    write_run(tmp_path / "runs" / "ragged", {**read_card(synthetic.path), "files": {}}, table)
    with inside(tmp_path / "runs"):
        grid = untyped(heads.update("ragged", "sink", "value", [], "light")[0]["data"][0]["z"])
        assert np.isnan(grid[2:, 1]).all()
        assert np.isfinite(grid).sum() == 10
        assert neighbours(context.open_run("ragged"), 0, 3)["right"] is None


def test_no_response_of_a_large_run_reaches_two_megabytes(synthetic, tmp_path: Path, plain) -> None:
    """5,120 heads with twenty metrics; and 131,072 tokens with 1,024 blocks a side."""
    from headscope.store.read import read_card

    rng = np.random.default_rng(0)
    card = {**read_card(synthetic.path), "files": {}}
    table = pd.DataFrame([(layer, index) for layer in range(80) for index in range(64)], columns=["layer", "head"])
    table["kv_head"], table["module"], table["kind"] = table["head"] // 8, "layers.0.attn", "full"
    for name in ("sink", "streaming", "distance", "previous_token", "induction", "receiver", *(f"metric_{index}" for index in range(14))):
        table[name] = rng.beta(0.4, 4, len(table))
    table["roles"], table["reasons"] = assign_roles(table)
    write_run(tmp_path / "runs" / "wide", card, table)

    tokens, cells = 131_072, 1024
    mass = np.tril(rng.random((cells, cells))).astype(np.float32)[None, None]
    levels = build_pyramid(mass, "block_mass")
    strings = tuple(f" word{index % 997}" for index in range(tokens))
    arrays = {
        f"{kind}/{name}": rng.gamma(2, 1, (1, 1, tokens)).astype(np.float32)
        for kind, name in [
            ("row", "entropy"),
            ("row", "row_max"),
            ("row", "distance"),
            ("row", "waad"),
            ("row", "sink_mass"),
            ("column", "column_sum"),
        ]
    }
    info = MapInfo(128, tokens, True, ("block_mass",), tuple(level.shape[-1] for level in levels))
    one = synthetic.table.iloc[:1].reset_index(drop=True)
    content = RunContent((0,), Tokens("", tuple(range(tokens)), strings), arrays, {"block_mass": levels}, info)
    write_run(tmp_path / "runs" / "long", card, one, content)

    with inside(tmp_path / "runs"):
        sizes = {
            "heads": len(plain(heads.layout("wide"))),
            "heads update": len(plain(heads.update("wide", "sink", "value", list(context.open_run("wide").roles), "dark"))),
            "table": len(plain(heads.fill_table("wide", "sink"))),
            "head": len(plain(head.layout("long", "0", "0"))),
            "series": len(plain(head.update_series(None, 5, "light", "long", [0, 0]))),
            "lines": len(plain(head.update_lines(100_000, 70_000, "light", "long", [0, 0]))),
            "scatter": len(plain(heads.update_scatter("wide", "sink", "streaming", list(context.open_run("wide").roles), "dark"))),
            "compare": len(plain(compare.layout("wide", "wide", metric="sink"))),
            "strip": len(plain(head.update_strip("entropy", 2, "long", [0, 0]))),
        }
        rows, _, note = heads.fill_table("wide", "metric_3")
    assert max(sizes.values()) < LIMIT, sizes
    client = create_app(tmp_path / "runs").server.test_client()
    answers = [
        client.get(f"/api/run/long/0/0/{what}", headers={"Host": "localhost"}) for what in ("tile/mass/128/3/2", "row/131071", "column/0")
    ]
    answers.append(client.get("/api/run/long/tokens/31", headers={"Host": "localhost"}))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert max(len(answer.data) for answer in answers) < LIMIT / 4
    assert len(rows) == 5120
    assert note.startswith("17 of 20 metrics, the chosen one first")
    assert rows[0]["m0"] == float(f"{table['metric_3'][0]:.4g}")
    shutil.rmtree(tmp_path / "runs")
