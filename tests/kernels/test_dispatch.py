"""Which backend runs, and what is refused before any runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from statistics_cases import make_call

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import CaptureError, StatisticError, UnavailableError
from headscope.kernels import backend_for, dispatch, measure, use_backend
from headscope.statistics.request import StatisticsRequest


def test_cpu_is_blocked_and_the_choice_ends_with_its_block() -> None:
    call = make_call(rows=10)
    assert backend_for(call) == "blocked"
    with use_backend("naive"):
        assert backend_for(call) == "naive"
        assert measure(call, StatisticsRequest()).rows["lse"].dtype == torch.float64
        with use_backend("blocked"):
            assert backend_for(call) == "blocked"
        assert backend_for(call) == "naive"
    with pytest.raises(RuntimeError, match="stop"), use_backend("naive"):
        raise RuntimeError("stop")
    assert backend_for(call) == "blocked"


def test_unknown_backend() -> None:
    with pytest.raises(UnavailableError, match="did you mean blocked"), use_backend("bloked"):
        pass


def test_a_choice_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_refuses", lambda call, request: "triton is not installed")
    with use_backend("triton"), pytest.raises(UnavailableError, match="triton is not installed"):
        measure(make_call(rows=10), StatisticsRequest())


SHAPES = {
    "group": ({"k": torch.zeros(1, 3, 8, 16)}, "divide evenly"),
    "width": ({"k": torch.zeros(1, 2, 8, 8)}, "share batch and width"),
    "rank": ({"q": torch.zeros(4, 8, 16)}, r"\[B, H, N, D\]"),
    "empty": ({"k": torch.zeros(1, 2, 0, 16)}, "nothing to attend to"),
    "softcap": ({"softcap": 0.0}, "positive softcap"),
    "window": ({"mask": MaskFacts(True, window=0)}, "not even see itself"),
    "valid": ({"mask": MaskFacts(True, key_valid=torch.ones(1, 7, dtype=torch.bool))}, r"needs \[1, 8\]"),
    "valid_dtype": ({"mask": MaskFacts(True, key_valid=torch.ones(1, 8))}, "bool"),
    "segments": ({"mask": MaskFacts(True, key_segments=torch.zeros(1, 8))}, "one side only"),
    "allowed": ({"mask": MaskFacts(True, allowed=torch.ones(1, 3, 8, 8, dtype=torch.bool))}, r"mask\.allowed"),
    "sinks": ({"sink_logits": torch.zeros(3)}, r"sink_logits \[3\]"),
    "scale": ({"scale": float("nan")}, "real numbers"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_calls_that_do_not_fit(case: str) -> None:
    change, message = SHAPES[case]
    call: AttentionCall = replace(make_call(rows=8), **change)
    with pytest.raises(CaptureError, match=message):
        measure(call, StatisticsRequest())


def test_requests_that_do_not_fit() -> None:
    call = make_call(rows=8, batch=2)
    with pytest.raises(StatisticError, match="batch is 2"):
        measure(call, StatisticsRequest(rows=torch.ones(3, 8, dtype=torch.bool)))
    pairs = {"a": (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))}
    with pytest.raises(StatisticError, match="3 queries, 4 keys"):
        measure(call, StatisticsRequest(names=("pairs",), pairs=pairs))
