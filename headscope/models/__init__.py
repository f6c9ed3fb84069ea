"""Model sources: a hub id, a local directory, a GGUF file, a wheel on a package index. `load` makes a Scope of any of them."""

from headscope.models.catalog import ModelSource, catalog, verify_cache
from headscope.models.loading import load

__all__ = ["ModelSource", "catalog", "load", "verify_cache"]
