"""Tiles and exact windows of a run: against dense matrices in float64, byte counts, and damage."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from headscope.errors import RunError
from headscope.profile import HeadProfile
from headscope.store import KeptFacts, KeptLayer, RunContent, RunLayout, open_run, run_writer
from headscope.store.synthetic import write_synthetic_run

from .test_store_run import card, content, table

TOKENS, BLOCK = 8200, 16
PLANES = ("block_mass", "block_max")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """513 cells a side, so 3 tiles a side of which the last is one cell wide; one layer sees everything, one 700 keys."""
    path = tmp_path_factory.mktemp("maps") / "run"
    return open_run(write_synthetic_run(path, tokens=TOKENS, heads=2, window=(None, 700), block=BLOCK, width=8, seed=3))


def matrix(run: Any, layer: int, head: int) -> np.ndarray:
    """A [N, N] float64 from the stored q and k, normalised by its own rows."""
    kept = run.kept_layer(layer)
    q, k = (torch.from_numpy(np.ascontiguousarray(part)) for part in (kept.q[head], kept.k[head // (kept.heads // kept.kv_heads)]))
    if kept.facts.dtype == "bfloat16":
        q, k = q.view(torch.bfloat16), k.view(torch.bfloat16)
    score = q.double() @ k.double().T * kept.facts.scale
    ahead = torch.arange(len(q))[:, None] - torch.arange(len(k))[None]
    hidden = ahead < 0
    if kept.facts.window is not None:
        hidden |= ahead >= kept.facts.window
    return score.masked_fill(hidden, -torch.inf).softmax(-1).numpy()


def blocks(a: np.ndarray, side: int, reduce: Any) -> np.ndarray:
    """A matrix reduced over blocks, edges filled up with zeros."""
    cells = -(-len(a) // side)
    padded = np.zeros((cells * side, cells * side))
    padded[: len(a), : len(a)] = a
    return reduce(padded.reshape(cells, side, cells, side), axis=(1, 3))


# ---- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 100])
def test_every_level_is_that_of_the_dense_matrix(tmp_path: Path, window: int | None) -> None:
    run = open_run(write_synthetic_run(tmp_path / "r", tokens=900, layers=1, heads=2, window=window, block=16, width=8, dtype="float32"))
    assert run.maps.sizes == (57, 29, 15, 8)
    for head in (0, 1):
        a = matrix(run, 0, head)
        for level in range(4):
            for plane, reduce in (("block_mass", np.sum), ("block_max", np.max)):
                expected = blocks(a, 16 * 2**level, reduce)
                np.testing.assert_allclose(run.map(plane, 0, head, level), expected, rtol=1e-5, atol=1e-6)


def test_tiles_make_up_the_map_and_their_mass_is_the_number_of_rows(run) -> None:
    info = run.maps
    assert [info.tiles(level) for level in range(len(info.sizes))] == [3, 2, 1, 1, 1, 1, 1, 1]
    for layer in run.layers:
        for level in range(len(info.sizes)):
            side = info.block * 2**level
            for plane in PLANES:
                whole = run.map(plane, layer, 1, level)
                tiles = [[run.tile(plane, level, layer, 1, i, j) for j in range(info.tiles(level))] for i in range(info.tiles(level))]
                assert all(tile.dtype == np.float32 and max(tile.shape) <= 256 for row in tiles for tile in row)
                np.testing.assert_array_equal(np.block(tiles), whole)
            first = np.arange(info.sizes[level]) * side
            mass = np.block(
                [[run.tile("block_mass", level, layer, 1, i, j) for j in range(info.tiles(level))] for i in range(info.tiles(level))]
            )
            np.testing.assert_allclose(mass.sum(1, dtype=np.float64), np.minimum(side, TOKENS - first), rtol=1e-5)


def stored(place: Path, chunks: int) -> list[bool]:
    """Which of a shard's chunks are in the file: its index is its end, a pair of offset and length per chunk and a checksum."""
    index = place.read_bytes()[-(16 * chunks + 4) : -4]
    pairs = struct.iter_unpack("<QQ", index)
    return [offset != 2**64 - 1 for offset, _ in pairs]


def test_nothing_above_the_diagonal_is_stored(run) -> None:
    there = np.array(stored(run.path / "maps.zarr/block_max/0/c.0.0.0.0", 2 * 2 * 9)).reshape(2, 2, 3, 3)
    for head in (0, 1):
        np.testing.assert_array_equal(there[0, head], np.tri(3, dtype=bool))
        np.testing.assert_array_equal(there[1, head], np.tri(3, dtype=bool) & ~np.tri(3, k=-2, dtype=bool))  # 700 keys back: two tiles
    assert not run.tile("block_max", 0, 0, 0, 0, 2).any()


class Reads:
    """What zarr asks of the disk: (file, bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from zarr.storage import LocalStore

        self.seen: list[tuple[str, int]] = []
        get = LocalStore.get

        async def recorded(store: Any, key: str, *args: Any, **kwargs: Any) -> Any:
            found = await get(store, key, *args, **kwargs)
            if found is not None and not key.endswith("zarr.json"):
                self.seen.append((key, len(found)))
            return found

        monkeypatch.setattr(LocalStore, "get", recorded)


def test_a_tile_reads_one_chunk_and_a_window_a_few(run, monkeypatch) -> None:
    reads = Reads(monkeypatch)
    run.tile("block_mass", 0, 0, 1, 1, 0)
    index, chunk = sorted(size for _, size in reads.seen)
    assert index == 16 * 36 + 4
    assert 256 * 256 < chunk <= 256 * 256 * 4 + 64
    reads.seen.clear()
    run.window(1, 1, 5000, 5256, 4900, 5156)
    data = [(key, size) for key, size in reads.seen if size > 1024]
    assert {key.rpartition("/")[0] for key, _ in data} == {"1/q", "1/k", "1/lse"}
    assert sum(size for _, size in data) <= 2 * 2 * (1024 * 8 * 2 + 4) + 4 * 16384 + 4


# ---- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_windows_are_the_matrix(run, layer: int) -> None:
    a = matrix(run, layer, 1)
    for q0, q1, k0, k1 in (
        (0, 1, 0, 1),
        (0, 300, 0, 300),
        (5000, 5256, 4900, 5156),
        (8000, 8200, 0, 500),
        (7777, 8200, 1023, 3000),
        (10, 20, 4000, 4010),
    ):
        found = run.window(layer, 1, q0, q1, k0, k1)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, a[q0:q1, k0:k1], rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(run.window(layer, 1, 4096, 4352, 0, 8192).sum(1, dtype=np.float64), 1, rtol=1e-5)


FACTS = ["plain", "softcap", "window", "bidirectional", "bidirectional window", "padding", "packed", "allowed", "bias", "sinks", "float16"]


@pytest.mark.parametrize("kind", FACTS)
def test_windows_follow_every_fact_of_the_call(tmp_path: Path, kind: str) -> None:
    """Four query heads on two key heads; the oracle is the definition, written out in float64."""
    rng = np.random.default_rng(7)
    n, heads, scale = 150, 4, 0.4
    dtype = np.float16 if kind == "float16" else np.float32
    q, k = rng.normal(size=(heads, n, 8)).astype(dtype), rng.normal(size=(2, n, 8)).astype(dtype)
    score = np.einsum("hqd,hkd->hqk", q.astype(np.float64), np.repeat(k, 2, 0).astype(np.float64)) * scale
    t, s = np.arange(n)[:, None], np.arange(n)[None]
    seen, extra, facts = np.ones((heads, n, n), dtype=bool), {}, {}
    causal = not kind.startswith("bidirectional")
    if causal:
        seen &= s <= t
    if kind.endswith("window"):
        facts["window"] = 9
        seen &= abs(t - s) < 9
    if kind == "softcap":
        facts["softcap"] = 0.7
        score = 0.7 * np.tanh(score / 0.7)
    if kind == "padding":
        extra["key_valid"] = np.arange(n) >= 20
        seen &= extra["key_valid"][None, None]
    if kind == "packed":
        extra["query_segments"] = extra["key_segments"] = np.arange(n) // 60
        seen &= (t // 60) == (s // 60)
    if kind == "allowed":
        extra["allowed"] = rng.random((1, n, n)) < 0.7
        extra["allowed"][0, np.arange(n), np.arange(n)] = True
        seen &= extra["allowed"]
    if kind == "bias":
        extra["bias"] = rng.normal(size=(heads, n, n)).astype(np.float32)
        score = score + extra["bias"]
    score = np.where(seen, score, -np.inf)
    total = np.exp(score).sum(-1)
    if kind == "sinks":
        facts["sink_logits"] = (0.5, -1.0, 2.0, 0.0)
        total = total + np.exp(np.array(facts["sink_logits"]))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.exp(score) / total[..., None]
        lse = np.where(total > 0, np.log(total), np.nan).astype(np.float32)
    kept = KeptLayer(KeptFacts(q.dtype.name, scale, causal, **facts), q, k, lse, extra)
    path = tmp_path / "run"
    with run_writer(path, RunLayout((0, 1), 4, n, kept=(1,))) as writer:
        writer.layer(0, {}, {})
        writer.layer(1, {}, {}, kept)
        writer.finish(card().to_dict(), table(), None)
    run = open_run(path)
    assert run.kept_layers == (1,)
    assert run.kept_layer(1).facts == kept.facts
    memory = RunContent((0, 1), kept={1: kept})
    for head in range(heads):
        for q0, q1, k0, k1 in ((0, n, 0, n), (30, 94, 17, 81), (149, 150, 0, 150)):
            for source in (run, memory):
                found = source.window(1, head, q0, q1, k0, k1)
                np.testing.assert_allclose(found, expected[head, q0:q1, k0:k1], rtol=1e-5, atol=1e-8)


def test_several_threads_read_one_open_run(run) -> None:
    """As the threads of a server do: each gets its own tile and window."""
    opened = open_run(run.path)
    places = [(layer, head, i, j) for layer in (0, 1) for head in (0, 1) for i in range(3) for j in range(i + 1)] * 4

    def read(place: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        layer, head, i, j = place
        return opened.tile("block_mass", 0, layer, head, i, j), opened.window(layer, head, 2000 * i + 100, 2000 * i + 164, 0, 50)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, places))
    for (layer, head, i, j), (tile, window) in zip(places, found, strict=True):
        np.testing.assert_array_equal(tile, run.tile("block_mass", 0, layer, head, i, j))
        np.testing.assert_array_equal(window, run.window(layer, head, 2000 * i + 100, 2000 * i + 164, 0, 50))


def test_large_windows_are_computed_in_strips(run, monkeypatch) -> None:
    whole = run.window(0, 0, 1000, 1700, 500, 1100)
    monkeypatch.setattr("headscope.store.kept.STRIP", 600 * 37)
    np.testing.assert_array_equal(run.window(0, 0, 1000, 1700, 500, 1100), whole)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run.window(0, 2, 0, 4, 0, 4), "heads 0..1"),
        (lambda run: run.window(0, -1, 0, 4, 0, 4), "heads 0..1"),
        (lambda run: run.window(0, 0, 4, 4, 0, 4), "holds one at least"),
        (lambda run: run.window(0, 0, 0, TOKENS + 1, 0, 4), f"positions 0..{TOKENS - 1}"),
        (lambda run: run.window(0, 0, 0, 4, -1, 4), f"positions 0..{TOKENS - 1}"),
        (lambda run: run.window(0, 0, 0, TOKENS, 0, TOKENS), "pass a smaller one"),
        (lambda run: run.window(0, 0, 0.5, 4, 0, 4), "q0=0.5: it is no whole number"),
        (lambda run: run.window(0, 0, 0, 4, 0, "4"), "k1='4': it is no whole number"),
        (lambda run: run.window(0, 1.0, 0, 4, 0, 4), "head=1.0: it is no whole number"),
        (lambda run: run.window(5, 0, 0, 4, 0, 4), "layers 0..1"),
        (lambda run: run.tile("block_mass", 0, 0, 0, 3, 0), "tiles 0..2"),
        (lambda run: run.tile("block_mass", 0, 0, 0, 0, -1), "tiles 0..2"),
        (lambda run: run.tile("block_mass", 8, 0, 0, 0, 0), "levels 0..7"),
        (lambda run: run.tile("block_mean", 0, 0, 0, 0, 0), "block_mass"),
        (lambda run: run.tile("block_mass", 0, 0, 2, 0, 0), "heads 0..1"),
    ],
)
def test_what_is_not_there_is_refused(run, ask: Any, words: str) -> None:
    with pytest.raises(RunError, match=words):
        ask(run)


def test_without_q_and_k_a_window_says_how_to_keep_them(tmp_path: Path) -> None:
    saved = HeadProfile(table(), card(), content()).save(tmp_path / "run")
    for source in (open_run(saved), content(), HeadProfile.load(saved)):
        assert source.kept_layers == ()
        with pytest.raises(RunError, match=r"kept none; profile again with keep=\(1,\) or keep='all' \(--keep 1\)"):
            source.window(1, 0, 0, 4, 0, 4)
        np.testing.assert_array_equal(source.tile("block_mass", 1, 0, 2, 0, 0), source.map("block_mass", 0, 2, 1))
    with pytest.raises(RunError, match="keeps none"):
        HeadProfile(table(), card()).window(0, 0, 0, 1, 0, 1)


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_synthetic_run(tmp_path / "small", tokens=1500, layers=1, heads=2, block=16, width=8)


def test_damaged_q_is_found_by_whoever_reads_it(small: Path) -> None:
    place = small / "qk.zarr/0/q/c.1.0.0"
    data = bytearray(place.read_bytes())
    data[40] ^= 0xFF
    place.write_bytes(bytes(data))
    run = open_run(small)
    run.window(0, 0, 0, 10, 0, 10)
    run.window(0, 1, 1100, 1110, 0, 10)
    with pytest.raises(RunError, match="content is not what was written"):
        run.window(0, 1, 0, 10, 0, 10)
    with pytest.raises(RunError, match="checksum"):
        run.verify()


@pytest.mark.parametrize("name", ["qk.zarr/0/k/c.0.0.0", "maps.zarr/block_mass/0/c.0.0.0.0"])
def test_a_file_that_goes_while_the_run_is_open_is_not_read_as_zeros(small: Path, name: str) -> None:
    run = open_run(small)
    run.window(0, 0, 0, 10, 0, 10)
    run.tile("block_mass", 0, 0, 0, 0, 0)
    (small / name).unlink()
    with pytest.raises(RunError, match="missing"):
        run.window(0, 0, 0, 10, 0, 10) if name.startswith("qk") else run.tile("block_mass", 0, 0, 0, 0, 0)


def rewrite(run: Path, name: str, **attributes: Any) -> None:
    """Changes a group's attributes (None drops one) and the card's checksum with them, as a careless converter would."""
    from headscope.store.files import sha256_of

    place = run / name
    value = json.loads(place.read_text())
    value["attributes"].update(attributes)
    value["attributes"] = {key: item for key, item in value["attributes"].items() if item is not None}
    place.write_text(json.dumps(value))
    whole = json.loads((run / "card.json").read_text())
    whole["files"][name] = {"sha256": sha256_of(place), "bytes": place.stat().st_size}
    (run / "card.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("facts", [{"scale": None}, {"scale": "x"}, {"dtype": "bfloat16"}, {"start": [0]}])
def test_facts_that_are_none_are_refused(small: Path, facts: dict[str, Any]) -> None:
    stored = open_run(small).kept_layer(0).facts.dtype
    rewrite(small, "qk.zarr/0/zarr.json", **{**facts, **({"dtype": "float16"} if facts.get("dtype") == stored else {})})
    with pytest.raises(RunError, match="damaged"):
        open_run(small).window(0, 0, 0, 1, 0, 1)


@pytest.mark.parametrize("sizes", [{"tile": 0}, {"block": 0}, {"sizes": [94, 0]}])
def test_maps_without_a_size_are_refused(small: Path, sizes: dict[str, Any]) -> None:
    rewrite(small, "maps.zarr/zarr.json", **sizes)
    with pytest.raises(RunError, match="incomplete"):
        open_run(small).tile("block_mass", 0, 0, 0, 0, 0)


def test_runs_of_the_first_form_still_open(tmp_path: Path) -> None:
    """Maps as headscope 0.1 wrote them: whole heads as chunks, no tiles, no checksums but the card's."""
    saved = HeadProfile(table(), card(), content()).save(tmp_path / "run")
    first = content()
    group = zarr.open_group(str(saved / "maps.zarr"), mode="w", zarr_format=3)
    group.attrs.update({"schema_version": 1, "block": 16, "tokens": 300, "causal": True, "planes": list(PLANES), "sizes": [19, 10, 5]})
    for plane in PLANES:
        for level, values in enumerate(first.pyramids[plane]):
            array = group.create_array(
                f"{plane}/{level}",
                shape=values.shape,
                chunks=(1, 1, *values.shape[2:]),
                shards=values.shape,
                chunk_key_encoding={"name": "default", "separator": "."},
                dtype="float32",
                fill_value=0.0,
            )
            array[...] = values
    from headscope.store.files import sha256_of

    value = json.loads((saved / "card.json").read_text())
    value["files"] = {name: fact for name, fact in value["files"].items() if not name.startswith("maps.zarr")}
    for entry in saved.glob("maps.zarr/**/*"):
        if entry.is_file():
            value["files"][entry.relative_to(saved).as_posix()] = {"sha256": sha256_of(entry), "bytes": entry.stat().st_size}
    (saved / "card.json").write_text(json.dumps(value))
    old = open_run(saved)
    old.verify()
    for level in range(3):
        np.testing.assert_array_equal(old.map("block_mass", 1, 3, level), first.pyramids["block_mass"][level][1, 3])
        np.testing.assert_array_equal(old.tile("block_max", level, 0, 2, 0, 0), first.pyramids["block_max"][level][0, 2])
    assert old.kept_layers == ()
    place = saved / "maps.zarr/block_mass/0/c.0.0.0.0"
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 0xFF
    place.write_bytes(bytes(data))
    with pytest.raises(RunError, match="checksum"):
        open_run(saved).tile("block_mass", 0, 0, 0, 0, 0)
