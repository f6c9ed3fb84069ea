"""Every edit of outputs by its formula, on all rows and on some; nothing changed is the very object; gradients pass."""

from __future__ import annotations

import pytest
import torch

from headscope.interventions import z_site

from .dense_edits import Dense
from .edit_cases import make_call
from .primitive_cases import CALLS, heads_of, on_rows, outside, rows_of

# ---- Z site -------------------------------------------------------------------------------------------------------------------


@on_rows
def test_outputs_by_their_formulas(restricted):
    call = dict(CALLS)["left padding"]
    heads, rows = heads_of(call), rows_of(call, restricted)
    z = Dense(call).output
    c = torch.randn(2, 13, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = torch.tensor([0.2, 0.7])
    each = one.double()[None, None, :, None]
    own = z[:, :, heads]
    for got, want in (
        (z_site.scale(call, z, heads, 2.0, rows), 2 * own),
        (z_site.scale(call, z, heads, one, rows), each * own),
        (z_site.zero(call, z, heads, rows), 0 * own),
        (z_site.replace(call, z, heads, c, rows), c),
        (z_site.replace(call, z, heads, c[:1, :1], rows), c[:1, :1].expand_as(own)),
        (z_site.patch(call, z, heads, c, rows), c),
        (z_site.lerp(call, z, heads, c, 0.3, rows), 0.7 * own + 0.3 * c),
        (z_site.lerp(call, z, heads, c, one, rows), (1 - each) * own + each * c),
        (z_site.add(call, z, heads, c, 0.5, rows), own + 0.5 * c),
    ):
        full = z.clone()
        full[:, :, heads] = want if rows is True else torch.where(rows[:, :, None, None], want, own)
        torch.testing.assert_close(got, full, rtol=0, atol=1e-15)
        outside(call, got, z, heads, rows)
    assert z_site.scale(call, z, heads, 1.0) is z
    assert z_site.lerp(call, z, heads, c, 0.0) is z
    assert z_site.add(call, z, heads, c, 0.0) is z
    assert z_site.noise(call, z, heads, 0.0, 3) is z


def test_noise_is_added_by_place_and_size():
    call = make_call(rows=400, v_width=32)
    z = Dense(call).output
    plain = z_site.noise(call, z, [0, 3], 0.5, seed=1) - z
    assert float(plain[:, :, [1, 2, 4, 5]].abs().max()) == 0.0
    assert float(plain[:, :, [0, 3]].std()) == pytest.approx(0.5, rel=0.02)
    relative = z_site.noise(call, z, [0, 3], 0.5, seed=1, relative=True) - z
    ratio = relative[:, :, 0].pow(2).mean(-1).sqrt() / z[:, :, 0].pow(2).mean(-1).sqrt()
    assert float(ratio.mean()) == pytest.approx(0.5, rel=0.05)


def test_outputs_carry_gradients():
    call = make_call()
    z, c = Dense(call).output.requires_grad_(), torch.randn(1, 1, 2, 5, dtype=torch.float64)
    alpha = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    z_site.lerp(call, z, [0, 3], c, alpha).sum().backward()
    want = (c - z.detach()[:, :, [0, 3]]).sum((0, 1, 3))
    torch.testing.assert_close(alpha.grad, want)
    assert z.grad is not None
