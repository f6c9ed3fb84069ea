"""Run directories: what is written comes back, what is damaged is refused in one line, what is unfinished is not seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from headscope.errors import RunError
from headscope.profile import HeadProfile, RunCard
from headscope.profile.roles import assign_roles
from headscope.store import MapInfo, RunContent, Tokens, list_runs, open_run, write_run
from headscope.store.files import canonical_heads
from headscope.store.pyramid import build_pyramid

LAYERS, HEADS, TOKENS, BLOCK = 2, 4, 300, 16


def card() -> RunCard:
    return RunCard(
        model={
            "name": "tiny",
            "source": "",
            "revision": "",
            "class": "Tiny",
            "fingerprint": "f",
            "layers": LAYERS,
            "heads": HEADS,
            "kv_heads": 2,
            "head_dim": 8,
            "parameters": 1000,
            "dtype": "float32",
            "device": "cpu",
        },
        data=[{"name": "text", "kind": "natural", "sha256": "ab" * 32, "sequences": 1, "tokens": TOKENS}],
        probes=[{"name": "sink", "parameters": {"position": 0}, "source": "paper"}],
        metrics={"sink": {"probe": "sink", "unit": "probability", "higher_is": "sinks", "range": [0.0, 1.0], "data": "natural"}},
        numbers={"sink_rate": 0.5},
        attention_kernels=["sdpa"],
        statistics_kernel="blocked",
        parameters={"context": TOKENS},
        seeds={"texts": 0},
        seconds={"total": 1.0},
        headscope_version="0.1.0",
        created="2026-01-01T00:00:00+00:00",
    )


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(layer, head, head // 2) for layer in range(LAYERS) for head in range(HEADS)]
    out = pd.DataFrame(rows, columns=["layer", "head", "kv_head"])
    out["module"] = [f"layers.{layer}.attn" for layer, _, _ in rows]
    out["kind"] = "full"
    out["sink"] = rng.random(len(rows))
    out.loc[3, "sink"] = np.nan
    out["distance"] = rng.random(len(rows)) * 100
    out["roles"], out["reasons"] = assign_roles(out)
    return canonical_heads(out)


def content() -> RunContent:
    rng = np.random.default_rng(1)
    size = -(-TOKENS // BLOCK)
    mass = np.tril(rng.random((LAYERS, HEADS, size, size))).astype(np.float32)
    pyramids = {"block_mass": build_pyramid(mass, "block_mass"), "block_max": build_pyramid(mass / 2, "block_max")}
    sizes = tuple(level.shape[-1] for level in pyramids["block_mass"])
    arrays = {
        "row/entropy": rng.random((LAYERS, HEADS, TOKENS)).astype(np.float32),
        "row/argmax": rng.integers(-1, TOKENS, (LAYERS, HEADS, TOKENS)).astype(np.int32),
        "column/column_sum": rng.random((LAYERS, HEADS, TOKENS)).astype(np.float32),
    }
    arrays["row/entropy"][0, 1, 5] = np.nan
    tokens = Tokens("text " * 60, tuple(range(TOKENS)), tuple(f"t{i}" for i in range(TOKENS)))
    return RunContent((0, 1), tokens, arrays, pyramids, MapInfo(BLOCK, TOKENS, True, ("block_mass", "block_max"), sizes))


def a_profile() -> HeadProfile:
    return HeadProfile(table(), card(), content())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose finest maps are in one file per layer, as those of a large model are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headscope.store.pyramid.SHARD_BYTES", HEADS * 19 * 19 * 4)
        return a_profile().save(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run_copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_everything_comes_back_with_its_dtype(saved: Path) -> None:
    first, second = a_profile(), HeadProfile.load(saved)
    pd.testing.assert_frame_equal(first.table, second.table, check_exact=True)
    assert second.table["layer"].dtype == np.int64
    assert second.table["sink"].dtype == np.float64
    assert np.isnan(second.table["sink"][3])
    assert all(isinstance(roles, list) for roles in second.table["roles"])
    assert all(isinstance(reasons, dict) for reasons in second.table["reasons"])
    assert second.tokens == first.tokens
    assert second.statistics == first.statistics == ["column/column_sum", "row/argmax", "row/entropy"]
    for name in first.statistics:
        assert second.statistic(name).dtype == first.statistic(name).dtype
        np.testing.assert_array_equal(second.statistic(name), first.statistic(name))
        np.testing.assert_array_equal(second.statistic(name, 1), first.statistic(name)[1])
        np.testing.assert_array_equal(second.statistic(name, 1, 2), first.statistic(name)[1, 2])
    assert second.maps == first.maps
    for plane in ("block_mass", "block_max"):
        for level in range(len(first.maps.sizes)):
            found = second.map(plane, 1, 3, level)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, first.map(plane, 1, 3, level))
    again, written = second.card.to_dict(), first.card.to_dict()
    assert set(again.pop("files")) >= {"heads.parquet", "statistics.safetensors", "tokens.json"}
    written.pop("files")
    assert again == written


def test_a_loaded_run_can_be_saved_elsewhere(saved: Path, tmp_path: Path) -> None:
    copy = HeadProfile.load(saved).save(tmp_path / "again")
    ours, theirs = open_run(saved), open_run(copy)
    assert not (copy / "maps.zarr/block_mass/0/c.1.0.0.0").exists()
    for layer in (0, 1):
        np.testing.assert_array_equal(ours.map("block_mass", layer, 2), theirs.map("block_mass", layer, 2))
    for name in ("heads.parquet", "statistics.safetensors", "tokens.json"):
        assert ours.card.files[name] == theirs.card.files[name]
    theirs.verify()


def test_a_profile_without_text_has_no_such_files(tmp_path: Path) -> None:
    path = HeadProfile(table(), card()).save(tmp_path / "bare")
    assert sorted(entry.name for entry in path.iterdir()) == ["card.json", "heads.parquet"]
    bare = HeadProfile.load(path)
    assert bare.tokens is None
    assert bare.maps is None
    assert bare.statistics == []
    with pytest.raises(RunError, match="keeps none"):
        bare.statistic("row/entropy")
    with pytest.raises(RunError, match="without them"):
        bare.map("block_mass", 0, 0)


def test_pyramid_levels_are_exact_sums_and_maxima() -> None:
    rng = np.random.default_rng(2)
    finest = rng.random((1, 2, 19, 19)).astype(np.float32)
    mass, largest = build_pyramid(finest, "block_mass"), build_pyramid(finest, "block_max")
    assert [level.shape[-1] for level in mass] == [19, 10, 5]
    for level, side in ((1, 2), (2, 4)):
        for row in range(mass[level].shape[-1]):
            for column in range(mass[level].shape[-1]):
                cells = finest[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                np.testing.assert_allclose(mass[level][:, :, row, column], cells.sum((2, 3)), rtol=1e-6)
                np.testing.assert_array_equal(largest[level][:, :, row, column], cells.max((2, 3)))


FILES = ["card.json", "heads.parquet", "statistics.safetensors", "tokens.json", "maps.zarr/zarr.json", "maps.zarr/block_mass/0/c.1.0.0.0"]


def read_all(path: Path) -> None:
    """Touches everything that a run holds."""
    run = open_run(path)
    _ = run.card, run.heads, run.tokens
    for name in run.statistics:
        run.statistic(name)
    for plane in run.maps.planes:
        for level in range(len(run.maps.sizes)):
            for layer in run.layers:
                for head in range(run.heads_per_layer):
                    run.map(plane, layer, head, level)


def one_line(caught: pytest.ExceptionInfo[RunError], *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_an_undamaged_copy_reads(run_copy: Path) -> None:
    read_all(run_copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(run_copy: Path, name: str) -> None:
    (run_copy / name).unlink()
    with pytest.raises(RunError) as caught:
        open_run(run_copy)
    one_line(caught, "no card.json" if name == "card.json" else name, "missing" if name != "card.json" else "not a run directory")


@pytest.mark.parametrize("name", FILES)
def test_truncated_file(run_copy: Path, name: str) -> None:
    place = run_copy / name
    place.write_bytes(place.read_bytes()[:-7])
    with pytest.raises(RunError) as caught:
        open_run(run_copy)
    one_line(caught, name, "damaged" if name == "card.json" else "cut short")


@pytest.mark.parametrize("name", FILES[1:])
def test_file_of_the_right_size_with_wrong_content(run_copy: Path, name: str) -> None:
    place = run_copy / name
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 0xFF
    place.write_bytes(bytes(content))
    with pytest.raises(RunError) as caught:
        read_all(run_copy)
    one_line(caught, name.split("/")[0], "block_mass level 0" if "block_mass" in name else "checksum", "content is not what was written")
    if name == "statistics.safetensors":
        assert "of row/argmax, layer 0" in str(caught.value)  # the middle of the file
    with pytest.raises(RunError, match="checksum"):
        open_run(run_copy).verify()


@pytest.mark.parametrize("name", ["heads.parquet", "statistics.safetensors", "tokens.json", "maps.zarr/zarr.json"])
def test_garbage_with_a_matching_checksum(run_copy: Path, name: str) -> None:
    """A card that was made for the damaged file: the readers themselves must refuse."""
    from headscope.store.files import sha256_of

    place = run_copy / name
    place.write_bytes(b"not what it says" * 8)
    card_path = run_copy / "card.json"
    value = json.loads(card_path.read_text())
    value["files"][name] = {"sha256": sha256_of(place), "bytes": place.stat().st_size}
    card_path.write_text(json.dumps(value))
    with pytest.raises(RunError) as caught:
        read_all(run_copy)
    one_line(caught, "maps.zarr" if name.startswith("maps") else name)


def edit_card(path: Path, **changes: object) -> None:
    place = path / "card.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))


def test_newer_schema_is_refused(run_copy: Path) -> None:
    edit_card(run_copy, schema_version=2)
    with pytest.raises(RunError, match="update headscope") as caught:
        open_run(run_copy)
    one_line(caught, "schema 2")


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.5])
def test_a_version_that_is_none_is_refused(run_copy: Path, version: object) -> None:
    edit_card(run_copy, schema_version=version)
    with pytest.raises(RunError, match="schema_version"):
        open_run(run_copy)


@pytest.mark.parametrize("changes", [{"files": {}}, {"files": []}, {"model": "x"}, {"files": {"heads.parquet": 3}}])
def test_a_card_that_is_no_card(run_copy: Path, changes: dict[str, object]) -> None:
    edit_card(run_copy, **changes)
    with pytest.raises(RunError) as caught:
        _ = open_run(run_copy).card
    one_line(caught, "card.json")


def test_a_card_may_not_point_outside(run_copy: Path) -> None:
    value = json.loads((run_copy / "card.json").read_text())
    edit_card(run_copy, files={**value["files"], "../../secret": {"sha256": "0", "bytes": 0}})
    with pytest.raises(RunError, match="secret"):
        open_run(run_copy)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        open_run(tmp_path / "nothing")
    with pytest.raises(RunError, match="not a run directory"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="it is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(RunError, match="no such directory"):
        list_runs(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run.statistic("row/entrpy"), "did you mean row/entropy"),
        (lambda run: run.statistic("row/entropy", 7), "layers 0..1"),
        (lambda run: run.statistic("row/entropy", 0, 4), "heads 0..3"),
        (lambda run: run.map("block_mean", 0, 0), "block_mass"),
        (lambda run: run.map("block_mass", 0, -1), "heads 0..3"),
        (lambda run: run.map("block_mass", 0, 0, 9), "levels 0..2"),
    ],
)
def test_what_a_run_does_not_have(saved: Path, ask, words: str) -> None:
    for source in (open_run(saved), content()):
        with pytest.raises(RunError, match=words):
            ask(source)


def test_only_what_is_asked_for_is_read(run_copy: Path) -> None:
    """Damage in the maps of layer 1 is not met by somebody who reads the table, a statistic, and the maps of layer 0."""
    place = run_copy / "maps.zarr/block_mass/0/c.1.0.0.0"
    content = bytearray(place.read_bytes())
    content[10] ^= 0xFF
    place.write_bytes(bytes(content))
    run = open_run(run_copy)
    assert len(run.heads) == LAYERS * HEADS
    assert run.statistic("row/entropy", 0, 0).shape == (TOKENS,)
    assert run.map("block_mass", 0, 0).shape == (19, 19)
    with pytest.raises(RunError, match="content is not what was written"):
        run.map("block_mass", 1, 0)


def test_one_heads_statistics_are_checked_without_the_others(run_copy: Path) -> None:
    place = run_copy / "statistics.safetensors"
    data = bytearray(place.read_bytes())
    data[-100] ^= 0xFF  # row/entropy of the last layer
    place.write_bytes(bytes(data))
    run = open_run(run_copy)
    assert run.statistic("row/argmax").shape == (LAYERS, HEADS, TOKENS)
    assert run.statistic("row/entropy", 0, 3).shape == (TOKENS,)
    for ask in ((1, 0), (1, None), (None, 2)):
        with pytest.raises(RunError, match="wrong checksum of row/entropy, layer 1"):
            run.statistic("row/entropy", *ask)


def test_statistics_of_a_run_that_lists_no_checksums_of_layers(run_copy: Path) -> None:
    """As the first headscope wrote it: the file's own checksum is checked."""
    value = json.loads((run_copy / "card.json").read_text())
    value["files"]["statistics.safetensors"].pop("layers")
    edit_card(run_copy, files=value["files"])
    np.testing.assert_array_equal(open_run(run_copy).statistic("row/entropy", 1), content().arrays["row/entropy"][1])
    place = run_copy / "statistics.safetensors"
    data = bytearray(place.read_bytes())
    data[-100] ^= 0xFF
    place.write_bytes(bytes(data))
    with pytest.raises(RunError, match="checksum"):
        open_run(run_copy).statistic("row/argmax", 0, 0)


def test_list_runs_names_the_damaged(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "good")
    shutil.copytree(saved, tmp_path / "bad")
    (tmp_path / "bad" / "tokens.json").unlink()
    (tmp_path / ".good.host.1.00000000.partial").mkdir()
    (tmp_path / "other").mkdir()
    entries = {entry.name: entry for entry in list_runs(tmp_path)}
    assert set(entries) == {"good", "bad"}
    assert entries["good"].card["model"]["name"] == "tiny"
    assert entries["good"].error is None
    assert entries["bad"].card is None
    assert "tokens.json" in entries["bad"].error
    assert [entry.name for entry in list_runs(tmp_path / "good")] == ["good"]


def test_write_run_takes_plain_data(tmp_path: Path) -> None:
    path = write_run(tmp_path / "deep" / "run", card().to_dict(), table())
    assert open_run(path).card.numbers == {"sink_rate": 0.5}


def reading_environment() -> dict[str, str]:
    """An environment in which a child process finds the same headscope."""
    import headscope

    source = str(Path(next(iter(headscope.__path__))).parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


READER = """
import sys
from headscope.profile import HeadProfile
found = HeadProfile.load(sys.argv[1])
assert len(found.table) == 8 and found.map("block_mass", 0, 0).shape == (19, 19) and found.statistic("row/entropy").ndim == 3
assert found.tile("block_max", 0, 1, 2, 0, 0).shape == (19, 19) and found.kept_layers == ()
assert "torch" not in sys.modules, "reading a run loaded torch"
"""


def test_reading_a_run_needs_no_torch(saved: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", READER, str(saved)], env=reading_environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
