"""Recording and patching: a run patched with itself is the same to the bit, with another run it is that run, and paths add up."""

from __future__ import annotations

import pytest
import torch

import headscope as hs
from headscope.errors import InterventionError
from headscope.interventions import HeadMask, PatchHeads, PathPatching, activation_patching, from_json, record_heads
from headscope.interventions.prefix import Prefix, blocks_of
from headscope.scope import Scope

from ..core.tiny_models import bert, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, padding

SITES = ("z", "q", "k", "v")


def logits(model, tokens, **kw):
    with torch.no_grad():
        out = model(tokens, **kw)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def pair(length=11, at=4):
    """Two inputs that differ in one token, not the last."""
    clean = ids(1, length)
    corrupt = clean.clone()
    corrupt[0, at] = (corrupt[0, at] + 7) % 90
    return clean, corrupt


def answer(out):
    return out[0, -1, 5] - out[0, -1, 9]


# ---- recording ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, mistral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_generation_is_recorded_as_one_sequence(build, cache):
    model, tokens, mask = make(build).double(), ids(2, 9), padding("left", 2, 9)
    scope = Scope(model)
    with record_heads(scope) as steps:
        out = scope.generate(tokens, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, cache_implementation=cache)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], 1)
    with record_heads(scope) as once:
        logits(model, out.ids[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
    for layer in (0, 1):
        for site in SITES:
            a, b = steps.get(site, layer), once.get(site, layer)
            assert a.shape == b.shape
            torch.testing.assert_close(a[whole.bool()], b[whole.bool()], rtol=1e-9, atol=1e-9)


def test_z_is_what_the_output_matrix_reads():
    model, tokens = make(llama), ids(2, 9)
    seen = {}
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with record_heads(Scope(model), "1.0,1.3") as record:
        logits(model, tokens)
    hook.remove()
    assert torch.equal(record.z(1), seen["x"].unflatten(-1, (4, 8))[:, :, [0, 3]])
    assert record.k(1).shape == (2, 9, 2, 8)
    assert torch.equal(record.stacked("z", [(1, 3), (1, 0)])[:, 0], record.head("z", 1, 3))


def test_what_was_not_recorded_is_refused():
    scope = Scope(make(llama))
    with record_heads(scope, "1.0", sites=("z",)) as record:
        logits(scope.model, ids(1, 5))
        logits(scope.model, ids(1, 6))
    assert [one["z", "model.layers.1.self_attn"].shape[1] for one in record.passes] == [5, 6]
    for call, words in (
        (lambda: record.z(1), "2 sequences"),
        (lambda: record.get("q", 1), "recorded site"),
        (lambda: record.z(0), "recorded layer"),
        (lambda: record.head("z", 1, 2), "not recorded"),
    ):
        with pytest.raises(InterventionError, match=words):
            call()
    with pytest.raises(InterventionError, match="site 'x'"), record_heads(scope, sites=("x",)):
        pytest.fail("the block was entered")


# ---- patching -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, gpt_oss, bert], ids=lambda build: build.__name__)
@pytest.mark.parametrize("site", SITES)
def test_a_run_patched_with_itself_is_the_same_to_the_bit(build, site):
    model, tokens, mask = make(build), ids(2, 11), padding("right", 2, 11)
    scope = Scope(model)
    plain = logits(model, tokens, attention_mask=mask)
    with record_heads(scope, sites=(site,)) as record:
        logits(model, tokens, attention_mask=mask)
    with scope.intervene(PatchHeads("all", record, site)):
        assert torch.equal(logits(model, tokens, attention_mask=mask), plain)


@pytest.mark.parametrize("site", ["z", "q"])
def test_positions_and_heads_of_a_patch(site):
    scope = Scope(make(llama))
    clean, corrupt = pair()
    with record_heads(scope) as theirs:
        logits(scope.model, corrupt)
    with record_heads(scope) as ours:
        logits(scope.model, clean)
    with scope.intervene(PatchHeads([(1, 2), (1, 0)], theirs, site, positions=[6, 10])), record_heads(scope) as record:
        logits(scope.model, clean)
    changed = (record.get(site, 1) != ours.get(site, 1)).any(-1)[0]
    assert changed.nonzero().tolist() == [[6, 0], [6, 2], [10, 0], [10, 2]]
    assert torch.equal(record.get(site, 1)[0, [6, 10]][:, [0, 2]], theirs.get(site, 1)[0, [6, 10]][:, [0, 2]])


def test_keys_and_values_of_all_heads_together_give_the_other_runs_past():
    """Every key and value from the corrupt run, at every position but the last: the last row sees the corrupt text."""
    scope = Scope(make(llama).double())
    clean, corrupt = pair()
    with record_heads(scope) as theirs:
        want = logits(scope.model, corrupt)
    past = slice(0, 10)
    with scope.intervene(PatchHeads("all", theirs, "k", positions=past), PatchHeads("all", theirs, "v", positions=past)):
        got = logits(scope.model, clean)
    torch.testing.assert_close(got[:, -1], want[:, -1], rtol=1e-9, atol=1e-9)
    assert float((got[:, 5] - logits(scope.model, clean)[:, 5]).abs().max()) > 1e-3


def test_patched_values_hold_in_decoding():
    """Values patched in the cache's part: a generation under them equals reading the whole text under them."""
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    with record_heads(scope, sites=("v",)) as other:
        logits(scope.model, ids(1, 9, seed=8))
    patch = PatchHeads("all", other, "v")
    with scope.intervene(patch), record_heads(scope, sites=("z",)) as steps:
        out = scope.generate(tokens, max_new_tokens=6, min_new_tokens=6)
    with scope.intervene(patch), record_heads(scope, sites=("z",)) as once:
        logits(scope.model, out.ids[:, :-1])
    torch.testing.assert_close(steps.z(1), once.z(1), rtol=1e-9, atol=1e-9)


def test_a_part_of_a_group_has_no_keys_of_its_own():
    scope = Scope(make(llama))
    with record_heads(scope) as record:
        logits(scope.model, ids(1, 9))
    patch = PatchHeads([(0, 1)], record, "k")
    with pytest.raises(InterventionError, match=r"head 0\.1 alone.*0\.0.*grouped queries.*0\.0, 0\.1"), scope.intervene(patch):
        pytest.fail("the block was entered")
    with scope.intervene(PatchHeads("0.0,0.1", record, "k")):
        logits(scope.model, ids(1, 9))


def test_json_of_a_patch(tmp_path):
    patch = PatchHeads([(0, 1)], torch.randn(1, 9, 8), positions=[3, 4])
    assert from_json(patch.to_json(tensors=tmp_path / "p.safetensors"), tmp_path) == patch
    with pytest.raises(InterventionError, match="site 'w'"):
        PatchHeads([(0, 1)], torch.randn(1, 8), "w")
    with pytest.raises(InterventionError, match="keys stay"):
        PatchHeads([(0, 1)], torch.randn(1, 8), "k", positions="last_prompt")


# ---- prefix reuse and sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, bert], ids=lambda build: build.__name__)
def test_prefix_reuse_gives_the_same_bits_for_half_the_blocks(build):
    model, tokens = make(build), ids(2, 9)
    scope = Scope(model)
    plain = logits(model, tokens)
    prefix = Prefix(scope, tokens)
    assert len(prefix.blocks) == 2
    assert torch.equal(prefix.output, plain)
    for layer in (1, 0, 1):
        mask = HeadMask([(layer, 1)])
        got = prefix.run(mask)
        with scope.intervene(mask):
            assert torch.equal(got, logits(model, tokens))
    assert prefix.blocks_run == 2 + 1 + 2 + 1
    assert torch.equal(logits(model, tokens), plain)
    assert not any("forward" in vars(block) for block in blocks_of(scope))


def test_a_sweep_over_heads_and_its_figure(tmp_path):
    scope = Scope(make(llama))
    clean, _ = pair()
    calls = []

    def metric(out):
        calls.append(1)
        return answer(out)

    def run(heads="all"):
        return hs.sweep(scope, lambda head: HeadMask([head]), heads, metric, data=clean, journal=tmp_path / "sweep", name="answer")

    found = run()
    assert len(found.table) == 8
    assert found.facts == {"blocks_run": 2 + 4 * 2 + 4 * 1, "blocks": 2}
    for layer, head, value in zip(found.table["layer"], found.table["head"], found.table["value"], strict=True):
        with scope.intervene(HeadMask([(layer, head)])):
            assert value == float(answer(logits(scope.model, clean)))
    assert found.baseline == float(answer(logits(scope.model, clean)))
    assert found.top(1) == [max(zip(found.table["value"], zip(found.table["layer"], found.table["head"], strict=True), strict=True))[1]]
    assert found.plot().data[0].z.shape == (4, 2)
    count = len(calls)
    again = run()
    assert len(calls) == count
    assert again.restored == 9
    assert again.table.equals(found.table)
    run([(0, 0), (1, 1)])
    assert len(calls) == count


def test_a_sweep_that_was_stopped_goes_on(tmp_path):
    scope = Scope(make(llama))
    clean, _ = pair()
    seen = []

    def stopping(out):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(1)
        return answer(out)

    options = {"data": clean, "journal": tmp_path / "sweep", "name": "answer"}
    with pytest.raises(KeyboardInterrupt):
        hs.sweep(scope, lambda head: HeadMask([head]), "all", stopping, **options)
    found = hs.sweep(scope, lambda head: HeadMask([head]), "all", answer, **options)
    assert found.restored == 4
    fresh = hs.sweep(scope, lambda head: HeadMask([head]), "all", answer, data=clean)
    assert found.table.equals(fresh.table)


def test_a_sweep_over_settings_and_by_generation():
    scope = Scope(make(llama))
    found = hs.sweep(
        scope,
        lambda mode, seed: HeadMask("0.1", mode, seed=seed),
        grid={"mode": ["zero", "noise"], "seed": [0, 1]},
        metric=lambda scope: scope.generate(ids(1, 5), max_new_tokens=2).new_ids.sum(),
    )
    assert list(found.table.columns) == ["mode", "seed", "value", "change"]
    assert len(found.table) == 4
    assert found.plot().data
    line = hs.sweep(scope, lambda seed: HeadMask("0.1", "noise", seed=seed), grid={"seed": [0, 1]}, metric=answer, data=ids(1, 5))
    assert len(line.plot().data[0].x) == 2


def test_sweeps_that_cannot_be_made(tmp_path):
    scope, tokens = Scope(make(llama)), ids(1, 5)
    for options, words in (
        ({"heads": "0.0"}, "metric"),
        ({"metric": answer}, "over nothing"),
        ({"heads": "0.9", "metric": answer, "data": tokens}, "heads 0..3"),
        ({"heads": "0.0", "metric": answer, "data": tokens, "journal": tmp_path}, "name="),
        ({"heads": "0.0", "metric": lambda out: out, "data": tokens}, "no number"),
    ):
        with pytest.raises(InterventionError, match=words):
            hs.sweep(scope, lambda head: HeadMask([head]), **options)
    with pytest.raises(InterventionError, match="not an intervention"):
        hs.sweep(scope, lambda head: None, "0.0", answer, data=tokens)


# ---- activation and path patching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", SITES)
def test_activation_patching_by_hand(direction, site):
    scope = Scope(make(llama).double())
    clean, corrupt = pair()
    found = activation_patching(scope, clean, corrupt, answer, at=site, direction=direction)
    source, target = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    high, low = float(answer(logits(scope.model, source))), float(answer(logits(scope.model, target)))
    with record_heads(scope) as record:
        logits(scope.model, source)
    for layer, head in ((0, 1), (1, 2)):
        heads = [(layer, head)] if site in "zq" else [(layer, head // 2 * 2), (layer, head // 2 * 2 + 1)]
        with scope.intervene(PatchHeads(heads, record, site)):
            want = (float(answer(logits(scope.model, target))) - low) / (high - low)
        row = found.table[(found.table["layer"] == layer) & (found.table["head"] == head)]
        assert float(row["value"].iloc[0]) == pytest.approx(want, abs=1e-12)


def test_nothing_patched_is_0_and_everything_patched_is_1():
    """The inputs agree in the last token, so all heads' outputs at it, from the other run, make it that run."""
    scope = Scope(make(llama).double())
    clean, corrupt = pair()
    with record_heads(scope, sites=("z",)) as record:
        want = logits(scope.model, clean)
    with scope.intervene(PatchHeads("all", record, positions=[10])):
        got = logits(scope.model, corrupt)
    torch.testing.assert_close(got[:, -1], want[:, -1], rtol=1e-12, atol=1e-12)
    paths = PathPatching(scope, clean, corrupt, answer, freeze_mlps=False)
    everything = [(layer, head) for layer in (0, 1) for head in range(4)]
    assert paths.effect(everything) == pytest.approx(1.0, abs=1e-12)
    same = PathPatching(scope, clean, corrupt, answer)
    same._corrupt = same._clean
    for receivers, at in ((None, "z"), ([(1, 2)], "q"), ([(1, 2)], "z"), ([(1, 2), (1, 3)], "v")):
        assert same.effect([(0, 1)], receivers, at) == 0.0


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("at", ["q", "z"])
def test_a_path_from_one_head_to_another_by_hand(freeze, at):
    """The receiver's input with only the sender's output changed, computed from the weights: residual, norm, projection."""
    model = make(llama).double()
    scope = Scope(model)
    clean, corrupt = pair()
    sender, receiver, width = (0, 1), (1, 2), 8
    paths = PathPatching(scope, clean, corrupt, answer, freeze_mlps=freeze)
    kept = {}
    layer0, layer1 = model.model.layers
    hooks = [
        layer1.register_forward_pre_hook(lambda m, args, kw: kept.update(x=args[0] if args else kw["hidden_states"]), with_kwargs=True),
        layer0.post_attention_layernorm.register_forward_pre_hook(lambda m, args: kept.update(mid=args[0])),
    ]
    with record_heads(scope, sites=("z",)) as ours:
        logits(model, clean)
    for hook in hooks:
        hook.remove()
    with record_heads(scope, sites=("z",)) as theirs:
        logits(model, corrupt)
    difference = (theirs.z(0) - ours.z(0))[:, -1, 1] @ layer0.self_attn.o_proj.weight[:, width : 2 * width].T
    mid = kept["mid"][:, -1] + difference
    with torch.no_grad():
        x = kept["x"].clone()
        x[:, -1] = mid + (
            layer0.mlp(layer0.post_attention_layernorm(kept["mid"]))[:, -1] if freeze else layer0.mlp(layer0.post_attention_layernorm(mid))
        )
    # the second layer over that residual stream gives the receiver's q or z; everything else of the run is clean
    with record_heads(scope, [receiver], sites=(at,)) as changed:
        hook = layer1.register_forward_pre_hook(
            lambda m, args, kw: ((x, *args[1:]), kw) if args else (args, {**kw, "hidden_states": x}), with_kwargs=True
        )
        logits(model, clean)
        hook.remove()
    patch = PatchHeads([receiver], changed, at, positions=[10])
    with scope.intervene(patch):
        moved = float(answer(logits(model, clean)))
    want = (moved - paths.clean) / (paths.corrupt - paths.clean)
    assert abs(want) > 1e-6
    assert paths.effect([sender], [receiver], at) == pytest.approx(want, rel=1e-9)


def test_a_later_head_tells_an_earlier_one_nothing():
    scope = Scope(make(llama).double())
    paths = PathPatching(scope, *pair(), answer)
    assert paths.effect([(1, 1)], [(0, 2)], "q") == 0.0
    found = paths.sweep([(1, 2)], "q")
    assert len(found.table) == 8
    assert (found.table["value"][found.table["layer"] == 1] == 0.0).all()
    assert (found.table["value"][found.table["layer"] == 0].abs() > 1e-9).all()


def test_paths_that_cannot_be_followed():
    scope = Scope(make(llama))
    clean, corrupt = pair()
    for args, words in (
        ((clean, ids(1, 9), answer), "one length"),
        ((clean, clean, answer), "no difference"),
    ):
        with pytest.raises(InterventionError, match=words):
            PathPatching(scope, *args)
    with pytest.raises(InterventionError, match="position 11"):
        PathPatching(scope, clean, corrupt, answer, position=11)
    with pytest.raises(InterventionError, match="no difference"):
        activation_patching(scope, clean, clean, answer)
