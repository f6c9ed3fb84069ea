"""Hosts: whose model is it, and which file of this package knows how that library hands attention over.

A Scope holds one Host. The host names the torch module underneath whatever object was given (a pipeline's transformer, the model inside a
bridge or an nnsight envoy), its topology, how to fasten to it, and what is particular about running and observing it. Everything behind it
(interventions, statistics, profiles) works on any of them.

The libraries are recognised by the modules their classes come from, so that none of them is imported because another one is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from headscope.capture.attach import Attachment
from headscope.capture.observer import Observer
from headscope.errors import CaptureError, refusal
from headscope.statistics import HeadStatistics

if TYPE_CHECKING:
    from headscope.statistics import StatisticsRequest
    from headscope.topology import Topology


@dataclass(eq=False)
class Host:
    """A transformers model, or the base of the others.

    `kind`: "transformers", "module", "diffusers", "transformer_lens" or "nnsight". `given`: the object passed to Scope. `model`: the torch
    module that runs. `topology`: its attention modules, by names of its own. `attachment`: what fastens actors to it.
    """

    kind: str
    given: Any
    model: Any
    topology: Topology
    attachment: Attachment

    @property
    def takes_text(self) -> bool:
        """True for a transformers model, whose inputs are token ids."""
        return _comes_from(self.model, "transformers") and hasattr(self.model, "main_input_name")

    def observer(self, request: StatisticsRequest, verify: bool) -> Observer:
        """What measures the calls of one block."""
        return Observer(request, self.topology, verify=verify)

    def result(self, request: StatisticsRequest) -> HeadStatistics:
        """The empty statistics that the block fills."""
        return HeadStatistics(request, self.topology)

    def completed(self, names: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Statistics and parameters of a request, with what this host adds by itself."""
        return names, params

    def run(self, inputs: Any) -> None:
        """One run over inputs that are not token ids: a dict of keyword arguments, a tuple of arguments, or one argument."""
        from headscope.capture.sdpa import run_model

        run_model(self.model, inputs)


def open_host(given: Any, example: Any = None) -> Host:
    """The host of an object. `example`: inputs of one forward pass, for a torch module whose attributes do not name its heads.

    Raises CaptureError for what cannot be captured, with the reason.
    """
    if type(given).__name__ == "OptimizedModule":
        raise refusal(
            CaptureError,
            "a model wrapped by torch.compile",
            "compiled code does not ask for its attention function any more",
            "pass the model as it was before torch.compile (its _orig_mod)",
        )
    if _comes_from(given, "nnsight"):
        from headscope.capture.nnsight import nnsight_host

        return nnsight_host(given, example)
    if _comes_from(given, "transformer_lens"):
        from headscope.capture.transformer_lens import bridge_host

        return bridge_host(given)
    if _comes_from(given, "diffusers"):
        from headscope.capture.diffusers import diffusers_host

        return diffusers_host(given)
    if _comes_from(given, "transformers") and hasattr(given, "main_input_name"):
        return _transformers_host(given, example)
    kind = f"{type(given).__module__.partition('.')[0]}.{type(given).__name__}"
    if hasattr(given, "get_base_model"):
        raise refusal(CaptureError, f"a {kind}", "it wraps a transformers model", "pass model.get_base_model()")
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise refusal(CaptureError, f"a {kind}", "it runs copies of its model in other threads or processes", "pass model.module")
    if isinstance(given, nn.Module):
        from headscope.capture.sdpa import SdpaAttachment, discover_sdpa

        topology = discover_sdpa(given, example)
        return Host("module", given, given, topology, SdpaAttachment(given, topology))
    raise refusal(
        CaptureError,
        f"a {kind}",
        "it is not a transformers model, nor a model of diffusers, TransformerLens or nnsight, nor a torch module",
        "pass a transformers.PreTrainedModel, or use headscope.load(name)",
    )


def _transformers_host(model: Any, example: Any) -> Host:
    """On the interface where the model is; else by torch's own function, for the few that call it themselves (Falcon)."""
    from headscope.capture.discover import discover
    from headscope.capture.sdpa import SdpaAttachment, discover_sdpa, names_sdpa

    try:
        topology = discover(model)
    except CaptureError:
        if not any(names_sdpa(type(module)) for module in model.modules()):
            raise
        topology = discover_sdpa(model, example)
        return Host("transformers", model, model, topology, SdpaAttachment(model, topology))
    return Host("transformers", model, model, topology, Attachment(model, topology))


def _comes_from(thing: Any, library: str) -> bool:
    """True when a class of the object's family is defined in a library (a subclass written by its user counts as well)."""
    return any(base.__module__.partition(".")[0] == library for base in type(thing).__mro__)


__all__ = ["Host", "open_host"]
