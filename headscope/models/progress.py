"""What model sources say while they work: always on stderr, so that `headscope ... --json > file` stays a file that parses."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line to the person, on stderr."""
    sys.stderr.write(f"headscope: {text}\n")
    sys.stderr.flush()
