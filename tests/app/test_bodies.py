"""What is posted to callbacks: values of other types are refused with 400 and say why, before anything runs; defects stay defects."""

from __future__ import annotations

from typing import Any

import pytest
import werkzeug.exceptions

from headscope.app.application import typed

LOCAL = {"Host": "localhost"}
NAMES: tuple[Any, ...] = ([1, [2]], {"a": 1}, 3.5, True, ["x"], -1, "nonsense", "", None, "9" * 400, [99, 99], [-1, 0], 10**30, ["a", "b"])


@pytest.fixture
def client(app):
    found = app.server.test_client()
    found.get("/", headers=LOCAL)
    return found


def body_of(known: dict[str, Any], output: str, values: list[Any]) -> dict[str, Any]:
    """The body that a browser sends, with given values in the order of inputs and states."""
    rows = [*known["inputs"], *known["state"]]
    filled = [{"id": row["id"], "property": row["property"], "value": value} for row, value in zip(rows, values, strict=True)]
    first = len(known["inputs"])
    parts = output.strip(".").split("...")
    outputs = [dict(zip(("id", "property"), part.split("@")[0].rsplit(".", 1), strict=True)) for part in parts]
    return {
        "output": output,
        "outputs": outputs if output.startswith("..") else outputs[0],
        "inputs": filled[:first],
        "state": filled[first:],
        "changedPropIds": [f"{filled[0]['id']}.{filled[0]['property']}"],
    }


def test_no_value_of_any_callback_makes_a_server_error(app, client) -> None:
    """Each argument in turn of every callback of the server, with values of every type."""
    asked, refused = 0, 0
    for output, known in app.callback_map.items():
        if "callback" not in known:
            continue  # in the browser
        count = len(known["inputs"]) + len(known["state"])
        usual = [USUAL.get(f"{row['id']}.{row['property']}") for row in (*known["inputs"], *known["state"])]
        for place in range(count):
            for wrong in NAMES:
                values = [wrong if at == place else value for at, value in enumerate(usual)]
                answer = client.post("/_dash-update-component", json=body_of(known, output, values), headers=LOCAL)
                asked += 1
                refused += answer.status_code == 400
                assert answer.status_code in (200, 204, 400), (output, place, wrong, answer.status_code)
    assert asked > 500
    assert refused > 200


USUAL = {
    "_pages_location.pathname": "/run/tiny",
    "_pages_location.search": "",
    "run-id.data": "tiny",
    "place.data": [1, 2],
    "metric.value": "sink",
    "scale.value": "value",
    "scheme-now.data": "",
    "picked.data": "",
    "pins.data": "",
    "scatter-x.value": "sink",
    "scatter-y.value": "induction",
    "token.data": 3,
    "key.data": 2,
    "colour.value": "entropy",
    "strip-page.value": 1,
    "compare-runs.data": ["tiny", "tiny"],
    "compare-metric.value": "sink",
    "compare-head.data": "1.2",
    "plan-run.data": "tiny",
    "plan-method.value": "streaming",
    "plan-bound.value": "density",
    "plan-share.value": 50,
    "plan-length.value": "200",
    "plan-format.value": "headscope",
    "live-change.value": "mask",
    "live-mode.value": "zero",
    "lines-wanted.data": True,
}


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        None,
        {},
        {"output": 3},
        {"output": "nothing.here", "inputs": []},
        {"output": ".._pages_content.children..._pages_store.data..", "inputs": []},
        {"output": ".._pages_content.children..._pages_store.data..", "inputs": ["a", "b"], "outputs": []},
        {"output": ".._pages_content.children..._pages_store.data..", "inputs": [{"id": 1}, {"id": 2}]},
    ],
)
def test_a_body_that_is_no_callback_is_refused(client, body: Any) -> None:
    assert client.post("/_dash-update-component", json=body, headers=LOCAL).status_code in (400, 415)


def test_the_refusal_names_the_argument(client, app) -> None:
    output = next(name for name in app.callback_map if "find-note.children" in name)
    known = app.callback_map[output]
    answer = client.post("/_dash-update-component", json=body_of(known, output, [["a", "list"], "tiny"]), headers=LOCAL)
    assert answer.status_code == 400
    assert "text: Input should be a valid string" in answer.get_data(as_text=True)


def test_types_are_those_of_the_signature_and_defects_pass_through() -> None:
    def update(run: str, place: list[int], scheme: str | None, given: Any) -> int:
        return place[5]

    checked = typed(update)
    with pytest.raises(IndexError):
        checked("a", [1, 2], None, object())
    for wrong in ((1, [1], None, 0), ("a", ["1"], None, 0), ("a", [True], None, 0), ("a", [1], 2, 0), ("a", "12", None, 0)):
        with pytest.raises(werkzeug.exceptions.BadRequest):
            checked(*wrong)
