"""Text to profile on: eight bundled essays, and a reader for the user's own files. Nothing is downloaded."""

from headscope.data.natural import NaturalText, bundled, check_data, natural_texts

__all__ = ["NaturalText", "bundled", "check_data", "natural_texts"]
