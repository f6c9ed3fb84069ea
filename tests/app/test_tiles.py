"""Tiles against the matrix they come from: what a cell is at every level, that masses add up, that exact cells are eager attention's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.app import tiles
from headscope.app.api import Served
from headscope.app.exact import ExactCells, Pieces, binned, largest
from headscope.app.factory import create_app
from headscope.app.runs import RunIndex
from headscope.errors import RunError
from headscope.store.synthetic import write_synthetic_run

LOCAL = {"Host": "localhost", "Accept-Encoding": "gzip"}
TOKENS = 2000


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 tokens, two layers, the second with a sliding window and without q and k."""
    root = tmp_path_factory.mktemp("long")
    return write_synthetic_run(root / "long", tokens=TOKENS, layers=2, heads=2, kv_heads=1, width=16, window=(None, 300), block=16)


@pytest.fixture(scope="module")
def client(long_run: Path):
    return create_app(long_run.parent).server.test_client()


def oracle(path: Path, layer: int, head: int) -> np.ndarray:
    """A [N, N] float64 from the stored q and k, with none of the code under test."""
    kept = RunIndex(path.parent).open(path.name).kept_layer(layer)
    bits = [torch.from_numpy(np.asarray(values)).view(torch.bfloat16).double() for values in (kept.q[head], kept.k[0])]
    scores = bits[0] @ bits[1].T * kept.facts.scale
    at = torch.arange(TOKENS)
    seen = at[:, None] >= at[None]
    if kept.facts.window:
        seen &= at[:, None] - at[None] < kept.facts.window
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).numpy()


def fetch(client, layer: int, head: int, plane: str, block: int, i: int, j: int) -> tuple[np.ndarray, int]:
    answer = client.get(f"/api/run/long/{layer}/{head}/tile/{plane}/{block}/{i}/{j}", headers=LOCAL)
    assert answer.status_code == 200, answer.data
    return tiles.decode(gzip.decompress(answer.data))


def whole(client, layer: int, head: int, plane: str, block: int) -> np.ndarray:
    cells = -(-TOKENS // block)
    side = -(-cells // 256)
    return np.block([[fetch(client, layer, head, plane, block, i, j)[0] for j in range(side)] for i in range(side)])


def expected(matrix: np.ndarray, plane: str, block: int) -> np.ndarray:
    """By plain loops over blocks; NaN where no query sees a key."""
    cells = -(-TOKENS // block)
    out = np.full((cells, cells), np.nan)
    for r in range(cells):
        for c in range(r + 1):
            part = matrix[r * block : (r + 1) * block, c * block : (c + 1) * block]
            out[r, c] = part.sum() / len(part) if plane == "mass" else part.max()
    return out


@pytest.mark.parametrize("plane", ["mass", "max"])
@pytest.mark.parametrize("block", [2, 8, 16, 64, 256])
def test_cells_of_every_level_are_those_of_the_matrix(client, long_run: Path, plane: str, block: int) -> None:
    found = whole(client, 0, 1, plane, block)
    wanted = expected(oracle(long_run, 0, 1), plane, block)
    assert (np.isnan(found) == np.isnan(wanted)).all()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-7 * np.nanmax(wanted))


@pytest.mark.parametrize("block", [1, 4, 16, 128, 256])
def test_tiles_of_mass_add_up_to_the_rows(client, block: int) -> None:
    """Mass per query times the queries of each row of cells is the number of queries; so all tiles of a level hold N rows of one."""
    cells = np.nan_to_num(whole(client, 0, 0, "mass", block).astype(np.float64))
    counts = np.minimum(block, TOKENS - np.arange(len(cells)) * block)
    np.testing.assert_allclose(cells.sum(1), 1, rtol=3e-3)
    assert (cells.sum(1) * counts).sum() == pytest.approx(TOKENS, rel=1e-3)


def test_exact_cells_are_exact(client, long_run: Path) -> None:
    matrix = oracle(long_run, 1, 0)
    found, kind = fetch(client, 1, 0, "mass", 1, 5, 4)
    assert kind == tiles.EXACT
    np.testing.assert_allclose(found, matrix[1280:1536, 1024:1280], rtol=1e-3, atol=1e-9)
    below, _ = fetch(client, 1, 0, "max", 1, 3, 3)
    assert np.isnan(below[np.triu_indices(256, 1)]).all()
    assert fetch(client, 1, 0, "mass", 1, 3, 4)[0].shape == (256, 256)
    assert np.isnan(fetch(client, 1, 0, "mass", 1, 3, 4)[0]).all()


def test_rows_and_columns_are_those_of_the_matrix(client, long_run: Path) -> None:
    matrix = oracle(long_run, 0, 1)
    row = json.loads(gzip.decompress(client.get("/api/run/long/0/1/row/1777", headers=LOCAL).data))
    order = np.argsort(-matrix[1777], kind="stable")[:24]
    assert row["kind"] == "exact"
    assert [one["position"] for one in row["top"]] == order.tolist()
    np.testing.assert_allclose([one["weight"] for one in row["top"]], matrix[1777, order], rtol=1e-5)
    assert row["total"] == pytest.approx(1, abs=1e-5)
    assert sum(row["sums"]) == pytest.approx(1, abs=1e-3)
    assert row["top"][0]["token"] == RunIndex(long_run.parent).open("long").tokens[order[0]]
    column = json.loads(gzip.decompress(client.get("/api/run/long/0/1/column/900", headers=LOCAL).data))
    assert column["first"] == 900
    assert column["total"] == pytest.approx(matrix[:, 900].sum(), rel=1e-5)
    assert column["top"][0]["position"] == int(matrix[:, 900].argmax())


def test_without_q_and_k_a_row_is_one_of_the_block_map(synthetic) -> None:
    client = create_app(synthetic.path.parent).server.test_client()
    row = json.loads(gzip.decompress(client.get("/api/run/tiny/1/2/row/77", headers=LOCAL).data))
    block = synthetic.attention[1, 2, 64:80]
    masses = [block[:, start : start + 16].sum() / 16 for start in range(0, 80, 16)]
    assert (row["kind"], row["block"], row["first"], row["width"]) == ("block", 16, 0, 16)
    np.testing.assert_allclose(row["sums"], masses, rtol=1e-3)
    column = json.loads(gzip.decompress(client.get("/api/run/tiny/1/2/column/77", headers=LOCAL).data))
    assert column["first"] == 64
    assert column["top"][0]["token"] == ""
    assert client.get("/api/run/tiny/1/2/tile/mass/1/0/0", headers=LOCAL).status_code == 404
    geometry = tiles.geometry(RunIndex(synthetic.path.parent).open("tiny"), 1)
    assert (geometry.exact, geometry.stored) == ((), (16, 32))


def test_exact_windows_equal_eager_attention(smollm2, tmp_path: Path) -> None:
    """A profile keeps q and k of a real model; the viewer's cells are what that model's eager attention gives."""
    profile = smollm2.profile(probes=["sink"], context=96, keep=(17,), progress=False)
    profile.save(tmp_path / "runs" / "smol")
    ids = torch.tensor([profile.tokens.ids])
    before = smollm2.model.config._attn_implementation
    smollm2.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            eager = smollm2.model(ids, output_attentions=True).attentions[17][0]
    finally:
        smollm2.model.set_attn_implementation(before)
    client = create_app(tmp_path / "runs").server.test_client()
    for head in (0, 5):
        data = gzip.decompress(client.get(f"/api/run/smol/17/{head}/tile/mass/1/0/0", headers=LOCAL).data)
        found, kind = tiles.decode(data)
        assert kind == tiles.EXACT
        below = np.tril_indices(96)
        np.testing.assert_allclose(found[below], eager[head].numpy()[below], rtol=2e-3, atol=2e-6)
        assert np.isnan(found[np.triu_indices(96, 1)]).all()


def test_half_precision_keeps_three_digits_over_many_decades() -> None:
    values = np.array([[3.2, np.nan, 0.0], [3.2e-3, 3.2e-5, 1e-30]], dtype=np.float32)
    data = tiles.encode(values, tiles.STORED)
    found, kind = tiles.decode(data)
    assert len(data) == 16 + 12
    assert kind == tiles.STORED
    assert np.isnan(found[0, 1])
    np.testing.assert_allclose(found[:, 0], values[:, 0], rtol=1e-3)
    assert found[1, 1] == pytest.approx(3.2e-5, rel=1e-2)
    assert tiles.decode(tiles.encode(np.full((2, 2), np.nan, dtype=np.float32), 0))[0].shape == (2, 2)
    with pytest.raises(ValueError, match="no tile"):
        tiles.decode(data[:-1])


def test_answers_are_cached_and_revalidated(client) -> None:
    address = "/api/run/long/0/0/tile/mass/64/0/0"
    first = client.get(address, headers=LOCAL)
    assert first.headers["Content-Encoding"] == "gzip"
    assert first.headers["Cache-Control"] == "private, no-cache"
    again = client.get(address, headers={**LOCAL, "If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    version = first.headers["ETag"].strip('"').partition(".")[0]
    assert "immutable" in client.get(f"{address}?v={version}", headers=LOCAL).headers["Cache-Control"]
    assert "no-cache" in client.get(f"{address}?v=0", headers=LOCAL).headers["Cache-Control"]
    plain = client.get(address, headers={"Host": "localhost"})
    assert "Content-Encoding" not in plain.headers
    assert plain.data == gzip.decompress(first.data)


@pytest.mark.parametrize(
    "address",
    [
        "/api/run/..%2Flong/0/0/tile/mass/16/0/0",
        "/api/run/nope/0/0/tile/mass/16/0/0",
        "/api/run/long/9/0/tile/mass/16/0/0",
        "/api/run/long/0/2/tile/mass/16/0/0",
        "/api/run/long/0/0/tile/..%2f/16/0/0",
        "/api/run/long/0/0/tile/lse/16/0/0",
        "/api/run/long/0/0/tile/mass/3/0/0",
        "/api/run/long/0/0/tile/mass/16/1/0",
        "/api/run/long/0/0/tile/mass/16/0/99999999999999999999",
        "/api/run/long/0/0/row/2000",
        "/api/run/long/0/0/column/99999",
        "/api/run/long/0/0/plan/..%2F..%2Fetc%2Fpasswd/16/0/0",
        "/api/run/long/0/0/plan/none/16/0/0",
    ],
)
def test_what_is_not_there_is_refused_in_one_line(client, address: str) -> None:
    answer = client.get(address, headers=LOCAL)
    text = answer.get_data(as_text=True)
    assert answer.status_code == 404
    assert answer.mimetype == "text/plain"
    assert "root:" not in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("address", ["/api/run/long/0/-1/row/3", "/api/run/long/head/0/0/row/5", "/api/nothing"])
def test_an_address_of_no_known_form_is_not_answered_with_a_page(client, address: str) -> None:
    answer = client.get(address, headers=LOCAL)
    assert answer.status_code == 404
    assert "there is no such address" in answer.get_data(as_text=True)


def test_a_file_damaged_later_is_named(long_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(long_run, tmp_path / "runs" / "long")
    chunk = tmp_path / "runs" / "long" / "qk.zarr" / "0" / "q" / "c.0.0.0"
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 0xFF
    chunk.write_bytes(bytes(data))
    answer = create_app(tmp_path / "runs").server.test_client().get("/api/run/long/0/0/tile/mass/1/0/0", headers=LOCAL)
    assert answer.status_code == 404
    assert "not what was written" in answer.get_data(as_text=True)


def test_pieces_are_read_once_and_equal_the_array() -> None:
    source = np.arange(2 * 5000 * 3, dtype=np.float32).reshape(2, 5000, 3)
    cells = ExactCells(memory=2**20)
    pieces = Pieces(source, ("run", 0, "q"), cells._pieces)
    for first, last in ((0, 5000), (1000, 1100), (1023, 1025), (4999, 5000), (2048, 3072)):
        np.testing.assert_array_equal(pieces[1, first:last], source[1, first:last])
    assert len(cells._pieces) == 5


def test_the_memory_for_pieces_is_bounded() -> None:
    served = Served()
    for number in range(300):
        served.packed.get(number, lambda: b"x" * 2**20)
    assert served.packed.held <= served.packed.limit
    assert len(served.packed) == 96
    with pytest.raises(RunError, match="no such"):
        RunIndex("/nonexistent")


def test_largest_and_bins() -> None:
    values = np.array([0.1, np.nan, 0.4, 0.0, 0.4, 0.1])
    assert largest(values).tolist() == [2, 4, 0, 5]
    width, sums, highest = binned(np.arange(10.0), bins=4)
    assert (width, sums.tolist(), highest.tolist()) == (3, [3, 12, 21, 9], [2, 5, 8, 9])
