"""What a profile keeps of its shown text: exact windows against eager attention, and runs that are written while the model runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.errors import CaptureError, RunError, StatisticError
from headscope.profile import HeadProfile, profile
from headscope.scope import Scope
from headscope.store import list_runs, open_run

from .tiny_models import bert, eager_copy, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, qwen3

N = 60


def kept_run(scope: Scope, path: Path, **options):
    """A run of one probe whose q and k are kept."""
    return profile(scope, ["entropy"], data=ids(1, N)[0], context=N, out=path, progress=False, **options)


@pytest.mark.parametrize("build", [llama, qwen3, mistral, gemma2, gpt_oss, gpt2, bert])
def test_windows_are_the_models_own_eager_attention(build, tmp_path: Path) -> None:
    """Grouped queries, QK-norm, sliding windows, a soft cap, sink logits, no causality: each as its model file computes it."""
    model = make(build)
    with torch.no_grad():
        twin = eager_copy(model)
        twin = twin if build is gpt_oss else twin.double()  # its experts multiply in single precision only
        expected = twin(ids(1, N), output_attentions=True).attentions
    run = kept_run(Scope(model), tmp_path / "run", keep="all")
    assert run.kept_layers == (0, 1)
    for layer in run.layers:
        for head in range(4):
            a = expected[layer][0, head].numpy()
            np.testing.assert_allclose(run.window(layer, head, 0, N, 0, N), a, atol=2e-6, rtol=1e-4)
            np.testing.assert_allclose(run.window(layer, head, 13, 41, 7, 30), a[13:41, 7:30], atol=2e-6, rtol=1e-4)
            mass = run.window(layer, head, 16, 32, 0, 16).sum(dtype=np.float64)
            assert mass == pytest.approx(float(run.tile("block_mass", 0, layer, head, 0, 0)[1, 0]), rel=1e-5, abs=1e-7)


def test_windows_of_smollm2(smollm2, tmp_path: Path) -> None:
    model, tokens = smollm2.model, ids(1, 300, high=40000)
    before = model.config._attn_implementation
    run = profile(smollm2, ["sink"], data=tokens[0], context=300, keep=(0, 17), out=tmp_path / "run", progress=False)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = model(tokens, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    assert run.kept_layers == (0, 17)
    for layer in run.kept_layers:
        for head in (0, 4, 8):
            np.testing.assert_allclose(run.window(layer, head, 0, 300, 0, 300), expected[layer][0, head].numpy(), atol=1e-5)
    with pytest.raises(RunError, match="kept those of 0, 17"):
        run.window(1, 0, 0, 2, 0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_q_and_k_are_kept_in_the_models_dtype_to_the_bit(dtype, tmp_path: Path) -> None:
    scope = Scope(make(llama).to(dtype))
    run = kept_run(scope, tmp_path / "run", keep=1)
    stats = scope.capture(ids(1, N), keep=(1,))
    kept, call = run._kept().kept_layer(1), stats.kept(1).calls[0]
    assert run.kept_layers == (1,)
    for stored, live in ((kept.q[...], call.q[0]), (kept.k[...], stats.kept(1).pieces[0][0])):
        found = torch.from_numpy(stored)
        found = found.view(torch.bfloat16) if dtype == torch.bfloat16 else found
        assert found.dtype == dtype
        assert torch.equal(found, live)
    expected = stats.weights(1, 3, range(20, 50), range(40))[0].float().numpy()
    np.testing.assert_allclose(run.window(1, 3, 20, 50, 0, 40), expected, rtol=2e-6)  # the lse is that of a pass with other blocks


def test_written_while_measuring_or_saved_afterwards_it_is_the_same_run(tmp_path: Path) -> None:
    scope = Scope(make(llama))
    options = {"data": ids(1, N)[0], "context": N, "keep": (0, 1), "progress": False}
    probes = ["entropy", "sink", "locality", "waad", "fai", "previous_token", "induction"]
    memory = profile(scope, probes, **options)
    saved = open_run(memory.save(tmp_path / "saved"))
    streamed = profile(scope, probes, out=tmp_path / "streamed", **options)
    assert saved.card.files == open_run(streamed.path).card.files
    assert {"write", "natural", "total"} <= set(streamed.card.seconds)
    assert "write" not in memory.card.seconds
    for source in (memory, streamed, HeadProfile.load(tmp_path / "saved")):
        assert source.kept_layers == (0, 1)
        np.testing.assert_array_equal(source.window(1, 2, 5, 60, 0, 33), memory.window(1, 2, 5, 60, 0, 33))
        np.testing.assert_array_equal(source.tile("block_max", 0, 1, 2, 0, 0), memory.map("block_max", 1, 2))
        assert source.table.equals(memory.table)
    again = HeadProfile.load(tmp_path / "streamed").save(tmp_path / "again")
    assert open_run(again).card.files == saved.card.files
    assert [entry.error for entry in list_runs(tmp_path)] == [None] * 3


def test_a_probe_that_reads_the_maps_still_finds_them(tmp_path: Path, monkeypatch) -> None:
    """What a probe asked for stays in memory when everything else has gone to the disk."""
    from headscope.probes import Entropy, Needs

    seen = {}
    monkeypatch.setattr(Entropy, "needs", lambda *_: Needs(("entropy", "argmax", "block_max")))
    score = Entropy.score

    def look(self, stats, text):
        seen["map"], seen["argmax"] = stats["block_max"][1], stats["argmax"][1]
        return score(self, stats, text)

    monkeypatch.setattr(Entropy, "score", look)
    run = kept_run(Scope(make(llama)), tmp_path / "run")
    np.testing.assert_array_equal(seen["map"][0, 2].numpy(), run.map("block_max", 1, 2))
    assert seen["argmax"].dtype == torch.int64


@pytest.mark.parametrize("parts", [{"maps": False}, {"keep_statistics": False}, {"maps": False, "keep_statistics": False}])
@pytest.mark.parametrize("keep", [None, (0,)])
def test_any_part_may_be_left_out(parts, keep, tmp_path: Path) -> None:
    run = kept_run(Scope(make(llama)), tmp_path / "run", keep=keep, **parts)
    assert (run.maps is None) == (parts.get("maps") is False)
    assert (run.statistics == []) == (parts.get("keep_statistics") is False)
    assert run.kept_layers == (keep or ())
    if keep:
        assert run.window(0, 0, 9, 10, 0, N).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("keep", ["some", (0, 2), -1, (True,), ("0",)])
def test_layers_that_cannot_be_kept(keep, tmp_path: Path) -> None:
    with pytest.raises(StatisticError, match="keep"):
        kept_run(Scope(make(llama)), tmp_path / "run", keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_before_anything_runs(tmp_path: Path, monkeypatch) -> None:
    scope = Scope(make(llama))
    kept_run(scope, tmp_path / "run")
    ran = []
    monkeypatch.setattr(type(scope), "capture", lambda *_, **__: ran.append(1))
    with pytest.raises(RunError, match="exists already"):
        kept_run(scope, tmp_path / "run")
    assert not ran
    monkeypatch.undo()
    assert kept_run(scope, tmp_path / "run", keep="all", overwrite=True).kept_layers == (0, 1)


def test_a_measurement_that_fails_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    scope = Scope(make(llama))

    def fail(*_):
        raise CaptureError("layer 1 broke")

    handle = scope.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(CaptureError, match="broke"):
        kept_run(scope, tmp_path / "run", keep="all")
    handle.remove()
    assert list(tmp_path.iterdir()) == []
    kept_run(scope, tmp_path / "run", keep="all")


def test_the_command_line_keeps_layers(tmp_path: Path, monkeypatch, capsys) -> None:
    import json
    import sys

    from headscope.cli.main import main
    from headscope.cli.profile_cmd import layers_of

    words = ["headscope", "profile", "bundled:induction", "--probes", "entropy", "--context", "64"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "run"), "--keep", "1", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["run"] == str(tmp_path / "run")
    assert open_run(tmp_path / "run").kept_layers == (1,)
    assert layers_of("all") == "all"
    assert layers_of("0, 3") == [0, 3]
    assert layers_of(None) is None
    with pytest.raises(StatisticError, match="--keep 0,5 or --keep all"):
        layers_of("first")
