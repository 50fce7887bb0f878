"""Execute and render the book; do nothing when nothing has changed.

Executed chapters are cached by their code. What they compute also depends on the
package, its environment, the data sets and the recorded results: when one of these
changes, the cache is dropped and every chapter runs anew.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
INDEX = BUILD / "html" / "index.html"


def content(paths: Iterable[Path]) -> str:
    """Return a digest of the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def data_listing() -> str:
    """Return the names, sizes and times of the data sets' files: they are too large to read."""
    from s4mini.data import data_dir

    files = sorted(p for p in data_dir().rglob("*") if p.is_file())
    listed = [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join([str(data_dir()), *listed]).encode()).hexdigest()


def changed(name: str, state: str) -> bool:
    """Say whether a state differs from the one kept by the last successful build."""
    kept = BUILD / f"{name}.state"
    return not kept.exists() or kept.read_text("utf8") != state


def keep(name: str, state: str) -> None:
    BUILD.mkdir(exist_ok=True)
    (BUILD / f"{name}.state").write_text(state, "utf8")


def main() -> int:
    package = [*(ROOT / "s4mini").glob("*.py"), *(ROOT / "results").glob("*.json")]
    versions = [ROOT / "requirements.txt", ROOT / "constraints.txt"]
    results_depend_on = f"{sys.version} {content([*package, *versions])} {data_listing()}"
    sources = [*(ROOT / "book").rglob("*"), *(ROOT / "_ext").rglob("*")]
    page_sources = content([*sources, ROOT / "_config.yml", ROOT / "_toc.yml"])

    if changed("results", results_depend_on):
        shutil.rmtree(BUILD / ".jupyter_cache", ignore_errors=True)
        for state in BUILD.glob("*.state"):
            state.unlink()
    if changed("pages", page_sources) or not INDEX.exists():
        command = ["jupyter-book", "build", ".", "-W", "--keep-going", "--all", "--quiet"]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode:
            return done.returncode
        keep("results", results_depend_on)
        keep("pages", page_sources)
    print(f"The book is at {INDEX}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
