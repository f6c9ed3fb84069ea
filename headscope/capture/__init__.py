"""Capture: how each host library's attention calls reach headscope. Everything host-specific stays in this package."""

from headscope.capture.attach import Attachment
from headscope.capture.discover import discover
from headscope.capture.observer import Observer

__all__ = ["Attachment", "Observer", "discover"]
