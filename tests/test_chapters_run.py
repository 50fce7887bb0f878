"""The chapters are tests, and notebooks: what conftest.py and jupytext.toml promise."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import jupytext
import pytest
from helpers import FRONT

from tools.tangle import chapters

ROOT = Path(__file__).resolve().parents[1]
NBVAL = ["--nbval-lax", "--nbval-current-env", "--color=no", "-p", "no:cacheprovider"]
FENCE = re.compile(r"\s*(```+|~~~+|:::+)\{code-cell\}")  # at any depth
PAGES = {
    "good": """
        # Line 12

        ```{code-cell} ipython3
        only_here = 1
        ```

        ```{code-cell} ipython3
        from pathlib import Path

        assert Path.cwd().name == "book"
        assert only_here == 1
        ```
        """,
    "fresh": """
        ```{code-cell} ipython3
        assert "only_here" not in globals()
        ```
        """,
    "fails": """
        ```{code-cell} ipython3
        ---
        tags: [hide-input]
        ---

        def halve(x):
            assert x % 2 == 0, "an odd number"
            return x // 2
        ```

        ```{code-cell} ipython3
        :tags: [hide-input]


        halve(2)
        halve(3)
        ```

        ```{code-cell} ipython3
        x = 1
        x = = 2
        ```

        ```{code-cell} ipython3
        print("the page goes on")
        ```
        """,
    "dies": """
        ```{code-cell} ipython3
        import os
        os._exit(1)
        ```
        """,
    "words": """
        # No code here
        """,
}


def run_pytest(folder, *arguments):
    """Run pytest in a folder, as from a shell; return its exit status and what it said."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *NBVAL, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def little_book(folder):
    (folder / "book").mkdir()
    shutil.copy(ROOT / "conftest.py", folder)
    shutil.copytree(ROOT / "tools", folder / "tools")
    for name, text in PAGES.items():
        (folder / "book" / f"{name}.md").write_text(FRONT + dedent(text), "utf8")
    (folder / "README.md").write_text("# Not a chapter\n\n```{code-cell} ipython3\n1 / 0\n```\n")
    return folder


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What pytest says about a little book with good and bad pages."""
    folder = little_book(tmp_path_factory.mktemp("little"))
    return run_pytest(folder, "-v", "-p", "no:xdist", "--nbval-cell-timeout=30")


def test_cells_that_run_pass_and_are_named_after_page_and_line(outcome):
    _, said = outcome
    assert re.search(r"^book/good.md::good:14 PASSED", said, re.MULTILINE)
    assert re.search(r"^book/good.md::good:18 PASSED", said, re.MULTILINE)


def test_every_page_has_a_kernel_of_its_own(outcome):
    _, said = outcome
    assert re.search(r"^book/fresh.md::fresh:12 PASSED", said, re.MULTILINE)


def test_a_failing_assert_fails_with_page_line_and_message(outcome):
    status, said = outcome
    assert status == 1
    assert re.search(r"^book/fails.md::fails:22 FAILED", said, re.MULTILINE)
    assert "\nbook/fails.md:27: AssertionError: an odd number" in said
    assert "\n    26  halve(2)\n>   27  halve(3)\n" in said


def test_a_syntax_error_fails_with_page_and_line(outcome):
    _, said = outcome
    assert re.search(r"^book/fails.md::fails:30 FAILED", said, re.MULTILINE)
    assert "\nbook/fails.md:32: SyntaxError: invalid syntax" in said


def test_the_rest_of_a_failing_page_still_runs(outcome):
    _, said = outcome
    assert re.search(r"^book/fails.md::fails:35 PASSED", said, re.MULTILINE)


def test_a_kernel_that_dies_fails_at_once(outcome):
    _, said = outcome
    assert re.search(r"^book/dies.md::dies:12 FAILED", said, re.MULTILINE)
    assert "\nbook/dies.md:12: the kernel died" in said


def test_only_pages_with_code_cells_are_collected(outcome):
    _, said = outcome
    assert "words.md" not in said and "README.md" not in said
    assert re.search(r"3 failed, 5 passed in", said)


def test_two_workers_say_the_same(tmp_path):
    folder = little_book(tmp_path)
    pages = ["book/good.md", "book/fails.md"]
    status, said = run_pytest(folder, "-n", "2", "--dist", "loadfile", *pages)
    assert status == 1 and re.search(r"2 failed, 4 passed in", said), said
    assert "\nbook/fails.md:27: AssertionError: an odd number" in said


# The book itself.

WITH_CODE = [p for p in chapters(ROOT) if p.exists() and FENCE.search(p.read_text("utf8"))]


def name(page):
    return page.relative_to(ROOT).as_posix()


def test_every_code_cell_of_every_chapter_is_collected():
    pages = [name(page) for page in WITH_CODE]
    assert pages, "no chapter has code cells"
    _, said = run_pytest(ROOT, "--collect-only", "-q", "-p", "no:xdist", "-o", "addopts=", *pages)
    found = set(re.findall(r"^(book/\S+\.md::\S+)$", said, re.MULTILINE))
    wanted = {
        f"{name(page)}::{page.stem}:{number}"
        for page in WITH_CODE
        for number, line in enumerate(page.read_text("utf8").splitlines(), 1)
        if FENCE.match(line)  # also those that a directive around them would hide
    }
    assert found == wanted


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_no_cell_is_excused(page):
    """Tags that let a cell pass without running, or fail without notice, are not for chapters."""
    cells = jupytext.read(page, fmt="md:myst").cells
    excuses = {"skip-execution", "nbval-skip", "raises-exception", "remove-cell"}
    for cell in cells:
        assert not excuses & set(cell.metadata.get("tags", [])), cell.source
        assert not re.search(r"#\s*(NBVAL|PYTEST)_", cell.source), cell.source


# A chapter opened in JupyterLab and saved is the same chapter.

CUSTOM = (
    FRONT.replace("---\n", "---\nreading_time: 12\nauthors: [A. Writer]\n", 1)
    + """
# A page

A summary.

```{code-cell} ipython3
---
tags: [hide-input]
mystnb:
  figure:
    caption: |
      A line, with $x$ and a colon: kept.
    name: fig-page-line
  image:
    alt: "A line: straight."
---
%matplotlib inline
1
```

```{code-cell} ipython3
:tags: [export]

x = 1
```
"""
)


def lab_folder(folder):
    """Lay out a folder as the repository is; return the folder that `make lab` serves."""
    for settings in ("jupytext.toml", "book/jupytext.toml"):
        if (ROOT / settings).exists():
            (folder / "book").mkdir(exist_ok=True)
            shutil.copy(ROOT / settings, folder / settings)
    served = re.search(r"jupyter lab *(\w*)$", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE)
    assert served, "make lab: expected 'jupyter lab' and at most a folder"
    return folder / served[1]


def save_from_lab(folder, text):
    """Open a page as a notebook, run it, save it, as JupyterLab does; return the new text."""
    (folder / "book").mkdir(exist_ok=True)
    page = folder / "book" / "page.md"
    page.write_text(text, "utf8")
    served = lab_folder(folder)
    path = page.relative_to(served).as_posix()
    manager = jupytext.AsyncTextFileContentsManager(root_dir=str(served))

    async def open_and_save():
        model = await manager.get(path, type="notebook", content=True)
        notebook = model["content"]
        notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        for cell in notebook["cells"]:
            cell["metadata"]["trusted"] = True
            if cell["cell_type"] == "code":
                cell["execution_count"] = 1
                cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
                cell["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
        await manager.save(model, path)

    asyncio.run(open_and_save())
    assert not list(folder.rglob("*.ipynb"))
    return page.read_text("utf8")


def content(text):
    """Return what a page says, without how it is laid out."""
    notebook = jupytext.reads(text, fmt="md:myst")
    cells = [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]
    front = dict(notebook.metadata)
    front.get("jupytext", {}).pop("default_lexer", None)
    return front, cells


def test_front_matter_and_cell_options_survive_the_lab(tmp_path):
    saved = save_from_lab(tmp_path, CUSTOM)
    front, cells = content(saved)
    assert front["reading_time"] == 12 and front["authors"] == ["A. Writer"]
    options = cells[1][2]["mystnb"]
    assert options["figure"]["name"] == "fig-page-line"
    assert options["image"]["alt"] == "A line: straight."
    assert content(saved) == content(CUSTOM)
    assert save_from_lab(tmp_path, saved) == saved


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_a_chapter_survives_the_lab(page, tmp_path):
    text = page.read_text("utf8")
    assert content(save_from_lab(tmp_path, text)) == content(text)
