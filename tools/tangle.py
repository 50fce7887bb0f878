"""Write the book's exported cells into the package.

    python tools/tangle.py             every chapter, and s4mini/__init__.py
    python tools/tangle.py ssm hippo   only these chapters
    python tools/tangle.py --check     change nothing; fail if s4mini/ is out of date

A chapter is ``book/NAME.md``. Its code cells tagged ``export`` become
``s4mini/NAME.py``: docstring from the title and first paragraph, imports hoisted
and merged, ``__all__`` from the public definitions, then the cells in reading
order, formatted by ruff. The order of chapters is that of ``_toc.yml``.
"""

import argparse
import ast
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jupytext.myst import MystMetadataParsingError, myst_to_notebook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file is also run as a program

from tools.cells import bound_names, code_cells, has_cells  # noqa: E402


class TangleError(Exception):
    """A page cannot be tangled; the message starts with page and line."""


@dataclass
class Module:
    """What one chapter exports."""

    name: str
    title: str
    summary: str
    imports: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # public name -> "page:line"


def chapters(root: Path) -> list[Path]:
    """Return the pages of the table of contents, in reading order."""

    def walk(node):
        if isinstance(node, list):
            for item in node:
                yield from walk(item)
        elif isinstance(node, dict):
            for key in ("root", "file"):
                if key in node:
                    yield root / f"{node[key]}.md"
            for value in node.values():
                yield from walk(value)

    return list(walk(yaml.safe_load((root / "_toc.yml").read_text("utf8"))))


def title_and_summary(notebook) -> tuple[str, str]:
    """Return the first heading and the paragraph below it, boxes (:::) left out."""
    text = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    _, _, text = f"\n{text}".partition("\n# ")
    title, _, below = text.partition("\n")
    below = re.sub(r"^:::+\{.*?^:::+$", "", below, flags=re.DOTALL | re.MULTILINE)
    return title.strip(), " ".join(below.strip().split("\n\n")[0].split())


def parse_cell(source: str, page: str, first: int) -> ast.Module:
    """Return the syntax tree of an exported cell, with the page's line numbers."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise TangleError(
            f"{page}:{first + (error.lineno or 1) - 1}: an exported cell must be plain Python, "
            f"without magics: {error.msg}: {(error.text or '').strip()}"
        ) from error
    return ast.increment_lineno(tree, first - 1)


def split_cell(source: str, page: str, first: int):
    """Split a cell into its imports, the other source, the (name, line) pairs it defines."""
    tree = parse_cell(source, page, first)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    others = [node for node in tree.body if node not in imports]
    hoisted = {line for node in imports for line in range(node.lineno, node.end_lineno + 1)}
    for node in others:
        if hoisted & {node.lineno, node.end_lineno}:
            raise TangleError(f"{page}:{node.lineno}: an import needs a line of its own")
    lines = enumerate(source.split("\n"), first)
    body = "\n".join(line for number, line in lines if number not in hoisted).strip("\n")
    names = [(name, node.lineno) for node in others for name in bound_names(node)]
    return [ast.unparse(node) for node in imports], body, names


def read_chapter(page: Path) -> Module | None:
    """Return the module of a page, or None if the page exports nothing."""
    shown = "/".join(page.parts[-2:])
    if not page.exists():
        raise TangleError(f"{shown}: listed in _toc.yml, but there is no such page")
    text = page.read_text("utf8")
    if not has_cells(text):
        return None
    try:
        notebook = myst_to_notebook(text)
    except MystMetadataParsingError as error:
        raise TangleError(f"{shown}: {error}") from error
    module = Module(page.stem, *title_and_summary(notebook))
    for cell, _, first in code_cells(text, notebook):
        if "export" not in cell.metadata.get("tags", []):
            continue
        imports, body, names = split_cell(cell.source, shown, first)
        module.imports += [i for i in imports if i not in module.imports]
        if body:
            module.bodies.append(body)
        for name, line in names:
            where = f"{shown}:{line}"
            if name in module.names:
                raise TangleError(f"{where}: {name} is exported already at {module.names[name]}")
            module.names[name] = where
    if not module.bodies:
        return None
    if not (module.title and module.summary) or re.search(r'\\|"""', module.title + module.summary):
        raise TangleError(f"{shown}: needs a title and, below it, a summary in plain text")
    return module


def render_module(module: Module) -> str:
    """Return the text of ``s4mini/NAME.py``."""
    summary = textwrap.fill(module.summary, 88, break_on_hyphens=False)
    public = [name for name in module.names if not name.startswith("_")]
    docstring = f"{module.title}.\n\n{summary}\n\nTangled from book/{module.name}.md."
    head = f'"""{docstring}\n"""'
    listing = "__all__ = [" + ", ".join(f'"{name}"' for name in public) + "]"
    bodies = [name_the_chapter(body, module.name) for body in module.bodies]
    return ruff("\n\n".join([head, "\n".join(module.imports), listing, *bodies]) + "\n")


def name_the_chapter(body: str, chapter: str) -> str:
    """End the docstring of each public definition with the chapter it comes from."""
    lines = body.split("\n")
    for node in reversed(ast.parse(body).body):
        defines = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not defines or node.name.startswith("_") or ast.get_docstring(node) is None:
            continue
        text = node.body[0].value
        first, last = text.lineno - 1, text.end_lineno - 1
        mark = lines[last][text.end_col_offset - 3 : text.end_col_offset]
        if mark not in ('"""', "'''"):
            continue
        indent, rest = " " * text.col_offset, lines[last][: text.end_col_offset - 3].rstrip()
        told = [*lines[first:last], *([rest] if rest else [])]
        if any(line.lstrip().startswith("Source: ") for line in told):
            cited, here = f"{told[-1].rstrip('.')};", f"book/{chapter}.md."
            fits = len(f"{cited} {here}") <= 80
            told[-1:] = [f"{cited} {here}"] if fits else [cited, indent + here]
        else:
            told += ["", f"{indent}Source: book/{chapter}.md."]
        lines[first : last + 1] = [*told, indent + mark]
    return "\n".join(lines)


def first_sentences(module: Module) -> dict[str, str]:
    """Return the first line of the docstring of each definition that has one."""
    nodes = [node for body in module.bodies for node in ast.parse(body).body]
    kinds = ast.FunctionDef | ast.ClassDef
    return {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in nodes
        if isinstance(node, kinds)
    }


def needs(modules: list[Module]) -> dict[str, list[str]]:
    """Return the packages beside torch and numpy that importing each module loads."""
    direct: dict[str, set[str]] = {}
    for module in modules:
        direct[module.name] = set()
        for node in ast.parse("\n".join(module.imports)).body:
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named = named or [alias.name for alias in getattr(node, "names", [])]
            direct[module.name] |= {name.removeprefix("s4mini.").split(".")[0] for name in named}
    known = {"torch", "numpy", "s4mini", *sys.stdlib_module_names}

    def walk(name: str, seen: set[str]) -> set[str]:
        if name not in direct:
            return {name} - known
        rest = direct[name] - seen
        return set().union(*(walk(other, seen | direct[name]) for other in rest))

    return {m.name: found for m in modules if (found := sorted(walk(m.name, set())))}


def render_init(modules: list[Module], root: Path) -> str:
    """Return the text of ``s4mini/__init__.py``: the face of the package, loaded when asked for."""
    intro = myst_to_notebook((root / "book" / "intro.md").read_text("utf8"))
    _, summary = title_and_summary(intro)
    homes = {name: m.name for m in modules for name in m.names if name in FACE}
    said = {name: text for m in modules for name, text in first_sentences(m).items()}
    wide = max((len(name) for name in homes), default=0)
    width = max((len(m.name) for m in modules), default=0)
    typed = {m.name: [n for n in m.names if n in FACE] for m in modules}
    imports = "\n".join(
        f"    from s4mini.{m} import {', '.join(f'{n} as {n}' for n in names)}"
        for m, names in typed.items()
        if names
    )
    return ruff(
        INIT.format(
            summary=textwrap.fill(summary, 80, break_on_hyphens=False),
            face="\n".join(f"    {n:<{wide}}  {said.get(n, '')}".rstrip() for n in homes),
            table="\n".join(f"    {m.name:<{width}}  {m.title}" for m in modules),
            imports=imports or "    pass",
            homes="\n".join(f'    "{name}": "{home}",' for name, home in homes.items()),
            modules=", ".join(f'"{m.name}"' for m in modules),
            needs="\n".join(
                f'    "{home}": {tuple(found)!r},'
                for home, found in needs(modules).items()
                if home in homes.values()
            ),
        )
    )


# What ``import s4mini`` shows; everything else is reached through its module.
FACE = """
    hippo discretize scan krylov_kernel causal_conv
    nplr half_spectrum dplr_kernel s4d_kernel MEASURES
    S4Layer S4Block S4Config S4Model S4Classifier S4Forecaster S4LanguageModel
    parameter_groups from_official
    Source load download Recipe RECIPES Learner fit evaluate predict
""".split()

INIT = '''"""s4mini: structured state space models, from the book that derives them.

{summary}

    >>> import torch
    >>> from s4mini import S4Layer
    >>> layer = S4Layer(d_model=8)
    >>> y, _ = layer(torch.randn(2, 1000, 8))  # (batch, time, channel)

What most people need:

{face}

Everything else is reached through its module. Each module is a chapter of the book,
and ``help(s4mini.kernel)`` and the like tell more:

{table}

Training needs ``pip install "s4mini[train]"``, the figures of the book need
``pip install "s4mini[book]"``; the rest needs torch and numpy only.
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
{imports}

_HOMES = {{
{homes}
}}
_MODULES = ({modules},)
_NEEDS = {{
{needs}
}}
_EXTRAS = {{"matplotlib": "book", "plotly": "book", "sympy": "book", "triton": "triton"}}


def __getattr__(name: str):
    if name == "__version__":
        return _version("s4mini")
    if name == "__all__" and _sys._getframe(1).f_globals.get("__name__") != "pydoc":
        return _face()  # told to help() too, it would print every class in full
    module = _HOMES.get(name, name)
    if module not in _MODULES:
        raise AttributeError(f"module 's4mini' has no attribute {{name!r}}")
    try:
        found = _import_module(f"s4mini.{{module}}")
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(needed, "train")
        said = f's4mini.{{name}} needs {{needed}}: pip install "s4mini[{{extra}}]"'
        raise ModuleNotFoundError(said, name=error.name) from error
    return getattr(found, name) if name in _HOMES else found


def _face() -> list[str]:
    here = {{home for home, needed in _NEEDS.items() if all(map(_find_spec, needed))}}
    return [name for name, home in _HOMES.items() if home in here or home not in _NEEDS]


def __dir__() -> list[str]:
    return sorted([*_face(), "__version__"])
'''


def ruff(text: str) -> str:
    """Sort the imports of a module's text and format it."""
    isort = ["--config", 'lint.isort.known-first-party=["s4mini"]']
    for args in (
        ["check", "--quiet", "--fix", "--select", "I,F401", *isort],
        ["format", "--quiet"],
    ):
        command = [sys.executable, "-m", "ruff", *args, "--line-length", "88", "--isolated", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode:
            raise TangleError(f"ruff refused the module:\n{done.stderr or done.stdout}")
        text = done.stdout
    return text


def collect(root: Path, only: list[str]) -> dict[Path, str]:
    """Return the package's files as the book says they should be."""
    pages = chapters(root)
    unknown = set(only) - {page.stem for page in pages}
    if unknown:
        raise TangleError(f"not in _toc.yml: {', '.join(sorted(unknown))}")
    wanted = [page for page in pages if not only or page.stem in only]
    modules = [m for page in wanted if (m := read_chapter(page))]
    homes: dict[str, str] = {}
    for module in modules:
        for name, where in module.names.items():
            if name.startswith("_"):
                continue
            if name in homes:
                raise TangleError(f"{where}: {name} is exported already at {homes[name]}")
            homes[name] = where
    package = root / "s4mini"
    files = {package / f"{m.name}.py": render_module(m) for m in modules}
    if not only:
        files[package / "__init__.py"] = render_init(modules, root)
    return files


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", nargs="*", help="tangle only these chapters")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    options = parser.parse_args(arguments)
    try:
        files = collect(root, options.chapter)
    except TangleError as error:
        print(f"tangle: {error}", file=sys.stderr)
        return 2
    stale = [p for p, text in files.items() if not p.exists() or p.read_text("utf8") != text]
    orphans = [] if options.chapter else sorted(set((root / "s4mini").glob("*.py")) - set(files))
    for path in [] if options.check else stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[path], "utf8")
    for path in [] if options.check else orphans:
        path.unlink()
    said = "out of date" if options.check else "wrote"
    changed = [p.name for p in stale] + [f"{p.name} (no chapter)" for p in orphans]
    print(f"tangle: {said}: {', '.join(changed) or 'nothing'}")
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
