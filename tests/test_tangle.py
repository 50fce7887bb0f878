"""The tangler, on little books and on this one."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tools import tangle

ROOT = Path(__file__).resolve().parents[1]
FRONT = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
---

# {title}

{summary}
"""  # nine lines and a blank one come before the first cell
FENCE = "\n```{code-cell} ipython3\n"


class Book:
    """A book in a folder of its own."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        (folder / "book").mkdir()
        self.page("intro", title="A book", summary="What the book is about.")

    def page(self, name, *cells, title=None, summary="What it does.", more=""):
        """Write a chapter whose cells are exported, but those that begin with #plain."""
        text = FRONT.format(title=title or name.capitalize(), summary=summary)
        for cell in cells:
            code = dedent(cell).strip("\n")
            tags = "" if code.startswith("#plain") else "---\ntags: [export]\n---\n"
            text += f"{FENCE}{tags}{code}\n```\n"
        (self.folder / "book" / f"{name}.md").write_text(text + more, "utf8")
        return self

    def toc(self, *names):
        files = "".join(f"  - file: book/{name}\n" for name in names)
        toc = f"format: jb-book\nroot: book/intro\nchapters:\n{files}"
        (self.folder / "_toc.yml").write_text(toc, "utf8")
        return self

    def run(self, *arguments):
        """Tangle; return the exit status and what was said."""
        status = tangle.main(list(arguments), root=self.folder)
        said = self.capsys.readouterr()
        return status, said.out + said.err

    def module(self, name):
        return (self.folder / "s4mini" / f"{name}.py").read_text("utf8")

    def files(self):
        """Return the package's files with their contents and times of writing."""
        found = (self.folder / "s4mini").glob("*")
        return {path.name: (path.read_text("utf8"), path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def book(tmp_path, capsys):
    return Book(tmp_path, capsys)


def line_of(book, name, code):
    """Return the number of the last line of a page that begins with some code."""
    lines = (book.folder / "book" / f"{name}.md").read_text("utf8").splitlines()
    return max(number for number, line in enumerate(lines, 1) if line.startswith(code))


def test_a_module_reads_as_if_written_by_hand(book):
    book.page(
        "gains",
        "import torch",
        """
        import math
        from torch import Tensor

        def second(x: Tensor) -> Tensor:
            '''Return pi x.'''
            return math.pi * _first(x)
        """,
        "#plain\nimport os\nprint(os.getcwd())",
        """
        from torch import nn
        import torch

        from s4mini.other import LIMIT

        def _first(x):
            return torch.abs(x) if x < LIMIT else nn.Identity()(x)
        """,
        title="Gains",
        summary="How a signal\nis made louder.",
    )
    book.page("other", "LIMIT: float = 1.0").toc("gains", "other").run()
    assert book.module("gains") == dedent('''\
        """Gains.

        How a signal is made louder.

        Tangled from book/gains.md.
        """

        import math

        import torch
        from torch import Tensor, nn

        from s4mini.other import LIMIT

        __all__ = ["second"]


        def second(x: Tensor) -> Tensor:
            """Return pi x.

            Source: book/gains.md.
            """
            return math.pi * _first(x)


        def _first(x):
            return torch.abs(x) if x < LIMIT else nn.Identity()(x)
        ''')


def test_order_of_imports_does_not_depend_on_what_is_on_disk(book):
    book.page("first", "from s4mini.zeroth import x\nfrom torch import nn\n\ny = x, nn")
    book.page("zeroth", "x = 1").toc("zeroth", "first").run()
    assert book.run("--check")[0] == 0


def test_public_names_are_all_that_a_cell_binds(book):
    cell = """
    LIMIT = 1.0
    LOW, (HIGH, *_rest) = 0, (1, 2, 3)
    table: dict = {}
    table["key"] = 2
    class Shape: ...
    async def later(): ...
    _private = 3
    """
    book.page("names", cell).toc("names").run()
    names = ["LIMIT", "LOW", "HIGH", "table", "Shape", "later"]
    assert f"__all__ = {names}".replace("'", '"') in book.module("names")


def test_chapters_that_export_nothing_have_no_module(book):
    book.page("shows", "#plain\nx = 1").page("tells").page("brings", "import math")
    book.page("gives", "y = 1").toc("shows", "tells", "brings", "gives").run()
    assert set(book.files()) == {"__init__.py", "gives.py"}


def test_naming_chapters_writes_only_those(book):
    book.page("one", "x = 1").page("two", "y = 1").toc("one", "two")
    assert book.run("two") == (0, "tangle: wrote: two.py\n")
    assert set(book.files()) == {"two.py"}
    status, said = book.run("three")
    assert status == 2 and "three" in said and "_toc.yml" in said


# Refusals: nothing is written, the status is 2, and page and line are named.


def refused(book, *names):
    book.toc(*names)
    status, said = book.run()
    assert status == 2 and said.startswith("tangle: book/")
    assert not (book.folder / "s4mini").exists()
    return said


def test_a_name_twice_on_a_page(book):
    book.page("twice", "def f(): ...\n\nx = 1", "\n\n# again\ndef f(x): ...")
    first, second = line_of(book, "twice", "def f()"), line_of(book, "twice", "def f(x)")
    said = refused(book, "twice")
    assert f"book/twice.md:{second}: f is exported already at book/twice.md:{first}" in said


def test_a_private_name_twice_on_a_page(book):
    book.page("twice", "_x = 1", "_x = 2")
    assert "_x is exported already" in refused(book, "twice")


def test_a_public_name_on_two_pages(book):
    book.page("one", "y = 1\nx = 1").page("two", "z = 1\ndef x(): ...")
    one, two = line_of(book, "one", "x"), line_of(book, "two", "def x")
    said = refused(book, "two", "one")
    assert f"book/one.md:{one}: x is exported already at book/two.md:{two}" in said


def test_a_private_name_may_recur_on_another_page(book):
    book.page("one", "_x = 1\nx = _x").page("two", "_x = 2\ny = _x").toc("one", "two")
    assert book.run()[0] == 0


@pytest.mark.parametrize(
    "magic", ["%matplotlib inline", "%%time", "!ls", "y = %time x", "x?", "x = = 1", "def f(:"]
)
@pytest.mark.parametrize("above", ["", "x = 1\n\n", "\n\n\nx = 1\n"])
@pytest.mark.parametrize("options", ["---\ntags: [export]\n---\n\n", ":tags: [export]\n\n"])
def test_magics_and_syntax_errors(book, options, above, magic):
    cell = f"{FENCE}{options}{above}{magic}\nz = 1\n```\n"
    book.page("magic", "ok = 1", more=cell)
    line = line_of(book, "magic", magic)
    said = refused(book, "magic")
    assert said.startswith(f"tangle: book/magic.md:{line}: ") and magic.split()[0] in said


def test_magics_are_welcome_in_other_cells(book):
    book.page("magic", "#plain\n%matplotlib inline", "x = 1").toc("magic")
    assert book.run()[0] == 0


@pytest.mark.parametrize("cell", ["x = 1; import math", "import math; x = 1"])
def test_an_import_that_shares_its_line(book, cell):
    book.page("shared", cell)
    said = refused(book, "shared")
    assert f"book/shared.md:{line_of(book, 'shared', cell)}: an import needs a line" in said


def test_a_page_that_is_not_there(book):
    assert refused(book, "absent").startswith("tangle: book/absent.md: listed in _toc.yml")


def test_cell_options_that_are_not_yaml(book):
    book.page("options", more=f"{FENCE}---\ntags: [export\n---\nx = 1\n```\n")
    assert "Invalid YAML" in refused(book, "options")


def test_a_box_above_the_summary_is_left_out(book):
    book.page("boxed", "x = 1", summary=":::{div} question\nWhy?\n:::\n\nBecause.")
    book.toc("boxed").run()
    assert book.module("boxed").splitlines()[2] == "Because."


@pytest.mark.parametrize("summary", ["", r"Maths such as $\R$.", 'A """quotation""".'])
def test_a_summary_that_cannot_be_a_docstring(book, summary):
    book.page("summary", "x = 1", summary=summary)
    assert "a summary in plain text" in refused(book, "summary")


# Writing and checking.


def test_idempotent(book):
    book.page("one", "from math import pi\ntau = 2*pi").toc("one")
    assert book.run() == (0, "tangle: wrote: one.py, __init__.py\n")
    before = book.files()
    assert book.run() == (0, "tangle: wrote: nothing\n")
    assert book.files() == before


def test_check_says_what_is_stale_and_writes_nothing(book):
    book.page("one", "x = 1").page("two", "y = 1").toc("one", "two")
    assert book.run("--check")[0] == 1
    assert not (book.folder / "s4mini").exists()
    book.run()
    assert book.run("--check") == (0, "tangle: out of date: nothing\n")
    (book.folder / "s4mini" / "two.py").write_text("y = 2\n")
    before = book.files()
    assert book.run("--check") == (1, "tangle: out of date: two.py\n")
    assert book.run("--check", "one")[0] == 0
    assert book.files() == before
    book.page("one", "x = 1", "x = 2")
    assert book.run("--check")[0] == 2
    assert book.files() == before


def test_a_module_whose_chapter_is_gone_goes_too(book):
    book.page("one", "x = 1").page("two", "y = 1").toc("one", "two").run()
    book.toc("one")
    status, said = book.run("--check")
    assert status == 1 and "two.py (no chapter)" in said and "two.py" in book.files()
    assert book.run()[0] == 0
    assert set(book.files()) == {"__init__.py", "one.py"}
    assert "two" not in book.module("__init__")


# The package itself.


def imported(book, program):
    """Run a program that finds the little book's package; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"import s4mini\n{program}"],
        cwd=book.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_init_names_every_module_and_imports_what_is_asked_for(book):
    book.page("one", "MEASURES = 1\nx = 2\n_y = 2", title="The number one").page("two", "_z = 1")
    book.page("train", "import no_such_package\nfit = no_such_package", title="Training")
    book.page("figures", "COLORS = {}", title="Figures").toc("one", "two", "train", "figures").run()
    text = book.module("__init__")
    assert text.startswith('"""s4mini') and "What the book is about." in text
    for line in ("one      The number one", "train    Training", "figures  Figures"):
        assert f"    {line}\n" in text
    program = """
import sys
print(s4mini.__file__, dir(s4mini))
assert not {"s4mini.one", "s4mini.train", "s4mini.figures"} & set(sys.modules)
print(s4mini.MEASURES, s4mini.one.x, s4mini.figures.COLORS)
for name in ("fit", "x"):
    try:
        getattr(s4mini, name)
    except (ModuleNotFoundError, AttributeError) as error:
        print(type(error).__name__, error)
"""
    package = book.folder / "s4mini" / "__init__.py"
    assert imported(book, program).splitlines() == [
        f"{package} ['MEASURES', '__version__']",
        "1 2 {}",
        'ModuleNotFoundError s4mini.fit needs no_such_package: pip install "s4mini[train]"',
        "AttributeError module 's4mini' has no attribute 'x'",
    ]


def test_this_package_is_what_this_book_says():
    command = [sys.executable, "tools/tangle.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
