"""Our folder must not stand in for another package called `kernels`, which transformers imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *path: str) -> str:
    """What Python prints when started in the repository root, with the root first on its path and `path` after it."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    env |= {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A folder with another `kernels` package in it, with a submodule."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "9.9"\nfrom kernels.layer import get_kernel\n')
    (package / "layer.py").write_text("def get_kernel(name):\n    return 'other ' + name\n")
    return str(tmp_path)


def test_the_other_package_is_loaded_in_our_place(other: str) -> None:
    said = python(
        "import sys, kernels, kernels.layer; print(sys.path[0] == '', kernels.__version__, kernels.get_kernel('x'), kernels.__file__)",
        other,
    )
    assert said == f"True 9.9 other x {Path(other) / 'kernels' / '__init__.py'}"


def test_from_import_sees_the_other_package(other: str) -> None:
    assert python("from kernels import get_kernel; print(get_kernel('y'))", other) == "other y"


def test_an_error_in_the_other_package_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ValueError('broken on its own')\n")
    said = python("try:\n    import kernels\nexcept ValueError as error:\n    print(error)", str(tmp_path))
    assert said == "broken on its own"


def test_without_another_package_there_is_nothing_to_import() -> None:
    code = (
        "import kernels, sys\n"
        "print(hasattr(kernels, '__version__'), 'torch' in sys.modules)\n"
        "try:\n    from kernels import measure\nexcept ImportError:\n    print('absent')"
    )
    assert python(code).split() == ["False", "False", "absent"]


def test_transformers_models_import_from_the_root() -> None:
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.integrations import hub_kernels\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))\n"
        "print('loaded')"
    )
    assert python(code) == "loaded"


def test_our_package_is_lazy() -> None:
    """Importing the package loads no triton and no torch; names appear when used."""
    code = (
        "import sys, headscope.kernels as k\n"
        "print('torch' in sys.modules, 'triton' in sys.modules, k.__name__, sorted(k.__all__) == k.__all__)\n"
        "k.measure\n"
        "print('torch' in sys.modules, 'triton' in sys.modules)"
    )
    types = ROOT / ".types"
    path = [str(types)] if types.is_dir() else []
    first, second = python(f"import sys; sys.path[:0] = {path!r}\n{code}").splitlines()
    assert first == "False False headscope.kernels True"
    assert second == "True False"
