"""`headscope doctor`: what is installed, what this machine can do, and a self-check that the numbers are right here."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from headscope.cli.console import emit_json, say, table

PACKAGES = (
    "headscope",
    "torch",
    "transformers",
    "transformer-lens",
    "nnsight",
    "triton",
    "diffusers",
    "numpy",
    "scikit-learn",
    "plotly",
    "dash",
    "dash-mantine-components",
    "dash-ag-grid",
    "pandas",
    "pyarrow",
    "zarr",
    "safetensors",
    "gguf",
)


def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check captured against eager attention on this model.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the check.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print versions, devices and settings, and compare captured statistics with eager attention on a small model (or on MODEL)."""
    from headscope.selfcheck import check_scope, tiny_scope

    report: dict[str, Any] = {"versions": versions(), "machine": machine()}
    if model is None:
        scope = tiny_scope()
    else:
        import headscope as hs

        scope = hs.load(model)
    report["check"] = check_scope(scope, tokens=tokens)
    ok = bool(report["check"]["ok"])
    report["ok"] = ok
    if as_json:
        emit_json(report)
    else:
        table("packages", ["package", "version"], report["versions"].items())
        table("machine", ["what", "value"], report["machine"].items())
        check = report["check"]
        rows = [(name, f"{error:.1e}") for name, error in check["errors"].items()]
        table(
            f"captured against eager attention: {check['model']}, {check['tokens']} tokens, {check['dtype']}",
            ["statistic", "max error"],
            rows,
        )
        print("ok" if ok else "NOT OK")
    if not ok:
        say("captured statistics differ from eager attention by more than rounding: do not trust numbers from this setup")
        raise typer.Exit(1)


def versions() -> dict[str, str]:
    """Installed version of every package that matters; '-' where it is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def machine() -> dict[str, str]:
    """Devices, threads and the settings that change speed."""
    import torch

    from headscope.models.cache import cache_root

    cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set (PASSIVE helps where other programs share the cores)"),
        "CUDA devices": cuda,
        "model cache": str(cache_root()),
        "executable": sys.executable,
    }
