"""report.html: what it is made of, and what a browser makes of it."""

import html.parser
import re
import shutil
import struct
import zlib

import pytest

from entangle.errors import UserError
from experiments.reports import page

REPORT = """# Report on <b>bold</b> & `code`

A value (-1.5 to +2.5), [a link](https://example.org/) and <script>alert(1)</script>.

## Numbers

| name | change | share | |
|---|---|---|---|
| b10 | +0.5 (+0.1 to +0.9) | 9% | nan |
| b9 | -2.0 (-3.0 to -1.0) | 10% | x |
| B1 | nan | 1e-3 % | |
| a | \u22121.5 | \u2212100 | y |
| c | | 1,200 | inf |

## Wide

| {columns} |
|{rule}|
| {columns} |

## Figures

![the first figure](figures/one.png)

![another, \u00e9](figures/tw\u00f6.png)
""".format(columns=" | ".join(f"a_long_column_{i}" for i in range(30)), rule="---|" * 29 + "---")


def png(path, width=600, height=20):
    """A grey image, from the format's definition."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head, rows = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), (b"\0" + b"\x80" * width) * height
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def report(folder):
    for name in ("one.png", "tw\u00f6.png"):
        png(folder / "figures" / name)
    (folder / "report.md").write_text(REPORT, encoding="utf-8")
    return page.write_page(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return report(tmp_path_factory.mktemp("page"))


def test_title_contents_and_language(made):
    text = made.read_text(encoding="utf-8")
    assert "<title>Report on &lt;b&gt;bold&lt;/b&gt; &amp; code</title>" in text
    assert '<html lang="en">' in text
    links = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', text)
    assert [name for _, name in links] == ["Numbers", "Wide", "Figures"]
    for place, name in links:
        assert f'<h2 id="{place}">{name}</h2>' in text


def test_html_of_the_text_is_shown_and_not_run(made):
    text = made.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1  # the page's own


class Attributes(html.parser.HTMLParser):
    """All tags and attributes of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += attrs


@pytest.mark.parametrize(
    "hostile",
    [
        '![x" onerror="alert(1)](x.png)',
        '[x](javascript:alert(1) "y")',
        '[x](https://example.org/ "y" onclick="alert(1)")',
        '`"><img src=x onerror=alert(1)>`',
        "## </a></nav><script>alert(1)</script>\n\n## two",
        "|a|\n|---|\n|<img src=x onerror=alert(1)> (<b> to </b>)|",
    ],
)
def test_no_text_becomes_a_script(hostile, tmp_path):
    png(tmp_path / "x.png")
    read = Attributes(page.render(hostile, tmp_path, "</title><script>alert(1)</script>"))
    assert read.tags.count("script") == 1
    assert not [name for name, value in read.found if name.startswith("on") or "javascript:" in (value or "")]


def test_nothing_outside_is_named_but_links(made):
    text = made.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text) == ["https://example.org/"]
    assert "url(" not in text and "@import" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "http" not in policy


def test_images_keep_their_alternative_text(made):
    alternatives = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)"', made.read_text(encoding="utf-8"))
    assert alternatives == ["the first figure", "another, \u00e9"]


def test_a_report_without_headings_is_named_by_its_file(tmp_path):
    (tmp_path / "single_token.md").write_text("|a|\n|---|\n|1|\n")
    text = page.write_page(tmp_path, "single_token.md").read_text()
    assert "<title>single_token</title>" in text
    assert "<nav" not in text


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("figures/gone.png", "figures/gone.png is missing"),
        ("https://example.org/x.png", "image https://example.org/x.png of the report in .*: it is not in that folder"),
        ("../secret.png", "image ../secret.png of the report in .*: it is not in that folder"),
        ("words.txt", "words.txt is no PNG"),
    ],
)
def test_images_that_cannot_be_shown_are_named_and_the_old_page_stays(image, message, tmp_path):
    report(tmp_path / "out")
    (tmp_path / "out" / "words.txt").write_text("words")
    png(tmp_path / "secret.png")
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "out").glob("*.html*"))
    (tmp_path / "out" / "report.md").write_text(f"![x]({image})\n")
    with pytest.raises(UserError, match=message):
        page.write_page(tmp_path / "out")
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "out").glob("*.html*")) == before


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(UserError, match=r"one_step.md is missing"):
        page.write_page(tmp_path, "one_step.md")


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    from playwright.sync_api import sync_playwright

    # as root, Chromium starts only without its sandbox; the page is the test's own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, made):
    """The page, at 1440 pixels; the test fails for what the browser complains about, or asks of others."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    complaints, requests = [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(made.as_uri())
    yield tab
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [made.as_uri()]
    tab.close()


def column(tab, index):
    rows = tab.locator("table").first.locator("tbody tr")
    return [rows.nth(i).locator("td").nth(index).inner_text().split(" ")[0] for i in range(rows.count())]


@pytest.mark.parametrize(
    ("index", "ascending", "descending"),
    [
        (0, ["a", "B1", "b9", "b10", "c"], ["c", "b10", "b9", "B1", "a"]),
        # the first number of a cell; what has none is last either way, in its order
        (1, ["-2.0", "\u22121.5", "+0.5", "nan", ""], ["+0.5", "\u22121.5", "-2.0", "nan", ""]),
        (2, ["\u2212100", "1e-3", "9%", "10%", "1,200"], ["1,200", "10%", "9%", "1e-3", "\u2212100"]),
        # one word among them makes a column of text
        (3, ["inf", "x", "y", "nan", ""], ["y", "x", "inf", "nan", ""]),
    ],
)
def test_a_click_sorts_and_another_turns_round(opened, index, ascending, descending):
    header = opened.locator("table").first.locator("th").nth(index)
    assert header.get_attribute("aria-sort") is None
    for order, expected in (("ascending", ascending), ("descending", descending), ("ascending", ascending)):
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == order
        assert column(opened, index) == expected
    other = opened.locator("table").first.locator("th").nth((index + 1) % 4)
    other.locator("button").click()
    assert header.get_attribute("aria-sort") is None
    assert other.get_attribute("aria-sort") == "ascending"


def test_the_keyboard_sorts(opened):
    opened.locator("th button").first.focus()
    opened.keyboard.press("Tab")
    header = opened.locator("th").nth(1)
    for key, order in (("Enter", "ascending"), ("Space", "descending")):
        opened.keyboard.press(key)
        assert header.get_attribute("aria-sort") == order
    assert column(opened, 1)[0] == "+0.5"
    assert opened.get_by_role("button", name="column 4").count() == 1  # its title is empty


def test_figures_are_seen_and_nothing_overflows(opened):
    for width in (1440, 390):
        opened.set_viewport_size({"width": width, "height": 800})
        assert opened.evaluate("Array.from(document.images, image => image.naturalWidth)") == [600, 600]
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        numbers, wide = opened.locator(".table").all()
        assert wide.evaluate("box => box.scrollWidth > box.clientWidth")  # in a box of its own
    assert numbers.locator("th").first.evaluate("cell => getComputedStyle(cell).position") == "sticky"


def test_both_colour_schemes_can_be_read(opened):
    """Contrast of text, 4.5 to 1 at least (WCAG 2, level AA), by its formula."""

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    grounds = {}
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        assert opened.locator("img").first.evaluate("x => getComputedStyle(x).backgroundColor") == "rgb(255, 255, 255)"
        for text, ground in (("body", "body"), ("nav a", "body"), ("th", "th")):
            found = [
                luminance(opened.locator(where).first.evaluate(f"x => getComputedStyle(x).{name}"))
                for where, name in ((text, "color"), (ground, "backgroundColor"))
            ]
            assert (max(found) + 0.05) / (min(found) + 0.05) > 4.5
            grounds[scheme, text] = found[1]
    assert grounds["light", "body"] > 0.5 > grounds["dark", "body"]
