"""What the training scripts share: seeds, the step of an optimiser, progress, and how a checkpoint is written.

A run is a function of its seed. Its length and its rate are counted in steps, never in seconds, and only deterministic kernels are used:
on the same kind of device and the same torch the same script gives the same weights, bit for bit. A clock in the schedule, or one atomic
addition in a backward pass, is enough for a retrained model whose numbers nobody can compare with the card's.

Weights are kept in bfloat16, which halves the wheel; every number in a card is measured after that rounding, on what is shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from headscope.models.checksum import sha256_file


def arguments(description: str, *, steps: int, seed: int = 0) -> argparse.ArgumentParser:
    """The options that every training script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint; made if it is not there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=seed)
    return parser


def settle(seed: int, *, strict: bool = False) -> None:
    """Seeds torch and switches to deterministic kernels, for a script that trains. Call it before anything touches the device.

    `strict` also rules out cuDNN's fused attention, whose backward pass adds in the order in which blocks happen to end. Over some hundred
    tokens there is one block, so that the vision and diffusion models can have its speed: they were retrained to the same bits with it.
    Fresh memory is not filled: one kernel more for every tensor would help only code that reads what it never wrote.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)


def generator(seed: int, device: str | torch.device) -> torch.Generator:
    """A generator of its own: data never depend on what else drew random numbers."""
    return torch.Generator(device=device).manual_seed(seed)


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def autocast(device: str | torch.device) -> AbstractContextManager[Any]:
    """bfloat16 products on CUDA, plain float32 elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if torch.device(device).type == "cuda" else nullcontext()


class Trainer:
    """AdamW with a warm-up, a constant rate, and a cosine to zero over the last part `cool` of the run.

    Matrices decay, vectors (norms, biases) do not; gradients are clipped to norm 1. A run ends after `steps` steps.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        steps: int,
        rate: float,
        *,
        warm: int = 100,
        cool: float = 0.5,
        decay: float = 0.05,
        ema: float = 0.0,
    ) -> None:
        self.steps, self.rate, self.warm, self.cool = steps, rate, warm, cool
        self.weights = [item for item in model.parameters() if item.requires_grad]
        groups = [
            {"params": [item for item in self.weights if item.ndim > 1], "weight_decay": decay},
            {"params": [item for item in self.weights if item.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=self.weights[0].is_cuda)
        self.ema = ema
        self.average = [item.detach().clone() for item in self.weights] if ema else []
        self.done, self.start = 0, time.perf_counter()

    @property
    def progress(self) -> float:
        """How much of the run is over, 0 to 1."""
        return min(1.0, self.done / self.steps)

    def factor(self, progress: float) -> float:
        """The rate at a point of the run, as a share of the full one."""
        if self.done < self.warm:
            return (self.done + 1) / self.warm
        return 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 1 + self.cool) / self.cool))

    def step(self, loss: torch.Tensor, progress: float | None = None) -> None:
        """Back-propagates a scalar loss and moves the weights, at the rate of `progress` (the run's own by default)."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.move(progress)

    def move(self, progress: float | None = None) -> None:
        """Moves the weights along the gradients that they hold; see `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.factor(self.progress if progress is None else progress)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.done += 1
        if self.ema:
            keep = min(self.ema, (1 + self.done) / (10 + self.done))
            torch._foreach_lerp_(self.average, [item.detach() for item in self.weights], 1 - keep)

    def use_average(self) -> None:
        """Puts the averaged weights into the model."""
        with torch.no_grad():
            for item, mean in zip(self.weights, self.average, strict=True):
                item.copy_(mean)

    @property
    def seconds(self) -> float:
        """Wall seconds since the trainer was made."""
        return time.perf_counter() - self.start


def save(model: Any, out: Path, *, seconds: float, steps: int, seed: int, device: str, **more: Any) -> None:
    """Writes config.json, the weights in bfloat16, and training.json with how it came to be and what the weights hash to."""
    out.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    (weights,) = (path for path in out.glob("*.safetensors") if path.stem.endswith("model"))
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    count = sum(item.numel() for item in model.parameters())
    facts = {"seconds": round(seconds, 1), "steps": steps, "seed": seed, "device": name, "torch": torch.__version__, "parameters": count}
    facts["sha256"] = sha256_file(weights)
    write_json(out / "training.json", facts | {"options": _given(sys.argv[1:])} | more)


def _given(words: list[str]) -> str:
    """The command line without --out DIR, and with --begin FIRST for whatever directory that was."""
    kept, folder = [], ""
    for word in words:
        if folder == "--begin":
            kept.append("FIRST")
        elif folder != "--out" and word != "--out":
            kept.append(word)
        folder = word if word in ("--out", "--begin") else ""
    return " ".join(kept)


def write_json(path: Path, content: Any) -> None:
    """JSON with sorted keys and a final newline, so that two runs differ only where the numbers do."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
