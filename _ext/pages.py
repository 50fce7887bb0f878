"""What the book's pages have beyond Jupyter Book.

* An exported cell carries a badge that names its module and links to the API page;
  each entry of the API page links back to the cell.
* The download menu offers the executed notebook.
* One local copy of plotly.js serves every interactive figure.
* A figure's ``alt`` text reaches its image, and figures without one are a warning.
* Exported cells that define nothing public, only imports or private helpers, are folded.
* A page describes itself to search engines and previews by its first paragraphs.
* References are named by author and year, as the text cites them.
* The repository's button is shown where the configuration says where that is.
* A page tells the browser that nothing may come from elsewhere, nor be sent there, and
  asks for no font in a way that is refused to a page opened as a file, nor for a script
  that nobody needs.
"""

import os
import re
import sys
from html import escape
from pathlib import Path
from shutil import copy2

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style
from pybtex.style.labels import BaseLabelStyle
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cells import public_names

logger = logging.getLogger(__name__)


def add_badges(app, doctree, docname):
    """Put a badge into every exported cell: one link for each name it defines."""
    if app.builder.format != "html":
        return
    module = f"s4mini.{docname.rsplit('/', 1)[-1]}"
    for cell in list(doctree.findall(nodes.container)):
        if "tag_export" not in cell.get("classes", []):
            continue
        code = next(cell.findall(nodes.literal_block), None)
        names = public_names(code.astext()) if code is not None else []
        links = [
            f'<a id="def-{name}" href="{api_address(app, docname, f"{module}.{name}")}" '
            f'title="{module}.{name} in the API">{module}.{name}</a>'
            for name in names
        ]
        text = " ".join(links) or f"<span>{module}</span>"
        cell.insert(0, nodes.raw("", f'<p class="exported">{text}</p>', format="html"))


def fold_helpers(app, doctree):
    """Fold the exported cells that define nothing public."""
    for cell in doctree.findall(nodes.container):
        if "tag_export" not in cell.get("classes", []) or cell.get("hide_mode"):
            continue
        code = next(cell.findall(nodes.literal_block), None)
        if code is None or public_names(code.astext()):
            continue
        what = "a private helper" if "def " in code.astext() else "imports"
        cell["hide_mode"] = "input"
        cell["prompt_show"], cell["prompt_hide"] = f"Show {what}", f"Hide {what}"


def api_address(app, docname: str, dotted: str) -> str:
    """Return the relative address of an entry of the API page; a constant's is its module's."""
    module, _, name = dotted.rpartition(".")
    entry = f"module-{module}" if name.isupper() else dotted
    return app.builder.get_relative_uri(docname, "book/api") + f"#{entry}"


def link_back(app, what, name, obj, options, lines):
    """End a docstring on the API page with a link to the cell that defines it."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "s4mini" and what in {"function", "class", "data"}:
        chapter, anchor = parts[1], f"def-{parts[2]}"
        lines += ["", f"`Read it where it is derived <{chapter}.html#{anchor}>`__", ""]


def skip_fields(app, what, name, obj, skip, options):
    """Leave out a named tuple's fields: its docstring lists them with shapes and units."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def offer_notebook(app, pagename, templatename, context, doctree):
    """Make the page's executed notebook downloadable: the theme then shows its button."""
    if app.builder.format != "html" or doctree is None:
        return
    notebook = Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.ipynb"
    if notebook.exists():
        target = Path(app.outdir) / "_sources" / f"{pagename}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        copy2(notebook, target)
        context["ipynb_source"] = f"{pagename}.ipynb"


def describe(app, pagename, templatename, context, doctree):
    """Describe the page by its first paragraphs; do not repeat the book's title in a title."""
    if context.get("title") == context.get("docstitle"):
        context["theme_logo"] = (context.get("theme_logo") or {}) | {"text": context["docstitle"]}
        context["docstitle"] = ""
    text = opening(doctree)
    if not text:
        return
    described = {
        "description": text,
        "og:title": str(context.get("title", "")),
        "og:description": text,
        "og:type": "article",
        "og:site_name": app.config.html_title,
    }
    if site := app.config.html_baseurl:  # previews want whole addresses
        described["og:url"] = f"{site.rstrip('/')}/{pagename}.html"
        described["og:image"] = f"{site.rstrip('/')}/_static/readme.png"
    context["metatags"] = (context.get("metatags") or "") + "".join(
        f'<meta {"property" if ":" in name else "name"}="{name}" '
        f'content="{escape(value, quote=True)}">\n'
        for name, value in described.items()
    )


def opening(doctree, enough: int = 60) -> str:
    """Return a page's first paragraphs as plain text, as many as say enough."""
    text = ""
    for paragraph in doctree.findall(nodes.paragraph) if doctree else ():
        text = f"{text} {' '.join(paragraph.astext().split())}".strip()
        if len(text) >= enough:
            break
    return text


def offer_repository(app, config):
    """Show the repository's button where the configuration says where that is."""
    options = config.html_theme_options
    options["use_repository_button"] = bool(options.get("repository_url"))


#: What a page may load: what lies beside it, served or as files, and what it holds itself.
POLICY = {
    "default-src": "'self' file:",
    "script-src": "'self' file: 'unsafe-inline'",
    "style-src": "'self' file: 'unsafe-inline'",
    "img-src": "'self' file: data: blob:",
    "font-src": "'self' file: data:",
    "media-src": "'self' file: data:",
    "object-src": "'none'",
    "base-uri": "'none'",
    "form-action": "'self' file:",
}


def forbid_elsewhere(app, pagename, templatename, context, doctree):
    """Put the content security policy into the head of a page, before anything it loads."""
    policy = "; ".join(f"{kind} {sources}" for kind, sources in POLICY.items())
    tag = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    context["metatags"] = tag + (context.get("metatags") or "")


#: Hints to load fonts early, which are errors in a page opened as a file; and a script of
#: 1.5 MB that draws the icons a second time: the font has them.
UNWANTED = re.compile(
    r'<link rel="preload" as="font"[^>]*>\s*|<script[^>]*/fontawesome/[^>]*></script>\s*'
)


def drop_unwanted(app, exception):
    """Drop from the pages what the theme loads and nobody needs."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text("utf8")
            page.write_text(UNWANTED.sub("", text), "utf8")


def plain_citations(app, pagename, templatename, context, doctree):
    """Drop the roles of the list of references: they allow none of the links it holds."""
    body = (context.get("body") or "").replace('role="list" class="citation', 'class="citation')
    context["body"] = body.replace(' role="doc-biblioentry"', "")


def drop_thebe(app, pagename, templatename, context, doctree):
    """Leave out the scripts of Thebe: it runs cells on another host, and this site has none."""

    def wanted(script):
        attributes = getattr(script, "attributes", {})
        return "thebe" not in f"{script} {attributes.get('body', '')}".lower()

    for kind in ("script_files", "css_files"):
        context[kind] = [script for script in context[kind] if wanted(script)]


def copy_plotly(app, exception):
    """Copy plotly.js out of its Python package into the site."""
    if exception is None and app.builder.format == "html":
        import plotly

        source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        copy2(source, Path(app.outdir) / "_static" / "plotly.min.js")


class AuthorYearLabels(BaseLabelStyle):
    """Name a reference as the text cites it; a letter tells apart what would read the same."""

    def format_labels(self, entries):
        plain = [self.label(entry) for entry in entries]
        for place, label in enumerate(plain):
            before = plain[:place].count(label)
            yield label + ("abcdefgh"[before] if plain.count(label) > 1 else "")

    def label(self, entry) -> str:
        """Return the names of one author or two, or the first of more, and the year."""
        people = entry.persons.get("author") or entry.persons.get("editor") or []
        names = [" ".join(map(str, (*p.rich_prelast_names, *p.rich_last_names))) for p in people]
        many = len(names) > 2 or names[1:] == ["others"]
        who = f"{names[0]} et al." if many else " and ".join(names)
        return f"{who}, {entry.fields.get('year', 'n.d.')}"


class AuthorYearStyle(Style):
    """The plain style of references, with labels by author and year."""

    default_label_style = AuthorYearLabels


def check_alt(app, doctree):
    """Warn about images without alternative text; the build makes warnings errors."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt", "").strip():
            logger.warning("image without alt text: %s", image.get("uri"), location=image)


def setup(app):
    register_plugin("pybtex.style.formatting", "author_year", AuthorYearStyle)
    os.environ["S4MINI_BOOK_BUILD"] = "1"  # inherited by the kernels: see book/figures.md
    app.connect("config-inited", offer_repository, priority=900)
    app.connect("doctree-resolved", add_badges)
    app.connect("doctree-read", check_alt)
    app.connect("doctree-read", fold_helpers)
    app.connect("autodoc-process-docstring", link_back)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("html-page-context", offer_notebook, priority=400)  # the theme's buttons: 500
    app.connect("html-page-context", describe)
    app.connect("html-page-context", forbid_elsewhere, priority=900)  # first of the tags
    app.connect("html-page-context", plain_citations)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_plotly)
    app.connect("build-finished", drop_unwanted)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
