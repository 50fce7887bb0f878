"""Run the book's chapters as tests, straight from their Markdown.

nbval runs notebooks cell by cell; here it learns to read MyST pages. A test is a
code cell, named after its page and the line of its opening fence, and each page has
a kernel of its own, started in the page's folder::

    pytest book/ssm.md                every cell of a chapter
    pytest -k "ssm:57 or ssm:71"      two of them
"""

import os
import re
import time
from collections import defaultdict
from functools import partial
from itertools import dropwhile
from queue import Empty
from shutil import which

import pytest
from jupytext.myst import matches_mystnb, myst_to_notebook
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile, find_comment_markers, find_metadata_tags

from tools.cells import code_cells, has_cells

# Threads that wait spin for a moment, then sleep; and each worker gets its
# share of the cores, instead of a thread for every core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Without a graphics processor Triton's programs run in its interpreter, which has to be
# chosen before anything imports triton.
if not which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CELL_LINE = re.compile(r"Cell In\[\d*\], line (\d+)")
EXCEPTION = re.compile(r"^\w+(?:Error|Exception|Exit|Interrupt|Warning)\b.*$", re.MULTILINE)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: runs with --slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


def pytest_collect_file(file_path, parent):
    """Collect Markdown pages that have code cells, when nbval is switched on."""
    on = parent.config.getoption("nbval", False) or parent.config.getoption("nbval_lax", False)
    if not on or file_path.suffix != ".md":
        return None
    text = file_path.read_text("utf8")
    if not has_cells(text) or not matches_mystnb(text):
        return None
    return Chapter.from_parent(parent, path=file_path)


class Chapter(IPyNbFile):
    """A page: its kernel is nbval's, its cells come from the Markdown."""

    def setup(self):
        super().setup()
        self.kernel.get_message = partial(wait_for_message, self.kernel)

    def collect(self):
        text = self.path.read_text("utf8")
        self.nb = myst_to_notebook(text)
        for number, (cell, fence, first) in enumerate(code_cells(text, self.nb)):
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options.update(find_comment_markers(cell.source))
            options.setdefault("check", self.compare_outputs)
            item = ChapterCell.from_parent(
                self,
                name=f"{self.path.stem}:{fence}",
                cell_num=number,
                cell=cell,
                options=options,
            )
            item.fence_line = fence
            item.code_line = first + cell.source.count("\n") + 1 - len(code_lines(cell))
            item.output_timeout = 60  # seconds: a busy machine is slow to hand over output
            yield item


class ChapterCell(IPyNbCell):
    """A code cell: it passes if it runs without an exception."""

    def reportinfo(self):
        return self.path, self.fence_line - 1, self.name

    def repr_failure(self, excinfo):
        """Return the page and line at which the cell stopped, its code, and the traceback."""
        page, error = self.nodeid.split("::")[0], excinfo.value
        trace = ANSI_COLOUR.sub("", getattr(error, "inner_traceback", None) or "").strip()
        found = CELL_LINE.search(trace)  # the first frame is in this cell
        stopped = self.code_line + int(found[1]) - 1 if found else self.fence_line
        where = f"{page}:{stopped}"
        if found:
            trace = trace.replace(found[0], where, 1)
        said = EXCEPTION.findall(trace)
        reason = f"{said[-1]} ({error})" if said else error
        lines = enumerate(code_lines(self.cell), self.code_line)
        code = "\n".join(f"{'>' if n == stopped else ' '} {n:4d}  {line}" for n, line in lines)
        return f"{where}: {reason}\n\n{code}\n\n{trace}".rstrip()


def code_lines(cell):
    """Return a cell's lines of code as IPython counts them: from the first that is not blank."""
    lines = cell.source.split("\n")
    return list(dropwhile(lambda line: not line.strip(), lines))


def wait_for_message(kernel, stream, timeout=None):
    """Return the kernel's next message; do not wait for a kernel that has died."""
    deadline = time.monotonic() + (timeout or 0)
    while True:
        try:
            return RunningKernel.get_message(kernel, stream, timeout=min(timeout or 1, 1))
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError("the kernel died") from None
            if timeout is not None and time.monotonic() > deadline:
                raise
