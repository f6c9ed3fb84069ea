"""The view in the address: it survives the way there and back, and nothing that the run lacks gets through."""

from __future__ import annotations

import pytest

from headscope.app.components.head_state import HeadState, usual
from headscope.app.urls import choice, choices, position, span

VIEW = HeadState(
    plane="max",
    scale="row",
    hide_sink=True,
    window=(10, 150, 0, 64),
    series=["entropy", "row_max"],
    colour="distance",
    token=77,
    key=12,
    plan="mine",
    pins="1.2,0.3",
)


def test_a_view_survives_its_address(run) -> None:
    assert HeadState.read(VIEW.query(run), run) == VIEW


def test_defaults_are_left_out_of_the_address(run) -> None:
    state = HeadState.read({}, run)
    assert state.query(run) == {}
    assert usual(run) == {"plane": "mass", "scale": "log", "colour": "column_sum", "plots": ",".join(state.series)}


@pytest.mark.parametrize(
    "query",
    [
        {"plane": "exact", "scale": "../..", "colour": "nope", "token": "200", "q": "5-2", "k": "0-10"},
        {"plane": ["mass", "max"], "token": "-1", "q": "0-99999999999999999999999", "k": "a-b"},
        {"token": "1e3", "plots": "nope,neither", "q": "10", "sink": "1"},
        {"token": "\u0663", "plane": ""},
        {"key": "-3", "pins": "9.9,evil,../x", "plan": ["a", "b"]},
        {"key": "4000", "plan": "x" * 300},
    ],
)
def test_what_a_run_lacks_falls_back_to_the_default(run, query: dict[str, object]) -> None:
    state = HeadState.read(query, run)
    if query.get("token") == "\u0663":  # an Arabic 3 is a number too
        assert state.token == 3
        state = HeadState.read({**query, "token": ""}, run)
    assert state == HeadState.read({}, run)


def test_callbacks_pass_the_same_checks(run) -> None:
    state = HeadState.checked(run, plane="evil", scale="linear", window=[0, 500, 3, 9], series=["entropy", "evil"], colour="evil", token=-1)
    assert state.plane == "mass"
    assert state.scale == "linear"
    assert state.window == (0, 200, 3, 9)
    assert state.series == ["entropy"]
    assert state.colour == "column_sum"
    assert state.token is None
    assert HeadState.checked(run, window=[]).window is None
    assert HeadState.checked(run, series=[]).series == []


def test_readers_of_single_values() -> None:
    assert choice({"a": "x"}, "a", ["x", "y"], "y") == "x"
    assert choice({"a": 3}, "a", ["x", "y"], "y") == "y"
    assert choices({"a": "y,x,y,z"}, "a", ["x", "y"], ["x"]) == ["y", "x"]
    assert choices({}, "a", ["x"], ["x"]) == ["x"]
    assert span({"q": "3-900"}, "q", 200) == (3, 200)
    assert span({"q": "300-900"}, "q", 200) is None
    assert position({"t": "199"}, "t", 200) == 199
    assert position({"t": "200"}, "t", 200) is None
