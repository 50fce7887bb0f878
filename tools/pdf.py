"""Print the rendered book to one PDF, by the browser that the tests use.

    python tools/pdf.py            _build/html -> _build/book.pdf

Each page is opened once, so that its mathematics and its figures are as the reader sees them.
The articles are then put one after the other behind a table of contents, with anchors that
name their page, and printed in one go. Nothing is asked of the network.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import yaml
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PLAYED = re.compile(r"/_static/(remember|finish)\.js$")  # what a reader plays with

# Runs in a page: returns its article as text that can stand in another document. Anchors and
# links get the page's name in front; what only a reader at a screen can use is left out.
ARTICLE = r"""
async (stem) => {
  await window.MathJax?.startup?.promise;
  for (const solution of document.querySelectorAll(".toggle-hidden"))
    solution.classList.remove("toggle-hidden");
  const article = document.querySelector("article");
  const away = "script, .headerlink, .prev-next-area, .toggle-button, button, .controls, "
    + ".cell_input > details:not([open]), details.hide:not([open]), .copybtn";
  for (const node of article.querySelectorAll(away)) node.remove();
  for (const image of article.querySelectorAll("img")) {
    image.loading = "eager";
    image.src = image.src;
  }
  for (const node of article.querySelectorAll("[id]"))
    if (!node.closest("svg")) node.id = `${stem}--${node.id}`;
  for (const link of article.querySelectorAll("a[href]")) {
    const target = new URL(link.href);
    if (target.protocol !== "file:") continue;
    const page = target.pathname.split("/").at(-1).replace(/\.html$/, "");
    const anchor = decodeURIComponent(target.hash.slice(1));
    link.setAttribute("href", `#${page}${anchor && "--"}${anchor}`);
  }
  return article.innerHTML;
}
"""
STYLE = """
@page { size: A4; margin: 18mm 16mm; }
body { padding: 0; font-size: 10.5pt; }
body > section { break-before: page; }
.pages ol { list-style: none; padding: 0; columns: 2; }
.pages li { margin: 0.15rem 0; }
.pages h2 { font-size: 1.1rem; margin: 1rem 0 0.3rem; }
.bd-article { max-width: none; padding: 0; }
.bd-article h1 { margin-top: 0; }
h1, h2, h3, h4 { break-after: avoid; }
.bd-article :is(figure, div.math, .sd-row, tr) { break-inside: avoid; }
.bd-article img { max-height: 105mm; }
"""


def reading_order(root: Path) -> list[tuple[str, list[str]]]:
    """Return the parts of the book with the stems of their pages."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    parts = [("", [toc["root"]])]
    for part in toc.get("parts", [toc]):
        parts.append((part.get("caption", ""), [c["file"] for c in part["chapters"]]))
    return [(caption, [Path(file).name for file in files]) for caption, files in parts]


def gathered(browser: Browser, root: Path) -> str:
    """Return the whole book as one page of HTML."""
    site, contents, articles, head = root / "_build" / "html" / "book", [], [], ""
    window = browser.new_context(color_scheme="light", reduced_motion="reduce")
    window.route(PLAYED, lambda route: route.abort())  # paper keeps their still pictures
    for caption, stems in reading_order(root):
        contents.append(f"<h2>{caption}</h2><ol>")
        for stem in stems:
            page = window.new_page()
            page.goto((site / f"{stem}.html").as_uri(), wait_until="load")
            title = page.locator("article h1").first.inner_text().rstrip("#").strip()
            text = page.evaluate(ARTICLE, stem)
            sheets = "[...document.styleSheets].map((s) => s.href).filter((s) => s)"
            head = head or "".join(
                f'<link rel="stylesheet" href="{sheet}">' for sheet in page.evaluate(sheets)
            )
            math = page.evaluate("document.querySelector('#MJX-SVG-styles')?.outerHTML ?? ''")
            head += math if math and "MJX-SVG-styles" not in head else ""
            page.close()
            contents.append(f'<li><a href="#{stem}">{title}</a></li>')
            articles.append(f'<section id="{stem}" class="bd-article">{text}</section>')
            print(f"  {stem}", flush=True)
        contents.append("</ol>")
    return (
        f'<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8">'
        f"<title>Structured state spaces</title>{head}"
        f"<style>{STYLE}</style><body><nav class='pages'><h1>Structured state spaces</h1>"
        f"{''.join(contents)}</nav>{''.join(articles)}</body></html>"
    )


def main(root: Path = ROOT) -> int:
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    if program is None or not (root / "_build" / "html" / "book").exists():
        print("needs Chromium, or its place in CHROMIUM, and a site made by `make book`")
        return 1
    whole, printed = root / "_build" / "book.html", root / "_build" / "book.pdf"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        whole.write_text(gathered(browser, root), "utf8")
        page = browser.new_page()
        page.goto(whole.as_uri(), wait_until="load", timeout=300_000)
        page.pdf(
            path=str(printed),
            prefer_css_page_size=True,
            outline=True,
            tagged=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template="<span class='pageNumber' style='font-size:8pt;margin:auto'></span>",
        )
        browser.close()
    print(f"The book is at {printed}, {printed.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
