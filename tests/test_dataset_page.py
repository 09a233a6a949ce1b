"""The dataset page as a browser shows it: filters, hostile text, no requests, 10,000 items."""

import html
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.dataset_page import (
    BucketRow,
    Caption,
    DuplicateGroup,
    Page,
    PageItem,
    Window,
    page_html,
    write_page,
)

CHROMIUM = shutil.which("chromium")
SECONDS = 120  # for the slowest of machines
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

HOSTILE = (
    "<script>document.title = 'owned'; console.error('owned')</script>",
    "<img src=http://127.0.0.1:9/x.png onerror=\"console.error('owned')\">",
    '"\' onmouseover=alert(1) x="</blockquote></article><h3>&lt;b&gt; &amp;amp;',
    "\u202egpj.exe مرحبا بالعالم 🎈👩\u200d🚀 שלום",
    "lone surrogate \ud800, null \0, escape \x1b[31m",
    "]]> <!-- --> {{7*7}} `${7*7}` \\u003cscript\\u003e",
)


def strip(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (340, 112), colour).save(file, "webp", quality=60)
    return file.getvalue()


RED, GREEN = strip("#ff0000"), strip("#00ff00")


def card(name: str, caption: str = "A red ball.", bucket: str = "13x64x64") -> PageItem:
    window = Window(bucket, "13 frames at 8 fps from 0.00 s", (RED,))
    return PageItem(name, "train", (Caption(caption, 5),), (window,), (("crop", "3%"),))


def page_of(items: list[PageItem]) -> Page:
    rows = [BucketRow("1x64x64", 2, 1), BucketRow("13x64x64", 3, 2)]
    groups = [DuplicateGroup("alike", ("a.mp4", "b.mp4"))]
    summary = [("trained on", "3"), ("steps <in> an epoch", "5")]
    return Page("demo", "datasets/demo & more", summary, ["a note"], rows, groups, items)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    still = Window("1x64x64", "the image", (GREEN,))
    path = tmp_path_factory.mktemp("page") / "page.html"
    items = [
        PageItem("a.mp4", "train", group=0, windows=card("").windows),
        PageItem("b.mp4", "heldout", group=0, windows=(*card("").windows, still)),
        PageItem("sub/c.png", "train", (Caption("A Blue 100% box", 4),), (still,)),
        PageItem("d+e.png", "train", (Caption("ünï", None),), (still,), warnings=("cropped",)),
        PageItem("broken.mp4", "dropped", reason="is empty (0 bytes)"),
    ]
    write_page(path, page_of(items))
    return path


class Cards(HTMLParser):
    """Collects the names of the cards that are not hidden, all tags, and the text of quotes."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.visible: list[str] = []
        self.tags: list[str] = []
        self.quotes: list[str] = []
        self.output = ""
        self._hidden, self._inside = False, ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "article":
            self._hidden = "hidden" in dict(attrs)
        if tag == "h3" and not self._hidden:
            self.visible.append("")
        if tag == "blockquote":
            self.quotes.append("")
        if tag in ("h3", "blockquote", "output", "span", "small"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h3", "blockquote", "output"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "h3" and not self._hidden:
            self.visible[-1] += data
        if self._inside == "blockquote":
            self.quotes[-1] += data
        if self._inside == "output":
            self.output += data


def browse(address: str, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The DOM after the page's script, and what the browser wrote to its console."""
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
            *(options or ("--dump-dom",)), address,
        ],
        capture_output=True, check=True, timeout=SECONDS,
    )  # fmt: skip
    console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), console


@in_browser
@pytest.mark.parametrize(
    ("fragment", "names"),
    [
        ("", ["a.mp4", "b.mp4", "sub/c.png", "d+e.png", "broken.mp4"]),
        ("#dropped", ["broken.mp4"]),
        ("#warned", ["d+e.png"]),
        ("#group=0", ["a.mp4", "b.mp4"]),
        ("#train&bucket=13x64x64", ["a.mp4"]),
        ("#q=blue+100%25", ["sub/c.png"]),
        ("#bucket=1x64x64&q=%C3%BCN%C3%8F", ["d+e.png"]),
    ],
)
def test_the_address_says_what_is_shown(
    fragment: str, names: list[str], page: Path, tmp_path: Path
) -> None:
    dom, console = browse(f"{page.as_uri()}{fragment}", tmp_path)
    cards = Cards(dom)
    assert cards.visible == names
    assert cards.output == f"{len(names)} of 5 shown"
    assert not console


@in_browser
def test_the_controls_change_the_address(page: Path, tmp_path: Path) -> None:
    # The page's policy allows no further script, so this copy, which has one, has no policy.
    steps = """<script>
      search.value = ".mp4"; search.dispatchEvent(new Event("input"));
      document.querySelector("nav [data-kind=heldout]").click();
      setTimeout(() => document.title = location.hash, 200);
    </script></body>"""
    text = re.sub("<meta http-equiv.*?>", "", page.read_text()).replace("</body>", steps)
    driven = tmp_path / "driven.html"
    driven.write_text(text)
    dom, _ = browse(
        driven.as_uri(), tmp_path / "profile", "--virtual-time-budget=2000", "--dump-dom"
    )
    assert "<title>#q=.mp4&amp;heldout</title>" in dom
    assert Cards(dom).visible == ["b.mp4"]


@in_browser
def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    items = [
        PageItem(text, "train", (Caption(text, 9),), warnings=(text,), reason=text)
        for text in HOSTILE
    ]
    path = tmp_path / "page.html"
    write_page(
        path, Page(HOSTILE[0], HOSTILE[1], [(t, t) for t in HOSTILE], HOSTILE, [], [], items)
    )
    dom, console = browse(path.as_uri(), tmp_path / "profile")
    cards = Cards(dom)
    assert not console
    assert cards.tags.count("script") == 1
    assert "img" not in cards.tags
    assert cards.tags.count("article") == len(cards.visible) == len(HOSTILE)
    readable = [text.replace("\ud800", "\\ud800").replace("\0", "") for text in HOSTILE]
    assert cards.quotes == readable
    assert html.escape(HOSTILE[0], quote=False) in dom.partition("</title>")[0]


@in_browser
def test_the_policy_stops_what_escaping_would_let_through(page: Path, tmp_path: Path) -> None:
    evil = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png'>"
    path = tmp_path / "page.html"
    path.write_text(page.read_text().replace("</main>", f"{evil}</main>"))
    dom, console = browse(path.as_uri(), tmp_path / "profile")
    assert "<title>demo</title>" in dom
    assert sum("Content Security Policy" in line for line in console) == 2
    assert Cards(dom).output == "5 of 5 shown"  # our own script ran


@in_browser
@pytest.mark.parametrize(("scheme", "dark"), [("1", False), ("0", True)])
def test_it_is_drawn_in_light_and_in_dark(
    scheme: str, dark: bool, page: Path, tmp_path: Path
) -> None:
    shot = tmp_path / "shot.png"
    browse(
        page.as_uri(), tmp_path / "profile", "--window-size=1200,1200",
        f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}",
    )  # fmt: skip
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[2, 2].mean() < 64) == dark
    red = (pixels[..., 0] > 220) & (pixels[..., 1] < 40) & (pixels[..., 2] < 40)
    assert red.sum() > 2 * 100 * 300  # the strips of two cards


@in_browser
def test_ten_thousand_items(tmp_path: Path) -> None:
    items = [
        card(f"folder_{index % 7}/clip_{index:05}.mp4", f"A ball, number {index}.")
        for index in range(10_000)
    ]
    items[1234] = PageItem("broken.mp4", "dropped", reason="is empty")
    path = tmp_path / "page.html"
    write_page(path, page_of(items))
    assert path.stat().st_size < 10_000 * (1000 + 4 / 3 * len(RED))
    dom, console = browse(f"{path.as_uri()}#q=number+99", tmp_path / "profile")
    cards = Cards(dom)
    assert len(cards.visible) == 1 + 10 + 100
    assert cards.output == "111 of 10000 shown"
    assert not console


def test_without_a_script_all_cards_are_there(page: Path) -> None:
    assert len(Cards(page.read_text()).visible) == 5


def test_an_empty_page_is_a_page() -> None:
    assert "all 0" in page_html(Page("demo", "", [], [], [], [], []))
