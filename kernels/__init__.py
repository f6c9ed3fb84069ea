"""Kernels that measure and run attention, and the one place that chooses between them.

    from headscope.kernels import measure, naive_measure, use_backend

This folder is `headscope.kernels`. With the repository root on sys.path it can also be found as a top-level `kernels`, which is the name of
Hugging Face's package that transformers imports; a module of ours in its place makes that import fail far from its cause. So a top-level
import is handed over to the other package, wherever it is on sys.path, and where there is none the module stays empty: `from kernels
import anything` is then an ImportError, as it is without this folder. Names are looked up when first used (PEP 562): importing the
package loads neither torch nor triton.
"""

if __name__ == "kernels":

    def _hand_over() -> None:
        """Puts the next `kernels` on sys.path, past this folder, into sys.modules in our place."""
        import importlib.util
        import os
        import sys
        from importlib.machinery import PathFinder

        root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
        others = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != root]
        spec = PathFinder.find_spec("kernels", others)
        if spec is None or spec.loader is None:
            return
        ours = sys.modules["kernels"]
        other = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = other
        try:
            spec.loader.exec_module(other)
        except BaseException:
            sys.modules["kernels"] = ours
            raise

    _hand_over()

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.kernels.dispatch import backend_for, measure, use_backend
    from headscope.kernels.gather import attention_rows, gather_weights
    from headscope.kernels.naive import naive_measure, naive_weights

__all__ = ["attention_rows", "backend_for", "gather_weights", "measure", "naive_measure", "naive_weights", "use_backend"]

_NAMES = {
    "attention_rows": "gather",
    "backend_for": "dispatch",
    "gather_weights": "gather",
    "measure": "dispatch",
    "naive_measure": "naive",
    "naive_weights": "naive",
    "use_backend": "dispatch",
}


def __getattr__(name: str) -> Any:
    if __name__ == "kernels" or name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
