"""Execute and render the book; do nothing when nothing has changed.

Executed chapters are cached by their code, one by one, so that an interrupted build goes on
where it stopped. What they compute also depends on the package, its environment, the data
sets and the recorded results: when one of these changes, every chapter runs anew. The site
is removed before it is rendered: what stands there is what the sources say now.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file is also run as a program

from tools.tangle import chapters  # noqa: E402

TIMEOUT = 1500  # seconds for a cell


class Build:
    """The folder that a build fills, and what it remembers there."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "_build"
        self.cache = self.folder / ".jupyter_cache"
        self.log = self.folder / "build.log"
        self.index = self.folder / "html" / "index.html"
        self.folder.mkdir(exist_ok=True)

    def changed(self, name: str, state: str) -> bool:
        """Say whether a state differs from the one that was kept."""
        kept = self.folder / f"{name}.state"
        return not kept.exists() or kept.read_text("utf8") != state

    def keep(self, name: str, state: str) -> None:
        written = self.folder / f"{name}.state.new"
        written.write_text(state, "utf8")
        written.replace(self.folder / f"{name}.state")

    def forget(self, *names: str) -> None:
        for name in names:
            (self.folder / f"{name}.state").unlink(missing_ok=True)


def content(root: Path, paths: Iterable[Path]) -> str:
    """Return a digest of the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_listing() -> str:
    """Return the names, sizes and times of the data sets' files: they are too large to read."""
    from s4mini.data import data_dir

    files = sorted(p for p in data_dir().rglob("*") if p.is_file())
    listed = [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join([str(data_dir()), *listed]).encode()).hexdigest()


def notebook_of(page: Path) -> Any:
    """Return a page as the notebook that the renderer will look for, or None."""
    from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook

    text = page.read_text("utf8")
    if not is_myst_markdown_notebook(text):
        return None
    return read_myst_markdown_notebook(text, add_source_map=True, path=str(page))


def quiet(log: Path) -> None:
    """Send what kernels say on their own account to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def execute(page: Path, folder: Path) -> tuple[Any, float, str]:
    """Run a page in a fresh kernel; return its notebook, the seconds, and an error or ""."""
    from jupyter_cache.executors.utils import single_nb_execution

    notebook, start = notebook_of(page), time.monotonic()
    done = single_nb_execution(
        notebook, cwd=str(folder), allow_errors=False, timeout=TIMEOUT, meta_override=True
    )
    said = (done.exc_string or repr(done.err)) if done.err is not None else ""
    return notebook, time.monotonic() - start, said


def waiting(pages: list[Path], cache: Any) -> Iterator[Path]:
    """Yield the pages that have code and no outputs in the cache."""
    for page in pages:
        notebook = notebook_of(page)
        if notebook is None:
            continue
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            yield page


def effort(page: Path) -> tuple[bool, int]:
    """Return what tells the longest pages: those that train a network, then those with much text.

    The longest goes first, or one core waits for it at the end.
    """
    text = page.read_text("utf8")
    return "from s4mini.train import" in text, len(text)


def execute_all(build: Build, pages: list[Path]) -> list[str]:
    """Run what has to be run, one page a core; return the names of the pages that failed."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    cache, failed = get_cache(str(build.cache)), []
    cores = os.cpu_count() or 1
    workers = min(cores, 4)
    os.environ |= {"OMP_NUM_THREADS": str(max(1, cores // workers)), "S4MINI_BOOK_BUILD": "1"}
    todo = sorted(waiting(pages, cache), key=effort, reverse=True)
    with ProcessPoolExecutor(workers, initializer=quiet, initargs=(build.log,)) as pool:
        runs = {pool.submit(execute, page, page.parent): page for page in todo}
        for number, run in enumerate(as_completed(runs), 1):
            (notebook, seconds, said), page = run.result(), runs[run]
            print(f"{number:3}/{len(todo)}  {page.stem:<16} {seconds:6.1f} s", flush=True)
            if said:
                failed.append(page.stem)
                print(said, flush=True)
                continue
            bundle = CacheBundleIn(notebook, str(page), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    return failed


def render(build: Build) -> int:
    """Make the site of the executed pages; warnings are errors. Say nothing unless it fails."""
    command = ["jupyter-book", "build", ".", "-W", "--keep-going", "--all", "--quiet"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "NO_COLOR": "1"}
    with build.log.open("a") as log:
        start = log.tell()
        done = subprocess.run(command, cwd=build.root, env=environment, stdout=log, stderr=log)
    if done.returncode:
        print(build.log.read_bytes()[start:].decode("utf8", "replace"), flush=True)
    return done.returncode


def main(root: Path = ROOT) -> int:
    build = Build(root)
    package = [*(root / "s4mini").glob("*.py"), *(root / "results").glob("*")]
    versions = [root / "requirements.txt", root / "constraints.txt"]
    depends = f"{sys.version} {content(root, [*package, *versions])} {data_listing()}"
    sources = [*(root / "book").rglob("*"), *(root / "_ext").rglob("*")]
    pages = content(root, [*sources, root / "_config.yml", root / "_toc.yml"])

    if build.changed("executed", depends):
        build.forget("executed", "pages")
        shutil.rmtree(build.cache, ignore_errors=True)
        build.keep("executed", depends)
    if build.changed("pages", pages) or not build.index.exists():
        build.forget("pages")
        build.log.write_text("", "utf8")
        for made in ("html", ".doctrees", "jupyter_execute"):
            shutil.rmtree(build.folder / made, ignore_errors=True)
        if failed := execute_all(build, chapters(root)):
            print(f"Not rendered, because of: {', '.join(sorted(failed))}")
            return 1
        if status := render(build):
            return status
        build.keep("pages", pages)
    print(f"The book is at {build.index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
