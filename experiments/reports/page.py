"""report.html: a Markdown report as one page that needs nothing else, its figures inside and its tables sortable."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from entangle.errors import UserError
from entangle.training.run_folder import write_text

FILE = "report.html"
PNG = b"\x89PNG\r\n\x1a\n"
LONG = 40
"""Characters of a cell that are more than numbers, and want room."""
RANGE = re.compile(r"\((\S+) to (\S+)\)")
"""The smallest and the largest seed: kept in one line."""
STYLE = """
:root {
  --text: #1d2127; --faint: #59626e; --page: #ffffff; --head: #eef1f4; --line: #d5dae0; --over: #f6f8fa; --link: #0b5cad;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --text: #e3e6ea; --faint: #a3acb7; --page: #15181c; --head: #262b32; --line: #3b424b; --over: #1d2126; --link: #7fb8f5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 0.75rem; scroll-margin-top: 1rem; }
p, li { max-width: 80ch; }
p:has(> img) { max-width: none; overflow-x: auto; }
a { color: var(--link); }
code { font: 0.92em ui-monospace, monospace; }
nav { border-block: 1px solid var(--line); margin: 1rem 0 1.5rem; padding: 0.6rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.4rem; list-style: none; margin: 0; padding: 0; }
img { display: block; height: auto; max-width: 100%; padding: 0.5rem; background: #ffffff; border: 1px solid var(--line); }
.table { max-height: 85vh; overflow: auto; margin: 1rem 0; border: 1px solid var(--line); }
.table.fits { max-height: none; overflow: visible; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.875rem; line-height: 1.4; }
table { font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { min-width: 4.5rem; padding: 0.4rem 0.7rem; text-align: left; vertical-align: top; }
td.long { min-width: 16rem; }
th { position: sticky; top: 0; background: var(--head); vertical-align: bottom; }
td { border-top: 1px solid var(--line); }
tbody tr:hover { background: var(--over); }
th button { all: unset; display: block; cursor: pointer; }
th button::after { content: "\\a0\\2195"; color: var(--faint); font-weight: normal; }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: inherit; }
:focus-visible, th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2, thead { break-after: avoid; }
  tr, img { break-inside: avoid; }
  nav, th button::after { display: none; }
  .table { max-height: none; overflow: visible; }
  img { min-width: 0 !important; }
  table { font-size: 7.5pt; }
  th { position: static; }
  th, td, td.long { min-width: 0; padding: 0.2rem 0.3rem; }
}
"""
SCRIPT = r"""
"use strict";
const NUMBER = /^[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+|inf\b|\u221e)(?:e[-+\u2212]?\d+)?/i;
const MISSING = /^(?:[-+\u2212]?nan\b.*|[-\u2212\u2013\u2014]?)$/i;
const words = new Intl.Collator("en", {numeric: true});

function number(text) {
  const found = NUMBER.exec(text);
  if (found === null) return null;
  return Number(found[0].replaceAll("\u2212", "-").replaceAll(",", "").replace(/inf|\u221e/i, "Infinity"));
}

function sort(table, header) {
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, row => ({row, text: row.cells[header.cellIndex].textContent.trim()}));
  const present = rows.filter(each => !MISSING.test(each.text));
  for (const each of present) each.number = number(each.text);
  const numeric = present.every(each => each.number !== null);
  const compare = numeric ? (a, b) => (a.number > b.number) - (a.number < b.number) : (a, b) => words.compare(a.text, b.text);
  present.sort((a, b) => ascending ? compare(a, b) : compare(b, a));
  body.replaceChildren();  // the line ends between the rows, too: past thousands of them a row moves slowly
  for (const each of [...present, ...rows.filter(each => MISSING.test(each.text))]) body.append(each.row);
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies.length === 0) continue;
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    if (button.textContent === "") button.setAttribute("aria-label", `column ${header.cellIndex + 1}`);
    button.addEventListener("click", () => sort(table, header));
    header.append(button);
  }
}

// a table that fits needs no box to scroll in: its header row then stays in sight of the whole page
function fit() {
  for (const box of document.querySelectorAll(".table")) {
    box.classList.toggle("fits", box.firstElementChild.offsetWidth <= box.clientWidth);
  }
}
fit();
addEventListener("resize", fit);
"""
"""Numbers sort by the first of a cell, where every cell that is not empty or NaN begins with one; those come last."""


def write_page(out: Path, markdown: str = "report.md") -> Path:
    """Make ``report.html`` of an experiment's folder from its Markdown report.

    Args:
      out: the experiment's folder.
      markdown: name of the report, whose images are PNG files under the folder.

    Returns:
      The page.

    Raises:
      UserError: the report or one of its images is missing.
    """
    try:
        text = (out / markdown).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{out / markdown} is missing") from None
    write_text(out / FILE, render(text, out, Path(markdown).stem))
    return out / FILE


def render(markdown: str, folder: Path, title: str) -> str:
    """A report as HTML: figures as data, no HTML of the text's own, a policy that lets nothing be loaded or run besides.

    Args:
      markdown: the report, in CommonMark with tables.
      folder: what paths of images begin at.
      title: of a report without headings.

    Raises:
      UserError: an image is missing, outside of the folder, or no PNG.

    Example:
      >>> from pathlib import Path
      >>> from experiments.reports.page import render
      >>> page = render("# Runs of a<b\\n\\n|x|\\n|---|\\n|1|", Path("."), "report")
      >>> "<title>Runs of a&lt;b</title>" in page, page.count("<th>x</th>")
      (True, 1)
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for before, token in itertools.pairwise(tokens):
        if before.type == "td_open" and len(token.content) > LONG:
            before.attrs["class"] = "long"
        for child in token.children or ():
            if child.type == "image":
                child.attrs |= _embedded(folder, str(child.attrs["src"]))
            elif child.type == "text":
                child.content = RANGE.sub("(\\1\u00a0to\u00a0\\2)", child.content)
    headings = [(token, _plain(inline)) for token, inline in itertools.pairwise(tokens) if _opens(token)]
    sections = [(token, text) for token, text in headings if token.tag == "h2"]
    for number, (token, _) in enumerate(sections, start=1):
        token.attrs["id"] = f"section-{number}"
    # the title before the contents, and everything else after them
    first = 3 if tokens and tokens[0].tag == "h1" else 0
    parts = [parser.renderer.render(part, parser.options, {}) for part in (tokens[:first], tokens[first:])]
    body = f"{parts[0]}{_contents([text for _, text in sections])}{parts[1]}"
    body = body.replace("<table>", '<div class="table" role="region" aria-label="table" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    return _document(headings[0][1] if headings else title, body)


def _opens(token: Token) -> bool:
    return token.type == "heading_open"


def _plain(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def _embedded(folder: Path, source: str) -> dict[str, str | int | float]:
    """An image's attributes: half its pixels wide, as figures are drawn for paper; a third at least on a small screen."""
    name = urllib.parse.unquote(source)
    file = folder / name
    if "://" in name or not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"image {name} of the report in {folder}: it is not in that folder")
    try:
        data = file.read_bytes()
    except OSError:
        raise UserError(f"{file} is missing: the report shows it") from None
    if not data.startswith(PNG):
        raise UserError(f"{file} is no PNG: the report shows it")
    width = int.from_bytes(data[16:20], "big")  # of the header, which comes first
    encoded = base64.b64encode(data).decode()
    return {"src": f"data:image/png;base64,{encoded}", "width": width // 2, "style": f"min-width: {width // 3}px"}


def _contents(sections: Sequence[str]) -> str:
    if len(sections) < 2:
        return ""
    links = (f'<li><a href="#section-{i}">{html.escape(text)}</a></li>\n' for i, text in enumerate(sections, start=1))
    return f'<nav aria-label="Contents">\n<ul>\n{"".join(links)}</ul>\n</nav>\n'


def _document(title: str, body: str) -> str:
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
