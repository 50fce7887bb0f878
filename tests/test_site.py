"""The rendered site in a browser, with no network: every page, at desktop and phone width.

`make book` builds the site; without it, or without Chromium, these tests are skipped.
The same checks run on a little site with one defect a page, so that each is seen to bite.
"""

import functools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.request
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import torch
from playwright.sync_api import sync_playwright
from pybtex.database import Entry, Person

from _ext.pages import AuthorYearLabels
from s4mini.discretization import discretize
from s4mini.figures import recorded
from s4mini.projection import hippo, reconstruct
from tools.pdf import reading_order
from tools.tangle import chapters

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
AXE = ROOT / "_build" / "axe.min.js"  # made by `make axe`
MATHJAX = ROOT / "book" / "_static" / "mathjax"
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}
THEMES = {"desktop": "light", "phone": "dark"}
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.relative_to(SITE).parts and path != SITE / "index.html"
)
CHAPTERS = [
    page.relative_to(ROOT).with_suffix("").as_posix()
    for page in chapters(ROOT)
    if page.exists() and "{code-cell}" in page.read_text("utf8")
]
FLAGS = [
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
]

# Runs in the page: waits for what loads late, then returns what is wrong with it.
INSPECT = r"""
async () => {
  const found = [];
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const show = (node) => (node.outerHTML || node.data).trim().replace(/\s+/g, " ").slice(0, 120);
  const until = async (condition, seconds) => {
    for (const end = Date.now() + 1000 * seconds; !condition() && Date.now() < end; )
      await new Promise((resume) => setTimeout(resume, 50));
    return condition();
  };

  // Mathematics: every formula typeset, none in error, none left as source.
  const formulas = all(".math").filter((node) => node.textContent.trim());
  if (formulas.length && !window.MathJax?.startup?.promise) found.push("MathJax: not loaded");
  await window.MathJax?.startup?.promise;
  for (const node of formulas)
    if (!node.querySelector("mjx-container")) found.push("formula not typeset: " + show(node));
  const errors = "mjx-merror, merror, [data-mjx-error], [data-mml-node=merror]";
  const undefinedMacros = "mtext[mathcolor=red], [data-mml-node=mtext][fill=red]";
  for (const node of all(errors + ", " + undefinedMacros))
    found.push("formula in error: " + show(node.closest("mjx-container") ?? node));
  const code = "pre, code, script, style, noscript, textarea, mjx-container";
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const source = /\$\$|\\\(|\\\[|\\begin\{|\{[a-z:]+\}`|\|\s*-{3,}/;
  for (let node; (node = texts.nextNode()); )
    if (source.test(node.data) && !node.parentElement.closest(code))
      found.push("source left in the text: " + show(node));

  // Images: there, and described.
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => {});
    if (!image.naturalWidth) found.push("image missing: " + show(image));
    const alt = image.getAttribute("alt");
    const inFigure = image.closest("figure, .cell_output");
    if (alt === null || (inFigure && (!alt.trim() || /\.(svg|png|jpe?g|gif)$/.test(alt))))
      found.push("image without alt text: " + show(image));
  }

  // Interactive figures: drawn, described, with a number and a caption.
  const drawn = (plot) => plot.querySelector(".main-svg")?.getBoundingClientRect().height > 50;
  for (const plot of all(".plotly-graph-div"))
    if (!(await until(() => drawn(plot), 10))) found.push("plotly figure not drawn: " + plot.id);
  for (const plot of all(".plotly-graph-div")) {
    if (!plot.closest("[role=img][aria-label]"))
      found.push("plotly figure without alt: " + plot.id);
    if (!plot.closest("figure")?.querySelector("figcaption"))
      found.push("plotly figure without caption: " + plot.id);
  }

  // Width: the page does not scroll sideways, and nothing of the text is cut off.
  const width = document.scrollingElement.clientWidth;
  const scrolls = (node) => node && node !== document.body
    && (/auto|scroll/.test(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
  const wide = all("article *").filter((node) =>
    node instanceof HTMLElement && node.checkVisibility({visibilityProperty: true})
    && node.getBoundingClientRect().right > width + 1
    && !node.closest("mjx-container, svg, .visually-hidden") && !scrolls(node.parentElement));
  if (document.scrollingElement.scrollWidth > width + 1)
    found.push("page scrolls sideways: " + (wide.length ? show(wide[0]) : "not the article"));
  else if (wide.length) found.push("cut off at the right: " + show(wide[0]));

  // Weight: what the page and all it asks for come to, cached or not.
  const loaded = ["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind));
  const megabytes = loaded.reduce((sum, { decodedBodySize }) => sum + decodedBodySize, 0) / 1e6;
  if (loaded.length > 45) found.push(`too many requests: ${loaded.length}`);
  if (megabytes > 10) found.push(`too heavy: ${megabytes.toFixed(1)} MB`);
  if (loaded.some(({ name }) => name.includes("plotly")) && !all(".plotly-graph-div").length)
    found.push("plotly without a figure");
  return found;
}
"""
# Runs in the page: opens every folded solution by its button; returns those that do not fold.
UNFOLD = r"""
async () => {
  const found = [];
  for (const solution of document.querySelectorAll(".solution.dropdown")) {
    const body = solution.querySelector("p:not(.admonition-title), div.cell");
    const seen = () => body.checkVisibility({opacityProperty: true, visibilityProperty: true})
      && body.getBoundingClientRect().height > 1;
    if (seen()) found.push("solution not folded: " + solution.id);
    solution.querySelector(".toggle-button")?.click();
    for (let wait = 0; wait < 20 && !seen(); wait++)
      await new Promise((resume) => setTimeout(resume, 50));
    if (!seen()) found.push("solution does not open: " + solution.id);
  }
  return found;
}
"""


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path != "/favicon.ico":
            return super().do_GET()
        self.send_response(204)  # browsers ask for it where a page, such as index.html, names none
        self.end_headers()


@contextmanager
def served(folder):
    """Serve a folder on this machine only; yield its address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def find_browser():
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no browser: install chromium, or name one in the variable CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site():
    if not (SITE / "index.html").exists():
        pytest.skip("no site: run `make book` first")
    with served(SITE) as address:
        yield address


@pytest.fixture(scope="module")
def windows(browser):
    """One window of each size and theme, with a cache that its pages share."""
    windows = {
        name: browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=THEMES[name]
        )
        for name, (width, height) in SIZES.items()
    }
    yield windows
    for window in windows.values():
        window.close()


@contextmanager
def opened(window, address):
    """Open a page; yield it with the list of what goes wrong while it is open."""
    home, wrong, pending = urlsplit(address).netloc, [], set()
    page = window.new_page()

    def on_request(request):
        pending.add(request)
        parts = urlsplit(request.url)
        if parts.scheme in {"http", "https", "ws", "wss"} and parts.netloc != home:
            wrong.append(f"request to another host: {request.url}")

    def on_response(response):
        if response.status >= 400:
            wrong.append(f"request answered {response.status}: {response.url}")

    def on_failure(request):
        pending.discard(request)
        wrong.append(f"request failed: {request.url} {request.failure}")

    def on_console(message):
        if message.type == "error":
            wrong.append(f"console error: {message.text}")

    page.on("request", on_request)
    page.on("response", on_response)
    page.on("requestfailed", on_failure)
    page.on("requestfinished", lambda request: pending.discard(request))
    page.on("console", on_console)
    page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
    page.goto(address)
    yield page, wrong
    for _ in range(100):
        if not pending:
            break
        page.wait_for_timeout(50)
    wrong += [f"request not answered: {request.url}" for request in pending]
    page.close()


def problems(window, address):
    """Return all that is wrong with a page."""
    with opened(window, address) as (page, wrong):
        wrong += page.evaluate(UNFOLD)
        wrong += page.evaluate(INSPECT)
    return wrong


class Links(HTMLParser):
    """Collects a page's anchors, the addresses it links to, and its security policy."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.policy = set(), [], ""
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])


def broken_links(folder):
    """Return the links between a site's pages that lead nowhere."""
    read = functools.cache(Links)
    broken = []
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("_static/"):
            continue
        for link in read(path).links:
            parts = urlsplit(urljoin(f"http://site/{name}", link))
            if parts.netloc != "site":
                continue
            target = folder / unquote(parts.path).lstrip("/")
            if not target.is_file():
                broken.append(f"{name}: no page {link}")
            elif parts.fragment and target.suffix == ".html":
                if unquote(parts.fragment) not in read(target).anchors:
                    broken.append(f"{name}: no anchor {link}")
    return broken


def foreign_links(folder):
    """Return the links that are neither to the web, nor to a mailbox, nor to the site itself."""
    return [
        f"{path.relative_to(folder)}: {link}"
        for path in sorted(folder.rglob("*.html"))
        for link in Links(path).links
        if urlsplit(link.strip()).scheme.lower() not in {"", "http", "https", "mailto"}
    ]


VOID = {"br", "hr", "img", "input", "link", "meta", "source", "wbr"}  # these have no end
# What only this machine has: of paths the beginnings, as Python's warnings have them.
LOCAL = {*map(str, (ROOT, Path.home(), sys.prefix, tempfile.gettempdir())), "site-packages"}
WARNED = re.compile(r"\.py:\d+: \w*Warning|" + "|".join(f"{re.escape(p)}/" for p in LOCAL))


class Outputs(HTMLParser):
    """Collects the text of a page's cell outputs."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []  # for each open element, whether it is in an output
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        here = "cell_output" in (dict(attributes).get("class") or "").split()
        if tag not in VOID:
            self.open.append((tag, here or (bool(self.open) and self.open[-1][1])))

    def handle_endtag(self, tag):
        while any(tag == t for t, _ in self.open) and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1][1]:
            self.texts.append(data)


def local_outputs(folder):
    """Return the lines of cell outputs that warn, or name a path of this machine."""
    pages = {path.relative_to(folder): path.read_text("utf8") for path in folder.rglob("*.html")}
    return [
        f"{name}: {line}"
        for name, text in sorted(pages.items())
        if "_static" not in name.parts and WARNED.search(text)
        for line in "".join(Outputs(text).texts).splitlines()
        if WARNED.search(line)
    ]


# The book's site.


VISITS = [(name, size) for name in PAGES or ["book/intro.html"] for size in SIZES]


@pytest.fixture(scope="module", params=VISITS, ids=lambda visit: "-".join(visit))
def visit(request, windows, site):
    """An open page, for all tests that look at it: to load it costs more than to look."""
    name, size = request.param
    with opened(windows[size], site + name) as (page, wrong):
        page.wait_for_load_state("load")
        yield page, wrong
        wrong.clear()  # the tests have told it
    assert not wrong, "\n".join(wrong)


def test_page(visit):
    page, wrong = visit
    wrong += page.evaluate(UNFOLD)
    wrong += page.evaluate(INSPECT)
    assert not wrong, "\n".join(wrong)


# Runs in the page, for axe, whose time grows with the square of the number of elements: words
# of code that look alike are joined, so that one of each look is left, and formulas emptied.
THIN = r"""
async () => {
  await window.MathJax?.startup?.promise;
  const transparent = "rgba(0, 0, 0, 0)";
  const ground = (node) => {
    const { backgroundColor } = getComputedStyle(node);
    return backgroundColor === transparent && node.parentElement
      ? ground(node.parentElement) : backgroundColor;
  };
  const looks = new Set(), alike = [];
  for (const word of document.querySelectorAll("pre span, .sig span")) {
    if (word.firstElementChild) continue;
    const { color, font } = getComputedStyle(word);
    const look = [color, font, ground(word)].join();
    const judged = word.textContent.trim().length > 1; // axe leaves single letters out
    if (!judged || looks.has(look)) alike.push(word);
    else looks.add(look);
  }
  for (const word of alike) word.replaceWith(word.textContent);
  for (const formula of document.querySelectorAll("mjx-container"))
    formula.replaceChildren("formula");
}
"""


def barriers(page):
    """Return what axe-core finds of serious or critical impact on an open page; it loses words."""
    page.evaluate(THIN)
    page.evaluate(AXE.read_text("utf8"))
    # MathJax makes its formulas readable itself
    found = page.evaluate(
        "() => axe.run({exclude: ['mjx-container']}, {resultTypes: ['violations'], preload: false})"
    )["violations"]
    return [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in found
        if rule["impact"] in {"serious", "critical"}
        for node in rule["nodes"]
    ]


needs_axe = pytest.mark.skipif(not AXE.exists(), reason="no axe-core: run `make axe`")


@needs_axe
def test_page_has_no_barriers(visit):
    found = barriers(visit[0])
    assert not found, "\n".join(found)


def test_interactive_figures_obey_keyboard_and_theme(visit):
    page, wrong = visit
    for slider in page.locator(".interactive input[type=range]").all():
        before = slider.get_attribute("aria-valuetext")
        slider.focus()
        key = "ArrowLeft" if int(slider.input_value()) else "ArrowRight"
        page.keyboard.press(key)
        assert slider.get_attribute("aria-valuetext") != before
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    for box in page.locator(".output:has(> .interactive)").all():
        ground = box.evaluate("node => getComputedStyle(node).backgroundColor")
        assert ground == "rgba(0, 0, 0, 0)", "light ground in the dark theme"
    assert not wrong, "\n".join(wrong)


def test_every_page_of_the_contents_is_rendered(site):
    pages = {page.relative_to(ROOT).with_suffix(".html").as_posix() for page in chapters(ROOT)}
    assert pages <= set(PAGES)


def test_the_printed_book_has_every_page_in_order():
    printed = [stem for _, stems in reading_order(ROOT) for stem in stems]
    assert printed == [page.stem for page in chapters(ROOT)]


def test_index_leads_to_the_first_page(windows, site):
    with opened(windows["desktop"], f"{site}index.html") as (page, wrong):
        first = chapters(ROOT)[0].relative_to(ROOT).with_suffix(".html").as_posix()
        page.wait_for_url(site + first)
    assert not wrong, "\n".join(wrong)


def test_links_between_pages_lead_somewhere(site):
    broken = broken_links(SITE)
    assert not broken, "\n".join(broken)


def test_links_lead_to_the_web_to_a_mailbox_or_to_the_site(site):
    foreign = foreign_links(SITE)
    assert not foreign, "\n".join(foreign)


def test_no_output_warns_or_names_a_path_of_this_machine(site):
    found = local_outputs(SITE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PAGES or ["book/intro.html"])
def test_pages_forbid_what_comes_from_elsewhere(site, name):
    policy = dict(part.split(" ", 1) for part in Links(SITE / name).policy.split("; "))
    assert {"default-src", "script-src", "object-src", "base-uri"} <= set(policy)
    for sources in policy.values():
        allowed = {"'self'", "'none'", "'unsafe-inline'", "file:", "data:", "blob:"}
        assert set(sources.split()) <= allowed


@pytest.mark.parametrize("name", ["book/intro.html", "book/api.html", "search.html?q=kernel"])
def test_pages_open_as_files(windows, site, name):
    with opened(windows["desktop"], f"{SITE.as_uri()}/{name}") as (page, wrong):
        page.wait_for_load_state("load")
        page.evaluate("() => document.fonts.ready")
        fonts = page.evaluate("() => [...document.fonts].map((font) => font.status)")
    assert "loaded" in fonts and "error" not in fonts
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_notebook_can_be_downloaded(site, chapter):
    assert f"{chapter}.html" in PAGES, "the chapter is not rendered"
    links = [link for link in Links(SITE / f"{chapter}.html").links if link.endswith(".ipynb")]
    assert links, "no link to the notebook"
    with urllib.request.urlopen(urljoin(f"{site}{chapter}.html", links[0])) as answer:
        assert answer.status == 200
        cells = json.load(answer)["cells"]
    assert any(cell["cell_type"] == "code" for cell in cells)


@pytest.mark.parametrize("size", SIZES)
def test_search(windows, site, size):
    with opened(windows[size], f"{site}search.html?q=kernel") as (page, wrong):
        page.wait_for_selector("#search-results li a", timeout=20_000)
        found = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.href)")
    assert any("/book/" in address for address in found)
    assert not wrong, "\n".join(wrong)


# What the reader plays with: the numbers of the browser are those of Python.

MEMORIES = {
    "evenly": ("legs", None),
    "fading": ("legs", 3),
    "window": ("legt", 1),
    "waves": ("fout", 1),
}
HEAR = """
([name, N, window, signal]) => {
  const { memories } = handedOver(document.querySelector("[data-playable=remember]"));
  const memory = new Memory(memories[name], N, window);
  for (const u of signal) memory.hear(u);
  return { x: [...memory.x], recalled: [...memory.recall()] };
}
"""


def remembered(name, N, window, signal):
    """Return what the memory holds, and draws back, by s4mini alone."""
    (measure, span), x = MEMORIES[name], torch.zeros(N, dtype=torch.float64)
    A, B = hippo(measure, N)
    A_bar, B_bar = discretize(A, B, 1 / window)
    for k, u in enumerate(signal):
        if span is None:
            A_bar, B_bar = discretize(A, B, 1 / (k + 0.5))
        x = A_bar @ x + B_bar * u
    ages = torch.linspace(1, 0, 128, dtype=torch.float64)
    return x, reconstruct(measure, x, 1.0, torch.exp(-span * ages) if span == 3 else 1 - ages)


@pytest.fixture(scope="module")
def front(windows, site):
    """The front page, opened once."""
    with opened(windows["desktop"], f"{site}book/intro.html") as (page, wrong):
        page.wait_for_selector(".playable canvas")
        yield page
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("N", [2, 8, 32])
def test_the_memory_of_the_front_page_is_that_of_python(front, name, N):
    signal = torch.randn(400, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
    signal = signal.cumsum(0) / 20
    found = front.evaluate(HEAR, [name, N, 150, signal.tolist()])
    for got, expected in zip(
        found.values(), remembered(name, N, 150, signal.tolist()), strict=True
    ):
        gap = (torch.tensor(got, dtype=torch.float64) - expected).abs().max()
        assert gap < 1e-5 * expected.abs().max()


def test_the_memory_obeys_keys_and_hand(browser, site):
    with browser.new_context(
        reduced_motion="reduce", viewport={"width": 390, "height": 844}
    ) as window:
        with opened(window, f"{site}book/intro.html") as (page, wrong):
            canvas = page.locator(".playable canvas")
            value = functools.partial(canvas.get_attribute, "aria-valuenow")
            assert page.get_by_role(
                "button", name="Play", exact=True
            ).is_visible()  # it stands still
            canvas.focus()
            for key in ("Home", "ArrowUp"):
                page.keyboard.press(key)
            page.wait_for_function("v => document.activeElement.ariaValueNow == v", arg="-90")
            assert page.get_by_role("button", name="Stop", exact=True).is_visible()
            page.keyboard.press(" ")
            assert page.get_by_role("button", name="Play", exact=True).is_visible()
            page.get_by_label("It keeps").select_option("4")
            assert "keeps 4 numbers" in page.locator(".said").text_content()
            page.get_by_label("numbers of").select_option("evenly")
            assert page.get_by_label("on a timescale of").is_disabled()  # it needs none
            box = canvas.bounding_box()
            page.mouse.move(box["x"] + 100, box["y"] + 20)
            page.mouse.down()
            page.wait_for_function("() => +document.querySelector('canvas').ariaValueNow > 50")
            page.mouse.up()
            assert page.get_by_label("It hears").input_value() == "your hand" and value()
    assert not wrong, "\n".join(wrong)


SAY = """
(seconds) => {
  const { spoken } = handedOver(document.querySelector("[data-playable=remember]"));
  const said = recording(spoken);
  return seconds.map(said);
}
"""


def test_the_word_that_is_said_is_the_recorded_one(front):
    word = recorded("spoken")
    samples, second = torch.tensor(word["samples"]), word["hz"] / 40
    at = torch.cat((torch.arange(len(samples)), torch.arange(len(samples) - 1) + 0.5))
    got = torch.tensor(front.evaluate(SAY, (at.double() / second).tolist()))
    expected = torch.cat((samples, (samples[1:] + samples[:-1]) / 2))
    expected[len(samples) - 1] = 0  # from the last sample on it is quiet
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_word_is_said_by_keys(browser, site):
    with browser.new_context(reduced_motion="reduce") as window:
        with opened(window, f"{site}book/intro.html") as (page, wrong):
            page.get_by_role("button", name="Say a word").focus()
            page.keyboard.press("Enter")
            assert page.get_by_label("It hears").input_value().startswith("a spoken")
            assert page.get_by_role("button", name="Stop", exact=True).is_visible()
            page.wait_for_function("() => document.querySelector('canvas').ariaValueNow < -10")
    assert not wrong, "\n".join(wrong)


def test_without_its_recording_the_page_says_so(browser, site):
    def without(route):
        text = (SITE / "book" / "intro.html").read_text("utf8")
        cut = re.sub(r',"spoken":{[^}]*}', "", text)
        assert cut != text
        route.fulfill(body=cut, content_type="text/html")

    with browser.new_context(reduced_motion="reduce") as window:
        window.route("**/intro.html", without)
        with opened(window, f"{site}book/intro.html") as (page, wrong):
            button = page.get_by_role("button", name="its recording is missing")
            assert button.is_visible() and button.is_disabled()
            before = page.locator(".playable canvas").get_attribute("aria-valuenow")
            page.get_by_role("button", name="Play", exact=True).click()
            page.wait_for_function(
                "v => document.querySelector('canvas').ariaValueNow != v", arg=before
            )
    assert not wrong, "\n".join(wrong)


READ = """
() => {
  const model = modelOf(document.querySelector("[data-playable=finish]"));
  const writer = new Writer(model), { tokens, logits } = model.witness;
  return [tokens.flatMap((token) => [...writer.read(token)]), [...logits]];
}
"""


def test_the_model_of_the_browser_is_that_of_python(windows, site):
    with opened(windows["desktop"], f"{site}book/completion.html") as (page, wrong):
        page.wait_for_selector(".playable canvas")
        got, expected = (torch.tensor(values) for values in page.evaluate(READ))
        size = len(page.locator("[data-playable=finish] script").text_content())
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert size < 300_000
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", SIZES)
def test_a_drawing_is_begun_and_finished_by_keys(browser, site, size):
    width, height = SIZES[size]
    with browser.new_context(
        reduced_motion="reduce", viewport={"width": width, "height": height}
    ) as window:
        with opened(window, f"{site}book/completion.html") as (page, wrong):
            page.get_by_role("button", name="Clear").click()
            paper, said = page.locator("canvas.paper"), page.locator(".playable .said")
            assert said.text_content().startswith("Draw the upper half")
            paper.focus()
            for key in [" ", " ", "ArrowDown", " ", "ArrowDown", " ", "Enter"]:
                page.keyboard.press(key)
            pixels = page.evaluate("modelOf(document.querySelector('.playable')).width") ** 2
            assert said.text_content().startswith(f"Pixel {pixels} of {pixels}.")
            assert page.locator(".playable select").input_value() == ""
            assert page.locator(".playable [aria-live]").text_content().endswith("level 1")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["intro", "completion"])
def test_without_scripts_there_is_a_still_picture(browser, site, name):
    with browser.new_context(java_script_enabled=False) as window:
        page = window.new_page()
        page.goto(f"{site}book/{name}.html")
        assert page.locator(".playable img").is_visible()
        assert not page.locator(".playable canvas").count()


# Do the checks bite? One defect a page, and a page without any.

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
GOOD = rf"""
<p>Half of it costs 5 $ or \alpha: <span class="math">\(x^2\)</span>
and <code>$$ code $$</code>.</p>
<div class="math">\[y = \int_0^1 x \, dx\]</div>
<figure><img src="{PIXEL}" alt="One pixel."></figure> <img src="{PIXEL}" alt="">
<div style="overflow-x: auto"><div style="width: 2000px">a wide table that scrolls</div></div>
<figure><div role="img" aria-label="A square."><div class="plotly-graph-div">
<svg class="main-svg" width="100" height="100"></svg></div></div>
<figcaption>One.</figcaption></figure>
<div class="solution dropdown"><p hidden>So it is.</p>
<button class="toggle-button" onclick="previousElementSibling.hidden = false">+</button></div>
"""
PLOTLESS = '<script>document.querySelector(".plotly-graph-div").remove()</script>'
HEAVY = """<script>for (let k = 0; k < 9; k++) {
  const request = new XMLHttpRequest();
  request.open("GET", `mathjax/tex-svg-full.js?${k}`, false);
  request.send();
}</script>"""
DEFECTS = [
    ("request failed", '<script src="http://127.0.0.1:9/closed.js"></script>'),
    ("request answered 404", '<link rel="stylesheet" href="absent.css">'),
    ("request to another host", '<script src="https://cdn.example.org/x.js"></script>'),
    ("console error", "<script>console.error('no')</script>"),
    ("page error", "<script>throw new Error('no')</script>"),
    ("MathJax: not loaded", ""),
    ("formula not typeset", '<span class="math">x^2</span>'),
    ("formula in error", r'<span class="math">\(\frac{1}\)</span>'),
    ("formula in error", r'<span class="math">\(\bm{x}\)</span>'),
    ("source left in the text", "<p>Not typeset: $$x$$.</p>"),
    ("source left in the text", r"<p>Not typeset: \(x\).</p>"),
    ("source left in the text", "<p>See {eq}`eq-absent`.</p>"),
    ("source left in the text", "<p>| a | b | |---|---| | 1 | 2 |</p>"),
    ("image missing", '<img src="absent.png" alt="Nothing.">'),
    ("image missing", '<img loading="lazy" style="margin-top: 9999px" src="x.svg" alt="No.">'),
    ("image without alt text", f'<img src="{PIXEL}">'),
    ("image without alt text", f'<figure><img src="{PIXEL}" alt=""></figure>'),
    ("image without alt text", f'<figure><img src="{PIXEL}" alt="../a/b.svg"></figure>'),
    ("page scrolls sideways", '<p style="width: 2000px">wide</p>'),
    ("cut off at the right", "<div style='overflow: hidden'><p style='width: 2000px'>wide"),
    ("solution not folded", '<div class="solution dropdown"><p>Open.</p></div>'),
    ("solution does not open", '<div class="solution dropdown"><p hidden>Shut.</p></div>'),
    ("plotly figure not drawn", '<div class="plotly-graph-div" id="empty"></div>'),
    ("plotly figure without alt", '<figure><div class="plotly-graph-div"></div></figure>'),
    ("plotly without a figure", f'<img src="0.html?plotly" alt="">{PLOTLESS}'),
    ("too many requests", "".join(f'<img src="0.html?{k}" alt="">' for k in range(45))),
    ("too heavy", HEAVY),
    ("plotly figure without caption", '<div role="img" aria-label="A." class="plotly-graph-div">'),
]
# As on the book's pages: only what Sphinx marks as mathematics is typeset.
HEAD = """<!doctype html><meta charset="utf-8"><title>A page</title><link rel="icon" href="data:,">
<script>window.MathJax = {"options": {"processHtmlClass": "math"}}</script>
<script defer src="mathjax/tex-svg-full.js"></script>"""


@pytest.fixture(scope="module")
def defective(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defective")
    (folder / "mathjax").symlink_to(MATHJAX)
    for number, (defect, body) in enumerate([("", ""), *DEFECTS]):
        head = HEAD.partition("<script>")[0] if defect == "MathJax: not loaded" else HEAD
        text = f'{head}<article class="mathjax_ignore">{GOOD}{body}</article>'
        (folder / f"{number}.html").write_text(text, "utf8")
    with served(folder) as address:
        yield address


@pytest.mark.parametrize("size", SIZES)
def test_a_good_page_passes(windows, defective, size):
    assert problems(windows[size], f"{defective}0.html") == []


@pytest.mark.parametrize(
    ("number", "defect"), [(n, defect) for n, (defect, _) in enumerate(DEFECTS, 1)]
)
def test_each_defect_is_caught(windows, defective, number, defect):
    wrong = problems(windows["phone"], f"{defective}{number}.html")
    assert any(item.startswith(defect) for item in wrong), wrong


def test_foreign_links_are_caught(tmp_path):
    kinds = [
        "a.html",
        "#a",
        "https://a.org",
        "mailto:a@b.org",
        "JavaScript:x()",
        "file:///a",
        "ftp:a",
    ]
    (tmp_path / "a.html").write_text("".join(f'<a href="{kind}">' for kind in kinds))
    assert foreign_links(tmp_path) == [f"a.html: {kind}" for kind in kinds[4:]]


def test_local_outputs_are_caught(tmp_path):
    lines = [
        f"{sys.prefix}/lib/tqdm/auto.py:21: TqdmWarning: IProgress not found.",
        "C:\\x.py:3: UserWarning: no",
        f"in {tempfile.gettempdir()}/a.txt",
        "epoch 1 of 2, a/b.py",
    ]
    shown = "<br>".join(f"<pre>{line}\n</pre>" for line in lines)
    page = f"<p>{lines[0]}</p><div class='cell_output docutils'>{shown}</div><pre>{lines[1]}</pre>"
    (tmp_path / "a.html").write_text(page)
    assert local_outputs(tmp_path) == [f"a.html: {line}" for line in lines[:3]]


@needs_axe
def test_barriers_are_caught(windows, defective):
    with opened(windows["phone"], f"{defective}0.html") as (page, _):
        page.set_content('<html lang="en"><title>A page</title><input type="range">')
        assert [item.split(":")[0] for item in barriers(page)] == ["label"]
        # of words that look alike one is judged, whatever stands beside it or behind it
        words = "<span>and</span> <span>not</span> <span style='color: #999'>is</span>"
        dark = "<pre style='background: #333'><span>or</span></pre>"
        page.set_content(f"<html lang='en'><title>A page</title><pre>{words}</pre>{dark}")
        found = [item.partition("<span")[0] + item[-10:] for item in barriers(page)]
        assert found == ["color-contrast: >is</span>", "color-contrast: >or</span>"]


def test_references_are_named_as_the_text_cites_them():
    def entry(year, *names):
        return Entry("misc", {"year": year}, {"author": [Person(name) for name in names]})

    entries = [entry("1960", "Kalman, R."), entry("2022", "Gu, A.", "Goel, K.", "Ré, C.")]
    entries += [entry("2022", "Gu, A.", "others"), entry("2020", "van den Oord, A.", "B, C.")]
    assert list(AuthorYearLabels().format_labels(entries)) == [
        "Kalman, 1960",
        "Gu et al., 2022a",
        "Gu et al., 2022b",
        "van den Oord and B, 2020",
    ]


def test_broken_links_are_caught(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here"> <a href="sub/b.html#there">')
    (tmp_path / "sub" / "b.html").write_text(
        '<a name="there"><a href="../a.html#gone"><a href="c.html"><a href="https://a.org/x#y">'
    )
    assert broken_links(tmp_path) == [
        "sub/b.html: no anchor ../a.html#gone",
        "sub/b.html: no page c.html",
    ]
