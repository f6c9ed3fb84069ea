"""The formulas of the vision probes, by hand: VHD and its outlier rule, VAR's labels, CARVE's contrast and regions, the knockout."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import ProbeError
from headscope.kernels.naive import naive_weights
from headscope.probes import Carve, LayerStage, Vhd, VisionMass, VisualSinks
from headscope.probes.carve import contrast_map, head_contrast, map_entropy, regions_of, step_weights
from headscope.probes.layer_stage import Knockout
from headscope.probes.vhd import chosen, distance, t_vhd, without_outliers
from headscope.probes.visual_sinks import sink_labels, sink_phi

LAYER = torch.tensor([[1.0, 2.0, 9.0, 4.0]], dtype=torch.float64)


def test_equation_7_takes_the_heads_above_the_median() -> None:
    assert chosen(LAYER).tolist() == [[False, False, True, True]]  # median 3


def test_equation_6_zeroes_a_head_that_is_high_in_both() -> None:
    """VHD (1, 2, 9, 4): mu = 4, sigma = 3.08, so only 9 is above 7.08."""
    loud = torch.tensor([[1.0, 1.0, 8.0, 1.0]], dtype=torch.float64)  # mu 2.75, sigma 3.03: 8 is above 5.78
    kept = without_outliers(LAYER, loud)
    assert kept.tolist() == [[1, 2, 0, 4]]
    assert chosen(kept).tolist() == [[False, True, False, True]]  # median 1.5
    elsewhere = torch.tensor([[8.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.equal(without_outliers(LAYER, elsewhere), LAYER)  # loud without the picture, but no outlier in VHD
    even = torch.full((1, 4), 2.0, dtype=torch.float64)
    assert torch.equal(without_outliers(LAYER, even), LAYER)


def test_equation_6_works_layer_by_layer_and_past_missing_heads() -> None:
    both = torch.stack([LAYER[0], torch.tensor([9.0, 9.0, 9.0, float("nan")]).double()])
    loud = torch.tensor([[1.0, 1.0, 8.0, 1.0], [8.0, 1.0, 1.0, float("nan")]], dtype=torch.float64)
    kept = without_outliers(both, loud)
    assert kept[0].tolist() == [1, 2, 0, 4]
    assert kept[1, :3].tolist() == [9, 9, 9]
    assert bool(kept[1, 3].isnan())


def test_t_vhd_adds_the_largest_of_each_layer() -> None:
    two = torch.stack([LAYER[0], torch.tensor([5.0, 0.0, 1.0, float("nan")]).double()])
    assert float(t_vhd(two, 1)) == 9 + 5
    assert float(t_vhd(two, 3)) == 15 + 6
    assert float(t_vhd(two)) == 9 + 4 + 5  # half of 4, half of 3
    assert float(t_vhd(two, 9)) == 16 + 6


def test_distances() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]).double()
    assert distance(a, b).tolist() == pytest.approx([5, math.sqrt(5), 0])
    assert distance(a, b, "relative").tolist() == pytest.approx([1, math.sqrt(5) / 3, 0])
    assert distance(a, b, "cosine").tolist() == pytest.approx([1, 1, 0])
    assert distance(a, 3 * a, "cosine").tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_sink_labels() -> None:
    hidden = torch.full((6, 16), 0.1)
    hidden[0, 3] = hidden[2, 3] = 50.0
    hidden[4, 9] = -50.0
    hidden[5, 1] = 50.0  # large, but not in a sink dimension
    phi = sink_phi(hidden, (3, 9))
    assert phi[[0, 2, 4]].tolist() == pytest.approx([4, 4, 4], rel=1e-4)  # sqrt(16), the most there is
    assert float(phi[5]) < 0.1
    image = torch.tensor([False, True, True, True, False, False])
    assert sink_labels(phi, image, 3.0).tolist() == [2, 0, 1, 0, 2, 3]


# ---- CARVE ------------------------------------------------------------------------------------------------------------


def test_contrast_undoes_what_both_questions_share() -> None:
    """A^Q = F S and A^G = F give S, exactly at lambda = 0."""
    source = torch.Generator().manual_seed(0)
    shared, wanted = torch.rand(5, 36, generator=source).double() + 0.1, torch.rand(5, 36, generator=source).double()
    assert torch.allclose(contrast_map(shared * wanted, shared, 0.0), wanted, atol=1e-12)


def test_contrast_is_the_minimum_that_the_paper_asks_for() -> None:
    question, general, strength = 0.3, 0.2, 0.05
    grid = torch.linspace(0, 3, 300_001).double()
    loss = (grid * general - question).square() + strength * grid.square() * general
    assert float(contrast_map(torch.tensor(question), torch.tensor(general), strength)) == pytest.approx(
        float(grid[loss.argmin()]), abs=1e-5
    )


def test_weights_entropy_and_head_contrast() -> None:
    assert step_weights(4).tolist() == [1, 2, 3, 4]
    assert float(map_entropy(torch.tensor([0.25, 0.25, 0.0]).double())) == pytest.approx(0.5 * math.log(4))
    a, b = torch.tensor([[[0.2, 0.2, 0.0]]]).double(), torch.tensor([[[0.0, 0.1, 0.3]]]).double()
    assert float(head_contrast(a, b)) == pytest.approx(0.75)  # (.5 .5 0) against (0 .25 .75)
    assert float(head_contrast(a, 2 * a)) == pytest.approx(0)
    assert float(head_contrast(0 * a, 0 * b)) == 0


def test_regions_are_joined_over_edges_and_ranked_by_what_they_hold() -> None:
    field = torch.zeros(4, 5).double()
    field[0, 0] = 9.0
    field[2, 1] = field[2, 2] = field[3, 2] = 4.0
    field[1, 4] = 5.0
    found = regions_of(field, 0.75, 2)
    assert [one["sum"] for one in found] == [12, 9]
    assert found[0] == {"top": 2, "left": 1, "bottom": 3, "right": 2, "tokens": 3, "sum": 12.0}
    assert len(regions_of(field, 0.75, 9)) == 3


# ---- knockout ---------------------------------------------------------------------------------------------------------


def call(allowed: torch.Tensor | None = None, **more) -> AttentionCall:
    source = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 2, 6, 8, generator=source).double(), torch.randn(1, 2, 6, 8, generator=source).double()
    return AttentionCall("layer", 0, q, k, None, 0.35, MaskFacts(causal=True, allowed=allowed), **more)


def test_a_knockout_is_a_masked_softmax() -> None:
    plain = naive_weights(call())[0]
    cut = naive_weights(Knockout(frozenset({"layer"}), torch.tensor([4, 5]), torch.tensor([1, 2])).before(call()))[0]
    assert torch.equal(cut[:, :4], plain[:, :4])
    for row in (4, 5):
        left = plain[:, row].clone()
        left[:, [1, 2]] = 0
        assert torch.allclose(cut[:, row], left / left.sum(-1, keepdim=True))


def test_a_knockout_keeps_what_was_hidden_before_and_leaves_other_layers() -> None:
    hidden = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    hidden[..., 3] = False
    one = Knockout(frozenset({"layer"}), torch.tensor([5]), torch.tensor([0]))
    allowed = one.before(call(hidden)).mask.allowed
    assert not allowed[..., 3].any()
    assert not allowed[0, 0, 5, 0]
    assert allowed[0, 0, 4, 0]
    other = Knockout(frozenset({"another"}), torch.tensor([5]), torch.tensor([0]))
    given = call()
    assert other.before(given) is given


# ---- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Vhd(distance="l1"), "unknown distance 'l1'"),
        (lambda: Vhd(positions="moved"), "unknown positions"),
        (lambda: Vhd(without="nothing"), "unknown without"),
        (lambda: Vhd(top_k=0), "it counts heads"),
        (lambda: VisualSinks(rho=1.5), "it is a share"),
        (lambda: VisualSinks(count=0), "no sink dimension"),
        (lambda: VisionMass(answer_tokens=0), "one token"),
        (lambda: Carve(quantile=1.0), "a quantile is in"),
        (lambda: LayerStage(window=0), "it counts layers"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(make, words) -> None:
    with pytest.raises(ProbeError, match=words):
        make()
