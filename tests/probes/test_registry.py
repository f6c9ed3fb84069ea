"""The registry: names, refusals, what each probe says about itself, and which probes share a pass."""

from __future__ import annotations

import pytest
import torch

from headscope import probes
from headscope.errors import HeadscopeError, ProbeError
from headscope.probes import REGISTRY, ActiveProbe, Fai, Locality, Needs, Probe, ProbeText, Sink, Streaming, Waad, resolve
from headscope.probes.registry import register
from headscope.profile.passes import plan_passes
from headscope.statistics import StatisticsRequest
from headscope.topology import AttentionModule, Topology

TOPOLOGY = Topology((AttentionModule("a", 0, "full", 2, 2, 8, True),), "Tiny")


def test_a_name_or_a_metric_twice_is_refused() -> None:
    class Other(Waad):
        name = "sink"

    class Thief(Waad):
        name = "thief"

    with pytest.raises(ProbeError, match="Sink has that name already"):
        register(Sink, Other)
    with pytest.raises(ProbeError, match="probe 'waad' has it already"):
        register(Waad, Thief)


def test_every_probe_describes_itself() -> None:
    kinds = {"natural", "repeated_random", "repeated_token"}
    for name, cls in REGISTRY.items():
        about = cls.describe()
        assert about["name"] == name
        assert about["metrics"]
        assert about["data"] in kinds if issubclass(cls, Probe) else about["data"]
        assert "arXiv:" in about["source"]
        assert about["title"]
        assert "Departures:" in (cls.__doc__ or "")
        assert getattr(probes, cls.__name__) is cls
        for metric in about["metrics"]:
            assert set(metric) == {"name", "unit", "higher_is", "range", "per"}
    assert sorted(probes.__all__) == sorted(set(probes.__all__))


def test_resolve() -> None:
    assert [probe.name for probe in resolve("passive")] == [name for name, cls in REGISTRY.items() if issubclass(cls, Probe)]
    assert [probe.name for probe in resolve("active")] == [name for name, cls in REGISTRY.items() if issubclass(cls, ActiveProbe)]
    assert [probe.name for probe in resolve("all")] == list(REGISTRY)
    assert resolve("sink") == [Sink()]
    assert resolve(["sink", Waad, Fai(5, 9), "sink"]) == [Sink(), Waad(), Fai(5, 9)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("snik", "did you mean sink"),
        (["sink", "nope"], "active, all"),
        ([], "empty list"),
        ([Sink(), Sink(position=1)], "probe 'sink' twice"),
        ([3], "neither a name"),
        (int, "neither a name"),
    ],
)
def test_resolve_refuses(asked: object, words: str) -> None:
    with pytest.raises(HeadscopeError, match=words):
        resolve(asked)


def test_default_probes_of_a_text_share_one_pass() -> None:
    text = ProbeText.natural(torch.arange(200), torch.arange(200) // 10)
    natural = [probe for probe in resolve("passive") if probe.data == "natural"]
    (one,) = plan_passes(natural, text, TOPOLOGY)
    assert one.probes == natural
    request = one.request()
    names = tuple(request.pop("statistics"))
    assert StatisticsRequest(names=names, **request).needs("sink_mass", "fai", "segment_mass", "pairs")


def test_probes_that_disagree_get_a_pass_of_their_own() -> None:
    """Streaming with a window of 32 beside Locality's 64: neither may silently have the other's."""
    text = ProbeText.natural(torch.arange(200))
    passes = plan_passes([Streaming(recent=32), Locality(), Waad(), Sink(length=20)], text, TOPOLOGY)
    assert [[probe.name for probe in one.probes] for one in passes] == [["streaming", "waad", "sink"], ["locality"]]
    assert [one.request()["local_window"] for one in passes] == [32, 64]


def test_places_under_one_name_must_be_the_same() -> None:
    text = ProbeText.natural(torch.arange(50))
    passes = plan_passes([Sink(length=20), Sink(length=30)], text, TOPOLOGY)
    assert len(passes) == 2
    passes = plan_passes([Sink(length=20), Sink(length=20, eps=0.5)], text, TOPOLOGY)
    assert len(passes) == 1


def test_base_needs_go_into_the_first_pass() -> None:
    text = ProbeText.natural(torch.arange(50))
    first, second = plan_passes(
        [Locality(window=8), Streaming(2, 4)], text, TOPOLOGY, Needs(("block_mass",), {"block": 16, "local_window": 4})
    )
    assert first.names[0] == "block_mass"
    assert first.probes == [Streaming(2, 4)]
    assert second.probes == [Locality(window=8)]
    assert "block" not in second.request()


def test_probes_are_frozen_values() -> None:
    assert Sink() == Sink()
    assert Sink().parameters() == {"position": 0, "eps": 0.3, "length": None}
    with pytest.raises(AttributeError):
        Sink().eps = 0.4
    assert issubclass(Sink, Probe)
