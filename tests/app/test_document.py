"""The document of the first paint without a browser: what it holds, that no text in it becomes markup, how long a browser keeps it."""

from __future__ import annotations

import gzip
import html as escapes
import json
import re
import subprocess
import sys
from pathlib import Path

import dash_mantine_components as dmc
import pytest
from dash import dcc, html

from headscope.app.components.role_legend import role_badge
from headscope.app.factory import create_app
from headscope.app.site import PAGES, page_at
from headscope.app.static_html import static_html, style_text, values_of
from headscope.app.warm import warm
from headscope.profile.card import RunCard
from headscope.store import open_run, write_run
from headscope.store.read import read_card

LOCAL = {"Host": "localhost"}
ASSETS = Path(__file__).parents[2] / "app" / "assets"


@pytest.fixture
def client(app):
    return app.server.test_client()


def read(client, path: str) -> str:
    answer = client.get(path, headers=LOCAL)
    assert answer.status_code == 200
    return answer.get_data(as_text=True)


def test_components_become_html_and_texts_stay_texts() -> None:
    page = html.Div(
        [
            html.H1(["<b>", 3, None, True]),
            dcc.Link("on & on", href='/a?b="c"', title="<i>"),
            dcc.Graph(id="g", figure={"layout": {"height": 120}}, className="graph"),
            html.Span("x", id="s", style={"fontSize": 12, "flex": 1, "--own": 3, "marginTop": 0}, **{"data-k": "v"}),
            html.Button("go", disabled=True, n_clicks=3),
            html.Img(src="/x.svg", alt=""),
            dcc.Store(id="kept", data={"secret": "</script>"}),
        ],
        className="page",
        hidden=False,
    )
    assert static_html(page) == (
        '<div class="page"><h1>&lt;b&gt;3</h1><a title="&lt;i&gt;" href="/a?b=&quot;c&quot;">on &amp; on</a>'
        '<div class="graph" style="height:120px"></div>'
        '<span data-id="s" style="font-size:12px;flex:1;--own:3px;margin-top:0" data-k="v">x</span>'
        '<button disabled>go</button><img src="/x.svg"></div>'
    ).replace(' title="&lt;i&gt;" href="/a?b=&quot;c&quot;"', _link_attributes(page))


def _link_attributes(page: html.Div) -> str:
    """In the order in which Dash lists a component's properties."""
    props = page.children[1].to_plotly_json()["props"]
    names = [name for name in props if name in ("href", "title")]
    return "".join(f' {name}="{escapes.escape(props[name])}"' for name in names)


def test_style_numbers_are_pixels_where_css_wants_them() -> None:
    assert style_text({"width": 10, "opacity": 0.5, "borderTop": "1px solid"}) == "width:10px;opacity:0.5;border-top:1px solid"


def test_controls_show_their_values_and_carry_their_names() -> None:
    made = static_html(
        [
            dmc.SegmentedControl(id="plane", value="max", data=[{"value": "mass", "label": "mass"}, {"value": "max", "label": "max <"}]),
            dmc.Switch(id="hide", checked=True, label="Hide"),
            dmc.Select(id="pick", value="b", data=[{"group": "G", "items": [{"value": "b", "label": "Bee"}]}]),
            dmc.MultiSelect(id="many", value=["x", "y"], data=["x", "y", "z"]),
            dmc.TextInput(id="find", value='a"b', placeholder="Find"),
        ]
    )
    assert re.search(r'<label class="st-on"><input [^>]*data-first="plane" value="max" checked>max &lt;</label>', made)
    assert re.search(r'data-first="hide" checked>', made)
    assert 'value="Bee"' in made
    assert made.count("st-pill") == 2
    assert 'data-first="find" value="a&quot;b"' in made


def test_values_are_found_wherever_they_are() -> None:
    page = html.Div([html.P([dcc.Store(id="a", data=[1]), dmc.Switch(id="b", checked=False)]), dmc.Select(id="c", value=None, data=["x"])])
    assert values_of(page, {"a", "b", "c"}) == {"a": [1], "b": False, "c": None}
    assert values_of(page, {"d"}) == {}


def test_the_document_holds_the_page_and_no_script_of_the_application_runs(client, run) -> None:
    document = read(client, "/run/tiny/head/2/1?plane=max&token=3")
    assert "<title>Head · headscope</title>" in document
    assert "<h1>Layer 2 · Head 1</h1>" in document
    for role in run.reasons[2, 1]:
        assert static_html(role_badge(run, role)) in document
    values = json.loads(re.findall(r'<script id="first-values" type="application/json">(.*?)</script>', document, flags=re.DOTALL)[0])
    assert values["plane"] == "max"
    assert values["token"] == 3
    assert values["viewer-facts"]["run"] == "tiny"
    hint = re.findall(r'<link rel="preload" as="fetch" crossorigin="anonymous" href="([^"]+)">', document)
    assert hint[0].startswith("/api/run/tiny/2/1/tile/max/")
    assert client.get(hint[0], headers=LOCAL).status_code == 200
    tags = re.findall(r"<script([^>]*)src=\"([^\"]+)\"", document)
    running = [source for attributes, source in tags if "headscope/" not in attributes]
    assert [source.split("?")[0] for source in running] == ["/assets/all.js"]
    waiting = [source for attributes, source in tags if "headscope/later" in attributes]
    assert any("dash_renderer" in source for source in waiting)
    assert not any("dash_table" in source or "dash_ag_grid" in source for source in waiting)
    assert [source for attributes, source in tags if "headscope/spare" in attributes and "dash_ag_grid" in source]


def test_a_text_in_the_page_ends_no_script(synthetic, tmp_path: Path) -> None:
    card = {**read_card(synthetic.path), "files": {}}
    name = "</script><img src=x onerror=alert(1)>\u2028"
    card["model"] = {**card["model"], "name": name}
    write_run(tmp_path / "runs" / "evil", card, synthetic.table, open_run(synthetic.path))
    client = create_app(tmp_path / "runs").server.test_client()
    for path in ("/", "/run/evil", "/run/evil/head/0/0", "/run/evil/plan", "/compare?a=evil&b=evil"):
        document = read(client, path)
        assert "<img src=x" not in document
        assert "alert(1)" in document


def test_every_page_has_a_first_paint(client) -> None:
    for path, title in (
        ("/", "Runs"),
        ("/run/tiny", "Synthetic-1B"),
        ("/run/tiny/plan", "Sparse plan of Synthetic-1B"),
        ("/run/nope", "This run cannot be shown"),
        ("/run/tiny/head/9/9", "There is no such head"),
        ("/run/tiny/pictures", "This run has no picture"),
        ("/compare?a=tiny&b=tiny", "tiny and tiny"),
        ("/live", "No model is loaded"),
        ("/nowhere/at/all", "There is nothing at this address"),
    ):
        assert re.search(rf"<h1>[^<]*{title}", read(client, path)), path


def test_addresses_lead_to_pages() -> None:
    assert {page.name for page in PAGES} == {"plan", "head", "pictures", "heads", "runs", "not_found_404", "compare", "live"}
    found = page_at("/run/a/head/1/2")
    assert found is not None
    assert (found[0].name, found[1]) == ("head", {"run": "a", "layer": "1", "head": "2"})
    assert page_at("")[0].name == "runs"
    assert page_at("/run/a/b") is None


def test_our_scripts_are_one_file_that_a_browser_keeps(client) -> None:
    document = read(client, "/")
    for kind, first, last in (("js", "headscope.js", "visit/3-spare.js"), ("css", "headscope.css", "visit/first.css")):
        address = re.findall(rf'(?:src|href)="(/assets/all\.{kind}\?v=[0-9a-f]+)"', document)
        assert len(address) == 1
        answer = client.get(address[0], headers={**LOCAL, "Accept-Encoding": "gzip"})
        text = gzip.decompress(answer.data).decode()
        assert text.startswith((ASSETS / first).read_text())
        assert text.endswith((ASSETS / last).read_text())
        assert "immutable" in answer.headers["Cache-Control"]
    assert client.get("/assets/all.txt", headers=LOCAL).status_code == 404
    assert "immutable" in client.get("/assets/logo.svg?m=1", headers=LOCAL).headers["Cache-Control"]


def test_a_document_is_small(client) -> None:
    for path in ("/run/tiny", "/run/tiny/head/1/1", "/"):
        assert len(read(client, path)) < 60_000


def test_the_application_is_imported_and_a_page_drawn_without_torch(synthetic, tmp_path: Path) -> None:
    card = {**read_card(synthetic.path), "files": {}}
    card["metrics"] = {name: {"title": "", "unit": "u"} for name in ("sink", "distance", "induction", "receiver")}
    write_run(tmp_path / "runs" / "new", card, synthetic.table, open_run(synthetic.path))
    code = (
        "import sys; from headscope.app.factory import create_app; "
        f"answer = create_app({str(tmp_path / 'runs')!r}).server.test_client().get('/run/new/head/1/1', headers={{'Host': 'localhost'}}); "
        "assert answer.status_code == 200 and b'Layer 1' in answer.data; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("token", [None, "s3cret"])
def test_warming_visits_as_a_browser_would(synthetic, token: str | None) -> None:
    app = create_app(synthetic.path.parent, token=token)
    seen: list[tuple[str, int]] = []

    @app.server.after_request
    def note(response):
        import flask

        seen.append((flask.request.path, response.status_code))
        return response

    warm(app.server, token, pause=0)
    assert {status for _, status in seen} == {200}
    paths = [path for path, _ in seen]
    assert "/run/tiny/head/0/0" in paths
    assert any("plotly.min.js" in path for path in paths)
    assert any("/tile/" in path for path in paths)


def test_a_changed_model_is_named_on_card_page_and_list(synthetic, tmp_path: Path) -> None:
    card = {**read_card(synthetic.path), "files": {}}
    card["interventions"] = [{"name": "head_mask", "what": "heads 0.1 <give> zero"}]
    write_run(tmp_path / "runs" / "masked", card, synthetic.table, open_run(synthetic.path))
    assert RunCard.from_dict(read_card(tmp_path / "runs" / "masked")).interventions == card["interventions"]
    client = create_app(tmp_path / "runs").server.test_client()
    for path in ("/", "/run/masked", "/run/masked/head/0/1"):
        assert 'title="heads 0.1 &lt;give&gt; zero">measured under head_mask</span>' in read(client, path), path
    assert "<dt>Changed</dt><dd><ul><li>heads 0.1 &lt;give&gt; zero</li></ul></dd>" in read(client, "/run/masked")
    plain = create_app(synthetic.path.parent).server.test_client()
    assert "measured under" not in read(plain, "/run/tiny/head/0/1")
