"""The build, on a little book: what stands in the site is what the sources say now."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from helpers import FRONT

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of two pages that run, and a third that can be broken."""
    for name in ("_ext", "tools", "s4mini", "requirements.txt", "constraints.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    shutil.copytree(ROOT / "book" / "_static", tmp_path / "book" / "_static")
    (tmp_path / "book" / "references.bib").write_text("")
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text("utf8"), "utf8")
    write(tmp_path, first="print('one')", second="print('two')", third="print('three')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("S4MINI_DATA", str(tmp_path / "data"))
    return tmp_path


def write(book, **pages):
    for name, code in pages.items():
        text = f"{FRONT}\n# {name}\n\nA page.\n\n```{{code-cell}} ipython3\n{dedent(code)}\n```\n"
        (book / "book" / f"{name}.md").write_text(text, "utf8")
    names = sorted(path.stem for path in (book / "book").glob("*.md"))
    chapters = "".join(f"  - file: book/{name}\n" for name in names[1:])
    toc = f"format: jb-book\nroot: book/{names[0]}\nchapters:\n{chapters}"
    (book / "_toc.yml").write_text(toc, "utf8")


def build(book):
    command = [sys.executable, "tools/build.py"]
    done = subprocess.run(command, cwd=book, capture_output=True, text=True)
    executed = {line.split()[1] for line in done.stdout.splitlines() if line.endswith(" s")}
    return done.returncode, executed, done.stdout + done.stderr


def page(book, name):
    path = book / "_build" / "html" / "book" / f"{name}.html"
    return path.read_text("utf8") if path.exists() else None


def test_the_site_is_what_the_sources_say(book):
    good = (book / "book" / "third.md").read_text("utf8")
    write(book, third="raise ValueError('broken on purpose')")
    status, executed, said = build(book)
    assert status != 0 and "broken on purpose" in said and page(book, "third") is None
    assert executed == {"first", "second", "third"}

    (book / "book" / "third.md").write_text(good, "utf8")  # mended: the others are not run again
    status, executed, said = build(book)
    assert (status, executed) == (0, {"third"}), said
    assert "three" in page(book, "third")
    lines = said.strip().splitlines()
    assert len(lines) == 2 and lines[-1].startswith("The book is at "), said

    assert build(book)[:2] == (0, set())  # nothing changed, nothing to do

    write(book, third="raise ValueError('broken again')")  # broken, then reverted
    assert build(book)[0] != 0
    (book / "book" / "third.md").write_text(good, "utf8")
    assert build(book)[0] == 0 and "three" in page(book, "third")

    (book / "book" / "third.md").unlink()  # a deleted page leaves the site
    write(book)
    assert build(book)[:2] == (0, set())
    assert page(book, "third") is None and page(book, "second") is not None


def test_an_interrupted_first_build_goes_on(book):
    write(book, third="import time\ntime.sleep(600)")
    command = [sys.executable, "tools/build.py"]
    run = subprocess.Popen(
        command, cwd=book, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    seen = [run.stdout.readline(), run.stdout.readline()]  # two pages are done
    assert {line.split()[1] for line in seen} == {"first", "second"}
    time.sleep(1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    write(book, third="print('three')")
    status, executed, said = build(book)
    assert (status, executed) == (0, {"third"}), said
