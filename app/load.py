"""Several people at once: asks a running dashboard for tiles as browsers do, and says how long the answers took.

    python -m headscope.app.load http://127.0.0.1:8050 RUN [--clients 4] [--rate 50] [--seconds 60]

Each client walks through the map of a head: a place and a zoom, all tiles in sight there, the next place. Latency counts from the moment at
which a request was due, not from when a connection came free, so a server that falls behind cannot hide it. Tiles differ between clients,
and a share of them (`--exact`) is recomputed from q and k.
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

CONNECTIONS = 6
"""Of one browser to one server."""


@dataclass
class Result:
    """Latencies in milliseconds by kind of tile, what went wrong, and bytes received."""

    stored: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    received: int = 0
    largest: int = 0

    def to_dict(self) -> dict[str, object]:
        """Counts and percentiles."""
        every = self.stored + self.exact
        return {
            "requests": len(every),
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            "megabytes": round(self.received / 1e6, 1),
            "largest_bytes": self.largest,
            **{name: _percentiles(values) for name, values in (("all", every), ("stored", self.stored), ("exact", self.exact)) if values},
        }


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1) for name, share in at.items()} | {
        "max": round(ordered[-1], 1)
    }


def walk(dice: random.Random, facts: dict[str, Any], exact: float) -> Iterator[tuple[bool, str]]:
    """(whether recomputed, path behind the head) of tile after tile."""
    tokens, tile = int(facts["tokens"]), int(facts["tile"])
    stored, finer = list(facts["stored"]), list(facts["exact"])
    while True:
        near = bool(finer) and dice.random() < exact
        block = dice.choice([one for one in finer if one <= 2]) if near else dice.choice(stored)
        cells = -(-tokens // block)
        last = -(-cells // tile) - 1
        i, j = sorted((dice.randint(0, last), dice.randint(0, last)), reverse=True)
        plane = dice.choice(("mass", "max"))
        for row in (i, min(i + 1, last)):
            for column in (j, min(j + 1, last)):
                if column <= row:
                    yield near, f"tile/{plane}/{block}/{row}/{column}"


def run(address: str, run_id: str, *, clients: int = 4, rate: float = 50, seconds: float = 60, exact: float = 0.2, seed: int = 0) -> Result:
    """Asks for `rate` tiles a second in all, for so long. The head of each client is the run's first, second, ... one."""
    place = urlsplit(address)
    host, port = place.hostname or "127.0.0.1", place.port or 80
    facts, heads = _facts(host, port, run_id)
    result, lock, threads = Result(), threading.Lock(), []
    begin = time.perf_counter() + 0.5
    for number in range(clients):
        layer, head = heads[number % len(heads)]
        base = f"/api/run/{quote(run_id, safe='')}/{layer}/{head}/"
        due: queue.Queue[tuple[float, bool, str] | None] = queue.Queue()
        steps = walk(random.Random(seed * 1000 + number), facts, exact)
        count = int(rate * seconds / clients)
        for step in range(count):
            near, path = next(steps)
            due.put((begin + (step + number / clients) * clients / rate, near, base + path))
        for _ in range(CONNECTIONS):
            due.put(None)
            threads.append(threading.Thread(target=_client, args=(host, port, due, result, lock), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def _facts(host: str, port: int, run_id: str) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """What the viewer of the run's first head is told, and the heads of the run, asked of the server as the page does."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    name = quote(run_id, safe="")
    try:
        connection.request("GET", f"/api/run/{name}/facts", headers={"Host": f"{host}:{port}"})
        answer = connection.getresponse()
        text = answer.read()
    except OSError as error:
        raise SystemExit(f"http://{host}:{port} does not answer ({error}): start it with `headscope app RUNS`") from error
    if answer.status != 200:
        raise SystemExit(text.decode("utf-8", "replace").strip())
    found = json.loads(text)
    return found, [(int(layer), int(head)) for layer, head in found["heads"]]


def _client(host: str, port: int, due: queue.Queue[tuple[float, bool, str] | None], result: Result, lock: threading.Lock) -> None:
    connection = http.client.HTTPConnection(host, port, timeout=60)
    while (one := due.get()) is not None:
        when, near, path = one
        time.sleep(max(when - time.perf_counter(), 0))
        wrong, size = "", 0
        try:
            connection.request("GET", path, headers={"Host": f"{host}:{port}", "Accept-Encoding": "gzip"})
            answer = connection.getresponse()
            body = answer.read()
            size = len(body)
            if answer.status != 200:
                wrong = f"{answer.status} {path} {body[:80]!r}"
        except OSError as error:
            wrong = f"{path}: {error}"
            connection.close()
        took = (time.perf_counter() - when) * 1000
        with lock:
            (result.exact if near else result.stored).append(took)
            result.received += size
            result.largest = max(result.largest, size)
            if wrong:
                result.errors.append(wrong)
    connection.close()


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 1 when an answer was an error."""
    parser = argparse.ArgumentParser(prog="python -m headscope.app.load", description="Ask a dashboard for tiles as several browsers do.")
    parser.add_argument("address", help="of the dashboard, for example http://127.0.0.1:8050")
    parser.add_argument("run", help="id of a run that has maps")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rate", type=float, default=50, help="tiles a second, all clients together")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--exact", type=float, default=0.2, help="share of tiles recomputed from q and k, where the run has them")
    given = parser.parse_args(arguments)
    if not re.match(r"https?://", given.address) or min(given.clients, given.rate, given.seconds) <= 0:
        parser.error("pass an address that starts with http:// and counts above zero")
    result = run(given.address, given.run, clients=given.clients, rate=given.rate, seconds=given.seconds, exact=given.exact)
    json.dump(result.to_dict(), sys.stdout, indent=2)
    print()
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
