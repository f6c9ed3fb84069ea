"""What model sources say while they work: always on stderr, so that `headscope ... --json > file` stays a file that parses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """One line to the person, on stderr."""
    sys.stderr.write(f"headscope: {text}\n")
    sys.stderr.flush()


@contextmanager
def bars_only_on_a_terminal() -> Iterator[None]:
    """Switches transformers' own progress bars off for a `with` block, unless stderr is a terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
