"""What ships, and what an import costs: the wheel has every file and no stray top-level package; `import headscope` stays light."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {
    "headscope": "headscope",
    "headscope.probes": "probes",
    "headscope.interventions": "interventions",
    "headscope.kernels": "kernels",
    "headscope.app": "app",
}
HEAVY = (
    *("torch", "transformers", "transformer_lens", "nnsight", "diffusers", "triton", "ray"),
    *("dash", "plotly", "pandas", "sklearn", "numpy"),
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(code: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter that has not the working directory on its path."""
    env = os.environ | environment
    if "PYTHONPATH" in env:
        env["PYTHONPATH"] = os.pathsep.join(str(ROOT / entry) for entry in env["PYTHONPATH"].split(os.pathsep))
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> dict[str, Path]:
    """Every file of the package, by its path as installed."""
    found = {}
    for package, folder in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found["/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])] = path
    return found


def test_every_package_is_listed() -> None:
    """An unlisted one works in an editable install and is missing from the wheel."""
    found = {name.removesuffix("/__init__.py").replace("/", ".") for name in sources() if name.endswith("/__init__.py")}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == listed
    assert found == set(listed)


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for name, path in sources().items() if name.endswith(".py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_folders_are_mapped_into_the_package() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == MAPPED


def test_version_is_said_once() -> None:
    source = (ROOT / "headscope" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1) == PROJECT["project"]["version"]


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(row for extra in extras.values() for row in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "headscope":
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"
    assert pins["torch"] == "2.13.0"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in the tree leaves build/lib behind, from which deleted modules would ship again."""
    copy = tmp_path_factory.mktemp("source")
    for folder in MAPPED.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "notebooks"):
        (copy / name).mkdir()
        (copy / name / "__init__.py").write_text("")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out), str(copy)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_has_one_top_level_package_and_every_file(wheel: Path) -> None:
    """A top-level `kernels` in a wheel would overwrite Hugging Face's package of that name, which transformers imports."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"headscope", f"headscope-{PROJECT['project']['version']}.dist-info"}
    shipped = {name for name in names if name.startswith("headscope/")}
    assert shipped == set(sources())
    assert "headscope/py.typed" in shipped


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel installed and without the checkout."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    interpreter = folder / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    # Dependencies come from this environment by a path file, which does not run that environment's editable-install hook.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def in_clean(interpreter: Path, code: str, cwd: Path) -> dict[str, object]:
    """The JSON that `code` prints last, run by that interpreter without this process's Python settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([interpreter, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_wheel_imports_whole_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    """Installed without the checkout: every module imports, and the command line answers."""
    code = """
import importlib, json, pkgutil, headscope
names = [item.name for item in pkgutil.walk_packages(headscope.__path__, "headscope.")]
for name in names:
    importlib.import_module(name)
public = [type(getattr(headscope, name)).__name__ for name in headscope.__all__]
print(json.dumps({"file": headscope.__file__, "names": names, "public": public}))
"""
    seen = in_clean(clean, code, tmp_path)
    assert Path(seen["file"]).is_relative_to(clean.parents[1])
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources() if name.endswith(".py")}
    assert set(seen["names"]) | {"headscope"} == modules
    script = clean.parent / "headscope"
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, PROJECT["project"]["version"])


def test_bundled_models_load_from_the_wheel_without_a_network(clean: Path, tmp_path: Path) -> None:
    """A fresh process, every import included, no name looked up: under 5 seconds of processor time for bundled:vlm, and it answers."""
    code = """
import json, socket, time

def refuse(*what, **more):
    raise AssertionError(f"the network was used: {what}")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
import headscope as hs
vlm = hs.load("bundled:vlm", device="cpu")
seconds = time.process_time()
needle = hs.load("bundled:needle", device="cpu")
hay = "the old sailor carried a kettle . the code of oscar is copper maple otter . nora sketched the lantern again . "
said = needle.generate(hay + "question : what is the code of oscar ? answer :", max_new_tokens=6).text
others = {name: type(hs.load(f"bundled:{name}", device="cpu").model).__name__ for name in ("induction", "dit", "sd3")}
print(json.dumps({"file": hs.__file__, "seconds": seconds, "said": said, "vlm": type(vlm.model).__name__, "others": others}))
"""
    seen = in_clean(clean, code, tmp_path)
    assert Path(seen["file"]).is_relative_to(clean.parents[1])
    assert seen["seconds"] < 5
    assert seen["said"] == "oscar is copper maple otter ."
    assert seen["vlm"] == "LlavaForConditionalGeneration"
    assert seen["others"] == {"induction": "LlamaForCausalLM", "dit": "DiTTransformer2DModel", "sd3": "SD3Transformer2DModel"}


@pytest.mark.parametrize("module", ["headscope", "headscope.errors", "headscope.models", "headscope.cli.main"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; dir({module}); print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert python(code, tmp_path).split() == []


def test_refusing_a_name_is_light(tmp_path: Path) -> None:
    """A typo is answered before torch is imported."""
    code = f"""
import sys, headscope as hs
for spec in ("pypi:nothing", "bundled:nothing", "ftp:nothing", "./nowhere", "a/b/c"):
    try:
        hs.load(spec)
    except hs.errors.ModelError:
        continue
    raise SystemExit(spec)
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    assert python(code, tmp_path).split() == []


def test_public_names_are_sorted_complete_and_real() -> None:
    import headscope as hs

    assert hs.__all__ == sorted(hs.__all__)
    assert set(hs.__all__) <= set(dir(hs))
    for name in hs.__all__:
        assert getattr(hs, name) is not None
    lazy = set(hs._NAMES) | set(hs._MODULES)
    assert lazy | {"__version__", "dashboard"} == set(hs.__all__)
    with pytest.raises(AttributeError, match=r"has no attribute 'lode'.*load"):
        _ = hs.lode


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the table of lazy names say the same."""
    import ast

    import headscope as hs

    tree = ast.parse((ROOT / "headscope" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom) and node.module.startswith("headscope")]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {**hs._NAMES, **dict.fromkeys(hs._MODULES, "headscope")}


def test_ci_runs_make_test_and_nothing_cleverer() -> None:
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "exec make test"
    assert os.access(script, os.X_OK)


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split("\n", 2)[1].strip() == "Apache License" or text.split("\n", 1)[0].strip() == "Apache License"
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
