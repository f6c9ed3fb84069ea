"""Four clients at once on a small run: no errors, every tile answered, and the numbers say what was measured."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from headscope.app import load
from headscope.app.server import listen
from headscope.store.synthetic import write_synthetic_run


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = tmp_path_factory.mktemp("load")
    write_synthetic_run(root / "run", tokens=1500, layers=1, heads=2, kv_heads=1, width=8, block=16)
    server = listen(root, "127.0.0.1", 0)
    threading.Thread(target=server.run, daemon=True).start()
    yield f"http://127.0.0.1:{server.effective_port}"
    server.close()


def test_four_clients_get_every_tile(address: str) -> None:
    result = load.run(address, "run", clients=4, rate=40, seconds=2)
    found = result.to_dict()
    assert found["errors"] == 0, found
    assert found["requests"] == 80
    assert result.exact
    assert result.stored
    assert found["largest_bytes"] < 2_000_000
    assert 0 < found["all"]["p50"] <= found["all"]["p95"] <= found["all"]["max"]


def test_the_command_prints_json_and_fails_on_errors(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load.main([address, "run", "--clients", "2", "--rate", "20", "--seconds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 20
    monkeypatch.setattr(load, "walk", lambda dice, facts, exact: iter([(False, "tile/mass/3/0/0")] * 99))
    assert load.main([address, "run", "--clients", "1", "--rate", "10", "--seconds", "1"]) == 1
    assert "404" in json.loads(capsys.readouterr().out)["first_errors"][0]
    with pytest.raises(SystemExit, match="not among the runs"):
        load.run(address, "nope")


def test_the_walk_stays_below_the_diagonal() -> None:
    facts = {"tokens": 131_072, "tile": 256, "stored": [128, 256, 512], "exact": [1, 2, 4, 8]}
    steps = list(islice(load.walk(random.Random(0), facts, 0.3), 500))
    assert any(near for near, _ in steps)
    for near, path in steps:
        _, _, block, i, j = path.split("/")
        assert int(j) <= int(i)
        assert (int(block) in (1, 2)) == near
        assert int(i) * 256 * int(block) < 131_072
