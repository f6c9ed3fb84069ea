"""Every registered intervention on a CUDA device in each dtype, against the same numbers in float64 on the CPU (which the other tests hold
to the dense matrix), with soft caps, sinks, windows, padding, chunks and decode steps; and with a KV cache inside a model."""

from __future__ import annotations

import pytest
import torch

from headscope import interventions as hi
from headscope.interventions import REGISTRY, record_heads
from headscope.kernels.partial import exact_attention
from headscope.scope import Scope

from ..core.tiny_models import ids, llama, make, padding
from .edit_cases import in_dtype
from .method_cases import CASES, applied, bound, drawn

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of the largest value: a few roundings of the dtype."""


def compare(edit, calls, dtype, device):
    errors = []
    hidden = (drawn(2, 70, 16, seed=9) * 1.2).to(dtype)
    pairs = [in_dtype(call, dtype, device) for call in calls]
    there, here = bound(edit, pairs[0][0], hidden.to(device)), bound(edit, pairs[0][1], hidden.double())
    for on_device, exact in pairs:
        got, want = applied(there, on_device), applied(here, exact)
        assert got.dtype == dtype
        assert got.device.type == device
        valid = exact.mask.query_valid
        keep = torch.ones(want.shape[:2], dtype=torch.bool) if valid is None else valid
        error = (got.cpu().double() - want)[keep]
        assert bool(error.isfinite().all())
        errors.append(float(error.abs().max()) / max(1.0, float(want[keep].abs().max())))
    return max(errors)


def test_the_table_holds_every_registered_method():
    assert set(CASES) == set(REGISTRY)
    for name, cases in CASES.items():
        assert cases
        assert all(edit.name == name for edit, _ in cases)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_method_in_float32_on_the_cpu(name):
    """The same comparison where there is no device: what the table says can be run, and each of its edits does something."""
    for edit, calls in CASES[name]:
        there = bound(edit, calls[0], drawn(2, 70, 16, seed=9) * 1.2)
        done = [(applied(there, call), exact_attention(call)) for call in calls]
        assert any(float((new - old).nan_to_num().abs().max()) > 1e-3 for new, old in done), (edit, calls[0])
        assert compare(edit, calls, torch.float32, "cpu") < TOLERANCE[torch.float32], (edit, calls[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_method_on_the_device(name, dtype):
    for edit, calls in CASES[name]:
        assert compare(edit, calls, dtype, "cuda") < TOLERANCE[dtype], (edit, calls[0])


EDITS = {
    "ACT": hi.ACT([(0, 1), (1, 3), (1, 0)], alpha=1.5),
    "redistribute": hi.Redistribute([(0, 1), (1, 3)], "first", keep=0.3),
    "uniform": hi.HeadMask([(0, 1), (1, 3)], "uniform"),
    "boost": hi.BoostScores([(0, 1), (1, 3)], [1, 2], 0.5),
    "reweighting": hi.SoftplusReweighting([(0, 1)], power=1.5, offset=0.5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("edit", list(EDITS.values()), ids=list(EDITS))
def test_decoding_with_a_cache_equals_reading_the_whole_text(edit, cache):
    """A padded batch in float32 on the device: 6 steps behind a prefill against one pass over all rows. ACT settles its sinks row by row,
    so its generated rows are compared with the CPU's."""
    model, tokens, mask = make(llama).float(), ids(2, 12), padding("left", 2, 12)
    devices = ("cuda",) if not isinstance(edit, hi.ACT) else ("cpu", "cuda")
    found = []
    for device in devices:
        scope = Scope(model.to(device))
        with torch.no_grad(), scope.intervene(edit), record_heads(scope, sites=("z",)) as steps:
            out = scope.generate(
                tokens.to(device), attention_mask=mask.to(device), max_new_tokens=6, min_new_tokens=6, cache_implementation=cache
            )
        found.append((out.ids.cpu(), [steps.z(layer).cpu() for layer in (0, 1)]))
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], 1)
    if len(found) == 1:
        with torch.no_grad(), scope.intervene(edit), record_heads(scope, sites=("z",)) as once:
            places = (whole.cumsum(1) - 1).clamp_min(0).to(device)
            model(out.ids[:, :-1].to(device), attention_mask=whole.to(device), position_ids=places)
        found.append((found[0][0], [once.z(layer).cpu() for layer in (0, 1)]))
    (first, steps), (second, want) = found
    assert torch.equal(first, second)
    for a, b in zip(steps, want, strict=True):
        torch.testing.assert_close(a[whole.bool()], b[whole.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_hosts_lse_serves_folds_of_some_heads_and_changes_no_bit(dtype):
    """300 tokens of a model with the head width of fused kernels: folds take lse from the model's own kernel. Heads that no edit names, in
    the first layer, keep every bit, and the block leaves the model as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).cuda().eval()
    scope, tokens = Scope(model), torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(1)).cuda()
    for edit in (hi.ACT([(0, 1), (0, 2)], alpha=2.0), hi.BoostScores([(0, 3)], [1, 2], 0.5), hi.Redistribute("all", [0], keep=0.3)):
        with torch.no_grad():
            with record_heads(scope, sites=("z",)) as plain:
                before = model(tokens).logits
            with scope.intervene(edit), record_heads(scope, sites=("z",)) as changed:
                other = model(tokens).logits
            assert not torch.equal(other, before)
            named = range(4) if edit.heads == "all" else {head for _, head in edit.heads}
            kept = [head for head in range(4) if head not in named]
            assert torch.equal(plain.z(0)[:, :, kept], changed.z(0)[:, :, kept])
            assert torch.equal(model(tokens).logits, before)
