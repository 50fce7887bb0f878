"""The package as someone who imports it meets it."""

import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import s4mini

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.stem for p in (ROOT / "s4mini").glob("*.py") if p.stem != "__init__")


PUBLIC = [
    pytest.param(module, name, id=f"{module}.{name}")
    for module in MODULES
    for name in import_module(f"s4mini.{module}").__all__
]


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf8"), re.S)
)
def test_the_readme_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_install_needs_torch_and_numpy_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    needed = {re.match(r"[\w-]+", item)[0] for item in project["dependencies"]}
    assert needed == {"torch", "numpy"}
    assert set(project["optional-dependencies"]) == {
        "train",
        "keops",
        "triton",
        "onnx",
        "book",
        "test",
    }


def test_the_pins_accept_the_oldest_python_that_is_promised():
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    oldest = re.fullmatch(r">=(3\.\d+)", promised["requires-python"])[1] + ".0"
    makefile = (ROOT / "Makefile").read_text("utf8")
    assert f"version_info < ({oldest.removesuffix('.0').replace('.', ', ')})" in makefile
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text("utf8").splitlines()
        if line and not line.startswith("#")
    )
    installed = {}
    for name, version in pinned.items():
        found = distribution(name)
        assert found.version.split("+")[0] == version, f"{name}: {found.version}, pinned {version}"
        needed = found.metadata["Requires-Python"]
        installed[name] = needed
        assert needed is None or oldest in SpecifierSet(needed), f"{name} needs Python {needed}"
    assert len(installed) > 100


def test_an_older_python_is_told_which_is_needed(tmp_path):
    old = tmp_path / "python"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; '
        'sys.version_info = (3, 9, 1); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={old}", ".venv/.ready"]
    for name in ("requirements.txt", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, found 3.9.1" in done.stdout + done.stderr


def test_torch_brings_its_own_triton():
    pins = [
        *(ROOT / "constraints.txt").read_text("utf8").splitlines(),
        *(ROOT / "requirements.txt").read_text("utf8").splitlines(),
    ]
    assert not [line for line in pins if re.match(r"triton\s*[=<>~!]", line)]


def test_import_without_the_extras():
    program = """
import sys

for name in {absent}:
    sys.modules[name] = None  # importing it fails, looking for it finds nothing
import pydoc
import s4mini

for name in dir(s4mini):
    getattr(s4mini, name)
from s4mini import *
assert "fit" not in dir(s4mini)
text = pydoc.plain(pydoc.render_doc(s4mini))
assert "S4Layer" in text and "dplr_kernel" in text
try:
    s4mini.fit
except ModuleNotFoundError as error:
    assert 's4mini[train]' in str(error), error
else:
    raise AssertionError("training was imported without lightning")
"""
    absent = {
        "lightning",
        "matplotlib",
        "plotly",
        "sklearn",
        "scipy",
        "sympy",
        "IPython",
        "triton",
        "pykeops",
        "huggingface_hub",
        "safetensors",
        "tensorboard",
        "tqdm",
    }
    code = program.format(absent=absent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_face_is_small_and_hides_no_module():
    names = [name for name in dir(s4mini) if not name.startswith("_")]
    assert 25 <= len(names) <= 40
    assert not set(names) & set(MODULES)
    for name in names:
        value = getattr(s4mini, name)
        home = getattr(value, "__module__", None)
        assert home is None or getattr(import_module(home), name) is value
    for module in MODULES:
        assert getattr(s4mini, module) is import_module(f"s4mini.{module}")


def test_a_star_brings_the_face_and_nothing_else():
    found = {}
    exec("from s4mini import *", found)
    del found["__builtins__"]
    assert {"S4Layer", "hippo", "fit"} <= set(found) == {*dir(s4mini)} - {"__version__"}
    assert all(found[name] is getattr(s4mini, name) for name in found)


def test_the_package_loads_what_is_asked_for():
    code = "import sys, s4mini; assert 'torch' not in sys.modules; s4mini.hippo('legs', 4)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_of_the_package_fits_on_a_few_screens():
    assert len(pydoc.plain(pydoc.render_doc(s4mini)).splitlines()) < 150


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'S5Layer'"):
        _ = s4mini.S5Layer


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_docstrings_say_what_a_caller_needs(module, name):
    value = getattr(import_module(f"s4mini.{module}"), name)
    if not callable(value):
        return
    text = inspect.getdoc(value) or ""
    summary = text.split("\n\n")[0]
    assert summary.endswith((".", "]")) and len(summary.splitlines()) == 1, summary
    assert f"book/{module}.md" in text, "no Source line that names the chapter"
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        assert re.search(rf"\b{parameter.name}\b.*:", text), f"{parameter.name} is not described"


def test_the_reference_page_lists_every_module():
    page = (ROOT / "book" / "api.md").read_text("utf8")
    assert re.findall(r"automodule:: s4mini\.(\w+)", page) == reading_order()


def reading_order():
    toc = (ROOT / "_toc.yml").read_text("utf8")
    return [name for name in re.findall(r"book/(\w+)", toc) if name in MODULES]


# Here the names are the arguments' own (pattern, rule, tensor), or checked against what is read.
NAMES_ARE_DATA = {
    "checks.check_tensors",
    "checks.checked",
    "data.load",
    "generating.check_batch",
    "ssm.promote",
}


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_no_parameter_swallows_misspelt_names(module, name):
    value = getattr(import_module(f"s4mini.{module}"), name)
    if not inspect.isfunction(value) or f"{module}.{name}" in NAMES_ARE_DATA:
        return
    kinds = [p.kind for p in inspect.signature(value).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
