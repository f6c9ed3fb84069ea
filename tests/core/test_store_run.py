"""Run directories: what is written comes back, what is damaged is refused in one line, what is unfinished is not seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
                run.map(plane, layer, 0, level)


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
    one_line(caught, name, "checksum")
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
    with pytest.raises(RunError, match="checksum"):
        run.map("block_mass", 1, 0)


def test_an_existing_path_is_refused_unless_asked(run_copy: Path, tmp_path: Path) -> None:
    profile = HeadProfile(table(), card())
    with pytest.raises(RunError, match="exists already"):
        profile.save(run_copy)
    assert (run_copy / "maps.zarr").is_dir()
    profile.save(run_copy, overwrite=True)
    assert not (run_copy / "maps.zarr").exists()
    open_run(run_copy).verify()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run directory"):
        profile.save(other, overwrite=True)
    assert (other / "chapter.txt").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import headscope.store.write as write

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.files, "write_tokens", full_disk)
    with pytest.raises(RunError, match="No space left"):
        a_profile().save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        HeadProfile(table(), card()).save(tmp_path / "file" / "run")


KILLED = """
import os, signal, sys
import pandas as pd
import headscope.store.write as write
from headscope.store import RunContent, Tokens

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

write.files.write_tokens = kill
heads = pd.DataFrame({"layer": [0], "head": [0], "kv_head": [0], "module": ["m"], "kind": ["full"], "roles": [[]], "reasons": [{}]})
write.write_run(sys.argv[1], {"created": ""}, heads, RunContent((0,), Tokens("a", (1,), ("a",))))
"""


def reading_environment() -> dict[str, str]:
    """An environment in which a child process finds the same headscope."""
    import headscope

    source = str(Path(next(iter(headscope.__path__))).parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def test_a_killed_writer_leaves_no_run_and_the_next_one_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "run"
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(target)], env=reading_environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = list(tmp_path.iterdir())
    assert [entry.name.startswith(".run.") for entry in left] == [True]
    assert (left[0] / "heads.parquet").exists()
    assert list_runs(tmp_path) == []
    HeadProfile(table(), card()).save(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_sibling_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    from headscope.store.atomic import atomic_directory

    with atomic_directory(tmp_path / "run") as folder:
        with atomic_directory(tmp_path / "run") as other:
            (other / "card.json").write_text("{}")
        assert folder.is_dir()
        shutil.rmtree(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


def test_a_run_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    from headscope.store.atomic import atomic_directory

    def write() -> None:
        with atomic_directory(tmp_path / "run") as folder:
            (folder / "card.json").write_text("second")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "card.json").write_text("first")

    with pytest.raises(RunError, match="exists already"):
        write()
    assert (tmp_path / "run" / "card.json").read_text() == "first"


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


READER = """
import sys
from headscope.profile import HeadProfile
found = HeadProfile.load(sys.argv[1])
assert len(found.table) == 8 and found.map("block_mass", 0, 0).shape == (19, 19) and found.statistic("row/entropy").ndim == 3
assert "torch" not in sys.modules, "reading a run loaded torch"
"""


def test_reading_a_run_needs_no_torch(saved: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", READER, str(saved)], env=reading_environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
