"""RunCard: everything that one must know to read a number of a profile, or to make it again.

A score without its text, length, dtype and kernel cannot be compared with another; so the card travels with the numbers and a profile
cannot be made without one.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

from headscope.store.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from headscope.scope import Scope


KINDS: dict[str, type] = {
    "model": dict, "data": list, "probes": list, "metrics": dict, "numbers": dict, "attention_kernels": list, "parameters": dict,
    "seeds": dict, "versions": dict, "machine": dict, "seconds": dict, "notes": list, "left_out": dict, "interventions": list,
}  # fmt: skip
MODEL_FACTS = {"name", "class", "layers", "heads", "kv_heads", "head_dim", "parameters", "dtype", "device"}
DATA_FACTS = {"name", "kind", "sha256", "sequences", "tokens"}


@dataclass(slots=True)
class RunCard:
    """What a profile was made of and with. Plain data throughout; written to card.json.

    - `model`: name, source, revision, class, fingerprint, layers, heads and kv_heads a layer, head_dim, parameters, dtype, device.
    - `data`: per kind of text: name, kind, sha256 of the ids that the model saw, sequences, tokens a sequence.
    - `probes`: name, parameters, source of each. `metrics`: per metric its probe, unit, what a large value means, range, kind of text.
    - `numbers`: about the whole model, such as the share of sink heads. `parameters` of the statistics and texts; `seeds` of random texts.
    - `attention_kernels`: the model's attention implementations that really ran; `statistics_kernel`: what measured.
    - `interventions`: what was changed in the model while it was measured: name, what it does in words, and its specification where that is
      plain data. Empty for the model as it is.
    - `notes`: what a reader of the active probes' numbers must know. `left_out`: probe -> why it says nothing about this model.
    - `versions`, `machine`, `seconds`: software, hardware, time per step. `files`: filled in when the run is saved.
    """

    model: dict[str, Any]
    data: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    numbers: dict[str, float]
    attention_kernels: list[str]
    statistics_kernel: str
    parameters: dict[str, Any]
    seeds: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    headscope_version: str = ""
    created: str = ""
    schema_version: int = SCHEMA_VERSION
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    interventions: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RunCard:
        """From plain data; TypeError where a field is missing or of another kind."""
        names = {item.name for item in fields(cls)}
        card = cls(**{name: value[name] for name in value if name in names})
        for name, kind in KINDS.items():
            if not isinstance(getattr(card, name), kind):
                raise TypeError(f"{name} is not a {kind.__name__}")
        if not all(isinstance(name, str) for name in (card.created, card.statistics_kernel, *card.attention_kernels)):
            raise TypeError("created or a kernel is not a name")
        for what, rows, needed in (("model", [card.model], MODEL_FACTS), ("data", card.data, DATA_FACTS)):
            for row in rows:
                missing = needed - set(row)
                if missing:
                    raise TypeError(f"{what} lacks {', '.join(sorted(missing))}")
        return card

    @property
    def context(self) -> int | None:
        """Tokens of the natural text, None when the run has none."""
        return next((int(row["tokens"]) for row in self.data if row["kind"] == "natural"), None)

    def lines(self) -> list[str]:
        """The card in a few lines for people."""
        model = self.model
        revision = f", revision {model['revision']}" if model.get("revision") else ""
        out = [
            f"model   {model['name']} ({model['class']}{revision}): {model['layers']} layers x {model['heads']} heads, "
            f"{model['kv_heads']} key heads, head_dim {model['head_dim']}, {model['parameters'] / 1e6:.0f} M parameters, "
            f"{model['dtype']} on {model['device']}"
        ]
        for row in self.data:
            out.append(
                f"text    {row['kind']}: {row['sequences']} x {row['tokens']} tokens of {row['name']} "
                + (f" (sha256 {row['sha256'][:12]})" if row["sha256"] else "")
            )
        kernels = ", ".join(self.attention_kernels) or "unknown"
        took = f"{self.seconds['total']:.0f} s; " if self.seconds.get("total") else ""
        statistics = f", statistics {self.statistics_kernel}" if self.statistics_kernel else ""
        out.append(f"kernels attention {kernels}{statistics}; {took}{self.created[:16]}")
        if self.numbers:
            out.append("numbers " + ", ".join(f"{name} {value:.3f}" for name, value in self.numbers.items()))
        out += [f"changed by {row.get('name')}: {row.get('what', '')}" for row in self.interventions]
        out += [f"note    {note}" for note in self.notes]
        out += [f"without {name}: {why}" for name, why in self.left_out.items()]
        return out

    def __repr__(self) -> str:
        return f"RunCard({self.model.get('name')!r}, {len(self.metrics)} metrics, context={self.context}, created={self.created[:19]!r})"


def model_facts(scope: Scope) -> dict[str, Any]:
    """The card's `model` of a Scope."""
    topology = scope.topology
    main = topology.main
    return {
        "name": scope.name,
        "source": scope.source,
        "revision": scope.revision,
        "class": topology.model_class,
        "fingerprint": scope.fingerprint,
        "layers": len(main),
        "heads": max(module.heads for module in main),
        "kv_heads": max(module.kv_heads for module in main),
        "head_dim": max(module.head_dim for module in main),
        "parameters": sum(parameter.numel() for parameter in scope.model.parameters()),
        "dtype": str(scope.dtype).removeprefix("torch."),
        "device": str(scope.device),
        "max_length": scope.max_length,
    }


def intervention_facts(scope: Scope) -> list[dict[str, Any]]:
    """The card's `interventions`: what this thread has open on a Scope."""
    from headscope.errors import InterventionError

    out: list[dict[str, Any]] = []
    for one in scope.interventions:
        facts: dict[str, Any] = {"name": one.name or type(one).__name__, "what": one.explain()}
        with suppress(InterventionError):  # one with tensors has no specification without a file
            facts["specification"] = json.loads(one.to_json())
        out.append(facts)
    return out


def version_facts() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    out = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def machine_facts(device: str) -> dict[str, Any]:
    """The hardware, without anything that names the machine or its owner."""
    import torch

    out: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return out


def now() -> str:
    """UTC in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
