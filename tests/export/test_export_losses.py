"""The loss report: what it says of each head, and its attention mass against eager attention."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.errors import ExportError
from headscope.export import find
from headscope.export.words import same, word
from headscope.plans import Budget, Dense, Pattern, Span, SparsePlan, Streaming, TopBlocks, VerticalSlash
from headscope.profile import HeadProfile
from headscope.scope import Scope

from .plan_cases import GROUPED, mask


@pytest.fixture(scope="module")
def scope() -> Scope:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    return Scope(LlamaForCausalLM(config).eval(), name="tiny")


@pytest.fixture(scope="module")
def run(scope: Scope) -> HeadProfile:
    """A run that kept q and k, so that kept mass is exact."""
    return scope.profile(
        probes=["locality"], data=torch.randint(1, 97, (128,), generator=torch.Generator().manual_seed(2)), context=128, keep="all"
    )


def eager_kept(scope: Scope, run: HeadProfile, layer: int, head: int, pattern: Pattern) -> float:
    """Kept share of eager attention's weights on the run's text."""
    assert run.tokens is not None
    ids = torch.tensor(run.tokens.ids)[None]
    scope.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = scope.model(ids, output_attentions=True).attentions[layer][0, head].double()
    finally:
        scope.model.set_attn_implementation("sdpa")
    return float((weights * mask(pattern, ids.shape[1])).sum() / weights.sum())


def test_mass_lost_is_what_eager_attention_loses(scope: Scope, run: HeadProfile, tmp_path: Path) -> None:
    """transformers has no sinks and one pattern per layer: each changed head's loss equals the eager difference of what it keeps."""
    model = SparsePlan.uniform(scope, Dense()).model
    plan = SparsePlan(model, {(layer, head): Streaming(8, 10 + head) if layer else Streaming(0, 9) for layer, head in model.places})
    report = plan.export("transformers", tmp_path / "out", lossy=True, profile=run)
    changed = {(one.layer, one.head): one for one in report.heads if one.changed}
    assert set(changed) == {(1, head) for head in range(4)}
    for (layer, head), one in changed.items():
        lost = eager_kept(scope, run, layer, head, plan[layer, head]) - eager_kept(scope, run, layer, head, Streaming(0, 13))
        assert one.mass_lost == pytest.approx(lost, abs=2e-5)
        assert lost > 0.01
        assert one.asked == f"sink 8 + window {10 + head}"
        assert one.written == "sink 0 + window 13"
    assert report.mass_lost == pytest.approx(sum(one.mass_lost or 0 for one in report.heads) / 8)
    assert "WARNING" in report.text()
    unmeasured = plan.export("transformers", tmp_path / "alone", lossy=True)
    assert [one.mass_lost for one in unmeasured.heads] == [0.0] * 4 + [None] * 4
    assert unmeasured.mass_lost is None
    assert "not measured" in unmeasured.text()


def test_rounding_up_gains_mass(scope: Scope, run: HeadProfile, tmp_path: Path) -> None:
    model = SparsePlan.uniform(scope, Dense()).model
    plan = SparsePlan.uniform(model, Streaming(2, 9)).replace({(0, 1): Streaming(5, 30)})
    report = plan.export("duo-attention", tmp_path / "out", lossy=True, profile=run)
    one = report.heads[0]
    gained = eager_kept(scope, run, 0, 0, Streaming(2, 9)) - eager_kept(scope, run, 0, 0, Streaming(5, 30))
    assert one.mass_lost == pytest.approx(gained, abs=2e-5)
    assert one.mass_lost is not None
    assert one.mass_lost < 0


def test_a_run_without_q_and_k_gives_an_estimate_from_its_maps(scope: Scope, run: HeadProfile, tmp_path: Path) -> None:
    assert run.tokens is not None
    ids = torch.tensor(run.tokens.ids)
    mapped = scope.profile(probes=["locality"], data=ids, context=128, block=16)
    model = SparsePlan.uniform(scope, Dense()).model
    plan = SparsePlan.uniform(model, Streaming(16, 48)).replace({(0, 0): VerticalSlash(31, 100)})
    report = plan.export("transformers", tmp_path / "out", lossy=True, profile=mapped)
    exact = plan.export("transformers", tmp_path / "exact", lossy=True, profile=run)
    heads = [(one.mass_lost, two.mass_lost) for one, two in zip(report.heads, exact.heads, strict=True)]
    assert heads[0][0] is None  # keys chosen per input
    assert heads[0][1] is not None
    assert all(one is not None and two is not None and abs(one - two) < 0.06 for one, two in heads[1:])
    other = SparsePlan.uniform(GROUPED, Streaming(8, 32)).export("transformers", tmp_path / "other", lossy=True, profile=mapped)
    assert all(one.mass_lost is None for one in other.heads)  # a run of another model says nothing


def test_text_json_and_readme_say_the_same(tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, Streaming(4, 9)).replace({(1, 0): Dense(), (2, 3): VerticalSlash(40, 200)})
    report = plan.export("duo-attention", tmp_path / "out", lossy=True)
    found = json.loads((tmp_path / "out" / "headscope.json").read_text())
    assert found == json.loads(report.to_json())
    assert found["changed"] == 3 == len(report.changed)
    assert [one["written"] for one in found["heads"]].count("dense") == 4
    text = (tmp_path / "out" / "loss.txt").read_text()
    assert text == report.text()
    assert "3 of 12 heads are not as asked for" in text
    assert "full and streaming heads only" in text
    assert "1.1, 2.2" in text
    page = (tmp_path / "out" / "README.md").read_text()
    lines = page.split("```python\n")[1].split("\n```")[0].splitlines()
    assert lines == report.load.splitlines()
    assert "sparsity=0.666" in page
    assert found["numbers"]["sparsity"] == pytest.approx(4 / 6)
    for one in find("duo-attention").lacks:
        assert one in page
    assert repr(report) == "LossReport('duo-attention': 3 of 12 heads changed, files full_attention_heads.tsv, config.json)"
    assert "<pre>" in report._repr_mimebundle_()["text/html"]


def test_patterns_of_equal_effect_are_no_loss() -> None:
    assert same(VerticalSlash(1, 2), VerticalSlash(30, 100))
    assert same(TopBlocks(share=1.0), Dense())
    assert same(TopBlocks(mass=0.5, expected=0.2), TopBlocks(mass=0.5))
    assert not same(TopBlocks(mass=0.5), TopBlocks(mass=0.5 + 1e-6))
    assert not same(Budget(64), Budget(64, 16))
    assert not same(Dense(), Streaming(4, 10**9))
    assert word(Budget(64, pool=7)) == "budget keep 64, pool 7"


def test_densities_are_those_of_the_plans(tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, Streaming(4, 9)).replace({(1, 0): Dense()})
    report = plan.export("duo-attention", tmp_path / "out", lossy=True, length=200)
    written = plan.replace({(1, 1): Dense()})
    assert report.numbers["density_asked_at_200"] == plan.density(200)
    assert report.numbers["density_written_at_200"] == pytest.approx(written.density(200))
    assert math.isclose(report.numbers["sparsity"], 5 / 6)


def test_grouped_keys_are_refused_where_the_engine_has_none(tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, Streaming(64, 64))
    with pytest.raises(ExportError, match="gqa_to_mha"):
        plan.export("moa", tmp_path / "out")
    report = plan.export("moa", tmp_path / "out", lossy=True)
    assert report.lossless
    assert any("gqa_to_mha" in note for note in report.notes)


def test_growing_windows_are_fixed_at_the_length_and_compensation_is_said_to_be_lost(tmp_path: Path) -> None:
    """RazorAttention's windows (a fifth of the text, 40 at least, with a compensation token) in engines that have fixed windows."""
    span = Span(0, 0.2, 4, 40, compensate=True)
    plan = SparsePlan.uniform(GROUPED, span)
    plan = SparsePlan(plan.model, plan.patterns, "razor", {"length": 1000})
    for name in ("duo-attention", "kvpress", "rtp-llm"):
        report = plan.export(name, tmp_path / name, lossy=True)
        found = find(name).read(tmp_path / name).plan_found
        assert found is not None
        assert set(found.patterns.values()) == {Streaming(4, 200)}
        assert "the one at 1,000 tokens" in report.changed[0].why
        assert "no compensation token" in report.changed[0].why
    plan.export("duo-attention", tmp_path / "short", lossy=True, length=100)
    found = find("duo-attention").read(tmp_path / "short").plan_found
    assert found is not None
    assert found[0, 0] == Streaming(4, 40)  # the floor, which is more than a fifth
    plan.export("moa", tmp_path / "moa", lossy=True)
    found = find("moa").read(tmp_path / "moa").plan_found
    assert found is not None
    for length in (64, 300, 1000, 5000):
        written, asked = found[0, 0].fixed(length), span.at(length)
        assert isinstance(written, Streaming)
        assert written.window >= asked.window
