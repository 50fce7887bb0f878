"""Run the book's chapters as tests, straight from their Markdown.

nbval runs notebooks cell by cell; here it learns to read MyST pages. A test is a
code cell, named after its page and the line of its opening fence, and each page has
a kernel of its own, started in the page's folder::

    pytest book/ssm.md                every cell of a chapter
    pytest -k "ssm:57 or ssm:71"      two of them
"""

import os
import re
from collections import defaultdict

from jupytext.myst import CODE_DIRECTIVE, get_parser, matches_mystnb, myst_to_notebook
from nbval.plugin import (
    IPyNbCell,
    IPyNbFile,
    NbCellError,
    find_comment_markers,
    find_metadata_tags,
)

# Workers share the processor: without this each would start a thread for every core.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CELL_LINE = re.compile(r"Cell In\[\d*\], line (\d+)")


def pytest_collect_file(file_path, parent):
    """Collect Markdown pages that have code cells, when nbval is switched on."""
    on = parent.config.getoption("nbval", False) or parent.config.getoption("nbval_lax", False)
    if not on or file_path.suffix != ".md":
        return None
    text = file_path.read_text("utf8")
    if CODE_DIRECTIVE not in text or not matches_mystnb(text):
        return None
    return Chapter.from_parent(parent, path=file_path)


class Chapter(IPyNbFile):
    """A page: its kernel is nbval's, its cells come from the Markdown."""

    def collect(self):
        text = self.path.read_text("utf8")
        self.nb = myst_to_notebook(text)
        cells = [cell for cell in self.nb.cells if cell.cell_type == "code"]
        for number, (cell, fence) in enumerate(zip(cells, code_fences(text), strict=True)):
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options.update(find_comment_markers(cell.source))
            options.setdefault("check", self.compare_outputs)
            first, last = fence.map  # counted from 0; last is the line after the closing fence
            item = ChapterCell.from_parent(
                self,
                name=f"{self.path.stem}:{first + 1}",
                cell_num=number,
                cell=cell,
                options=options,
            )
            item.fence_line = first + 1
            item.code_line = last - len(cell.source.splitlines())
            yield item


class ChapterCell(IPyNbCell):
    """A code cell: it passes if it runs without an exception."""

    def reportinfo(self):
        return self.path, self.fence_line - 1, self.name

    def repr_failure(self, excinfo):
        """Return the page and line at which the cell stopped, its code, and the traceback."""
        if not isinstance(excinfo.value, NbCellError):
            return super().repr_failure(excinfo)
        page = self.nodeid.split("::")[0]
        trace = ANSI_COLOUR.sub("", excinfo.value.inner_traceback or "").strip()
        found = CELL_LINE.search(trace)  # the first frame is in this cell
        stopped = self.code_line + int(found[1]) - 1 if found else self.fence_line
        where = f"{page}:{stopped}"
        if found:
            trace = trace.replace(found[0], where, 1)
        lines = enumerate(self.cell.source.splitlines(), self.code_line)
        code = "\n".join(f"{'>' if n == stopped else ' '} {n:4d}  {line}" for n, line in lines)
        return f"{where}: {excinfo.value}\n\n{code}\n\n{trace}"


def code_fences(text):
    """Return the tokens of the code cells that jupytext sees in a page, in order."""
    return [
        token
        for token in get_parser().parse(text + "\n")
        if token.type == "fence" and token.level == 0 and token.info.startswith(CODE_DIRECTIVE)
    ]
