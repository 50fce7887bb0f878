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
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jupytext.myst import myst_to_notebook

ROOT = Path(__file__).resolve().parents[1]


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
    """Return the first heading and the paragraph below it."""
    text = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    blocks = [block.strip() for block in text.split("\n\n")]
    at = next((i for i, b in enumerate(blocks) if b.startswith("# ")), None)
    if at is None:
        return "", ""
    return blocks[at][2:].strip(), "\n".join(blocks[at + 1 : at + 2])


def split_cell(source: str, where: str) -> tuple[list[str], str, list[str]]:
    """Split a cell into its import statements, the other source, the names it defines."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        page, first = where.rsplit(":", 1)
        line = int(first) + (error.lineno or 1) - 1
        text = (error.text or "").strip()
        raise TangleError(
            f"{page}:{line}: an exported cell must be plain Python, without magics: "
            f"{error.msg}: {text}"
        ) from error
    lines, imports, names = source.splitlines(), [], []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(ast.unparse(node))
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    body = "\n".join(line for line in lines if line is not None).strip("\n")
    return imports, body, names


def read_chapter(page: Path) -> Module | None:
    """Return the module of a page, or None if the page exports nothing."""
    text = page.read_text("utf8")
    if "{code-cell}" not in text:
        return None
    notebook = myst_to_notebook(text, add_source_map=True)
    module = Module(page.stem, *title_and_summary(notebook))
    for cell, line in zip(notebook.cells, notebook.metadata.source_map, strict=True):
        if cell.cell_type != "code" or "export" not in cell.metadata.get("tags", []):
            continue
        where = f"{page.name}:{first_code_line(text, line, cell.source)}"
        imports, body, names = split_cell(cell.source, where)
        module.imports += [i for i in imports if i not in module.imports]
        if body:
            module.bodies.append(body)
        for name in names:
            if name in module.names:
                raise TangleError(f"{where}: {name} is exported already at {module.names[name]}")
            module.names[name] = where
    return module if module.bodies else None


def first_code_line(text: str, cell_line: int, source: str) -> int:
    """Return the line of a cell's first line of code (the source map may name its fence)."""
    first = source.splitlines()[0] if source else ""
    lines = text.splitlines()
    for number in range(cell_line - 1, len(lines)):
        if lines[number] == first:
            return number + 1
    return cell_line


def render_module(module: Module) -> str:
    """Return the text of ``s4mini/NAME.py``."""
    summary = textwrap.fill(" ".join(module.summary.split()), 88)
    public = sorted(name for name in module.names if not name.startswith("_"))
    docstring = f"{module.title}.\n\n{summary}\n\nTangled from book/{module.name}.md."
    head = f'"""{docstring}\n"""'
    listing = "__all__ = [" + ", ".join(f'"{name}"' for name in public) + "]"
    return ruff("\n\n".join([head, "\n".join(module.imports), listing, *module.bodies]) + "\n")


def render_init(modules: list[Module], root: Path) -> str:
    """Return the text of ``s4mini/__init__.py``: the public names, and what they need."""
    intro = myst_to_notebook((root / "book" / "intro.md").read_text("utf8"))
    _, summary = title_and_summary(intro)
    public = {m.name: [n for n in m.names if not n.startswith("_")] for m in modules}
    core = [m.name for m in modules if m.name not in EXTRAS]
    width = max(len(m.name) for m in modules)
    return ruff(
        INIT.format(
            summary=textwrap.fill(" ".join(summary.split()), 80),
            table="\n".join(f"    {m.name:<{width}}  {m.title}" for m in modules),
            imports="\n".join(f"from s4mini.{m} import {', '.join(public[m])}" for m in core),
            listing=", ".join(f'"{name}"' for m in core for name in public[m]),
            extras="\n".join(
                f'    "{name}": ("{m}", "{extra}"),'
                for m, extra in EXTRAS.items()
                for name in public.get(m, [])
            ),
        )
    )


# Modules that import more than torch and numpy, and the extra that brings it.
EXTRAS = {"train": "train", "figures": "book"}

INIT = '''"""s4mini: structured state space models, from the book that derives them.

{summary}

Each module is a chapter of the book:

{table}

Every public name can be imported from here or from its module:

    >>> from s4mini import S4Layer
    >>> layer = S4Layer(d_model=8)

``train`` needs ``pip install "s4mini[train]"``, ``figures`` needs
``pip install "s4mini[book]"``; the rest needs torch and numpy only.
"""

from importlib import import_module

{imports}

__all__ = [{listing}]

# Names whose modules need more than torch and numpy: imported when first asked for.
_LAZY = {{
{extras}
}}


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 's4mini' has no attribute {{name!r}}")
    module, extra = _LAZY[name]
    try:
        return getattr(import_module(f"s4mini.{{module}}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f's4mini.{{name}} needs {{error.name}}: pip install "s4mini[{{extra}}]"',
            name=error.name,
        ) from error
'''


def ruff(text: str) -> str:
    """Sort the imports of a module's text and format it."""
    for args in (["check", "--quiet", "--fix", "--select", "I,F401,RUF022"], ["format", "--quiet"]):
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
