"""Runs written a layer at a time: the same files as at once, nothing left in memory, nothing left behind when it fails."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from headscope.errors import CaptureError, RunError, StatisticError
from headscope.scope import Scope
from headscope.store import MapInfo, RunContent, RunLayout, open_run, run_writer, write_run
from headscope.store.files import StatisticsWriter
from headscope.store.pyramid import build_pyramid
from headscope.store.synthetic import write_synthetic_run

from .test_store_run import card, content, table
from .tiny_models import ids, llama, make

PLANES = ("block_mass", "block_max")


def layer_parts(whole: RunContent, index: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return {name: values[index] for name, values in whole.arrays.items()}, {plane: whole.pyramids[plane][0][index] for plane in PLANES}


def test_layers_may_come_in_any_order_and_give_the_same_files(tmp_path: Path) -> None:
    whole = content()
    at_once = write_run(tmp_path / "once", card().to_dict(), table(), whole)
    kinds = {name: values.dtype for name, values in whole.arrays.items()}
    with run_writer(tmp_path / "parts", RunLayout((0, 1), 4, 300, kinds, whole.maps)) as writer:
        for layer in (1, 0):
            views = writer.layer(layer, *layer_parts(whole, layer))
            for name, view in views.items():
                np.testing.assert_array_equal(view, whole.arrays[name][layer])
        writer.finish(card().to_dict(), table(), whole.tokens)
    ours, theirs = open_run(at_once).card.files, open_run(tmp_path / "parts").card.files
    assert ours == theirs
    assert len([name for name in ours if name.startswith("maps.zarr")]) > 6


def test_the_statistics_file_is_one_that_the_library_reads(tmp_path: Path) -> None:
    whole = content()
    shapes = {name: (values.dtype, values.shape) for name, values in whole.arrays.items()}
    for order in ((0, 1), (1, 0)):
        writer = StatisticsWriter(tmp_path / f"{order[0]}.safetensors", shapes)
        for layer in order:
            for name, values in whole.arrays.items():
                writer.write(name, layer, values[layer])
        with pytest.raises(ValueError, match="is not"):
            writer.write("row/entropy", 0, np.zeros((4, 299), np.float32))
        writer.close()
        found = load_file(tmp_path / f"{order[0]}.safetensors")
        assert set(found) == set(whole.arrays)
        for name, values in whole.arrays.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_a_layer_with_fewer_heads_is_filled_up(tmp_path: Path) -> None:
    info = MapInfo(16, 32, True, PLANES, (2,))
    kinds = {"row/entropy": np.dtype(np.float32), "row/argmax": np.dtype(np.int32)}
    with run_writer(tmp_path / "run", RunLayout((0,), 4, 32, kinds, info)) as writer:
        values = {"row/entropy": np.ones((3, 32), np.float32), "row/argmax": np.zeros((3, 32), np.int64)}
        writer.layer(0, values, {plane: np.ones((3, 2, 2), np.float32) for plane in PLANES})
        writer.finish(card().to_dict(), table(), None)
    run = open_run(tmp_path / "run")
    assert np.isnan(run.statistic("row/entropy", 0, 3)).all()
    assert (run.statistic("row/argmax", 0, 3) == -1).all()
    assert np.isnan(run.map("block_mass", 0, 3)).all()
    assert (run.map("block_mass", 0, 2) == 1).all()


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((0, "finish"), r"layers \[1\]: they were never written"),
        ((0, 0), "written before"),
        ((7,), r"layers \[0, 1\]"),
        ((0,), "card was never written"),
    ],
)
def test_each_layer_is_written_once_and_none_is_missing(tmp_path: Path, layers: tuple[Any, ...], words: str) -> None:
    whole = content()
    layout = RunLayout((0, 1), 4, 300, {name: values.dtype for name, values in whole.arrays.items()}, whole.maps)

    def write() -> None:
        with run_writer(tmp_path / "run", layout) as writer:
            for layer in layers:
                if layer == "finish":
                    writer.finish(card().to_dict(), table(), None)
                else:
                    writer.layer(layer, *layer_parts(whole, 0))

    with pytest.raises(RunError, match=words):
        write()
    assert list(tmp_path.iterdir()) == []


def test_q_and_k_that_were_promised_are_missed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="to be kept"), run_writer(tmp_path / "run", RunLayout((0,), 4, 300, kept=(0,))) as writer:
        writer.layer(0, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_the_writing_thread_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headscope.store.write.write_kept", full_disk)
    with pytest.raises(RunError, match="No space left"):
        write_synthetic_run(tmp_path / "run", tokens=64, width=8)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_measurement_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights"), run_writer(tmp_path / "run", RunLayout((0,), 1, 4)):
        raise FileNotFoundError("weights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [{"heads": 3, "kv_heads": 2}, {"window": (5,)}, {"tokens": 3}, {"layers": 0}])
def test_synthetic_runs_refuse_sizes_that_do_not_fit(tmp_path: Path, sizes: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="heads a multiple of kv_heads"):
        write_synthetic_run(tmp_path / "run", **sizes)


# ---- layers collected from a capture -----------------------------------------------------------------------------------


class Collect:
    """Takes everything but the entropy away, and watches what becomes of it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: dict[str, list[Any]] = {}
        self.copies: dict[str, dict[str, torch.Tensor]] = {}

    def __call__(self, module: str, values: dict[str, torch.Tensor], kept: Any) -> dict[str, torch.Tensor]:
        gc.collect()
        assert all(ref() is None for refs in self.seen.values() for ref in refs), "an earlier layer is still in memory"
        self.copies[module] = {name: value.clone() for name, value in values.items()}
        self.seen[module] = [weakref.ref(values["block_mass"]), weakref.ref(kept.calls[0].q), weakref.ref(kept.pieces[0])]
        return {"entropy": values["entropy"]}


@pytest.mark.parametrize("chunk", [None, 9])
def test_a_collector_gets_each_layer_when_it_is_complete_and_the_memory_is_free(chunk: int | None) -> None:
    scope, tokens = Scope(make(llama)), ids(1, 30)
    plain = scope.capture(tokens, chunk=chunk)
    collect = Collect(30)
    stats = scope.capture(tokens, chunk=chunk, keep="all", collect=collect)
    assert list(collect.copies) == [module.name for module in scope.topology.main]
    for module, values in collect.copies.items():
        assert set(values) == set(plain.names)
        for name, value in values.items():
            assert torch.equal(value.nan_to_num(), plain[name][module].nan_to_num())
        assert torch.equal(stats["entropy"][module], plain["entropy"][module])
    with pytest.raises(StatisticError, match="was not measured"):
        stats["block_mass"][0]
    with pytest.raises(StatisticError, match="were not kept"):
        stats.weights(0, 0, [0], [0])


def test_rows_after_the_collection_are_refused() -> None:
    with pytest.raises(CaptureError, match="collect the text alone"):
        Scope(make(llama)).capture(ids(1, 12), generate=2, keep="all", collect=Collect(12))


def test_pyramids_of_one_head_or_many_are_the_same() -> None:
    values = np.random.default_rng(0).random((2, 3, 37, 37)).astype(np.float32)
    for plane in PLANES:
        many = build_pyramid(values, plane)
        for level, one in enumerate(build_pyramid(values[1, 2], plane)):
            np.testing.assert_array_equal(many[level][1, 2], one)
