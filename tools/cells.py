"""The one reader of a page's code cells: the tangler, the tests and the badges use it."""

import ast
from typing import NamedTuple

from jupytext.myst import CODE_DIRECTIVE, get_parser, myst_to_notebook
from nbformat import NotebookNode


class Cell(NamedTuple):
    """A code cell and where it stands; lines are counted from 1."""

    node: NotebookNode
    fence: int  # the line of its opening fence
    first: int  # the line of its first line of code


def has_cells(text: str) -> bool:
    """Say whether a page has code cells at all."""
    return CODE_DIRECTIVE in text


def code_cells(text: str, notebook: NotebookNode | None = None) -> list[Cell]:
    """Return the code cells of a page, in order."""
    notebook = myst_to_notebook(text) if notebook is None else notebook
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    fences = [
        token.map  # counted from 0; the end is the line after the closing fence
        for token in get_parser().parse(text + "\n")
        if token.type == "fence" and token.level == 0 and token.info.startswith(CODE_DIRECTIVE)
    ]
    return [
        Cell(cell, start + 1, end - len(cell.source.split("\n")))
        for cell, (start, end) in zip(cells, fences, strict=True)
    ]


def bound_names(node: ast.stmt) -> list[str]:
    """Return the names that a definition or an assignment binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    inner = [item for target in targets for item in ast.walk(target)]
    return [i.id for i in inner if isinstance(i, ast.Name) and isinstance(i.ctx, ast.Store)]


def public_names(source: str) -> list[str]:
    """Return the names without underscore that a cell binds."""
    names = [name for node in ast.parse(source).body for name in bound_names(node)]
    return [name for name in names if not name.startswith("_")]
