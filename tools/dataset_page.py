"""The HTML of a dataset: one file without any request, each item a card as the model sees it.

All text of the dataset is escaped, and a Content-Security-Policy allows the page's own style and
script and nothing else: `dataset_page.css`, and `dataset_page.js`, a filter whose state stands in
the address (#dropped, #bucket=13x64x64, #q=red+ball). Without a script all cards are shown.
"""

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

State = Literal["train", "heldout", "dropped"]

STATE_WORDS: dict[State, str] = {"train": "trained on", "heldout": "held out", "dropped": "dropped"}
HERE = Path(__file__)


@dataclass(frozen=True)
class Caption:
    """A final prompt; `tokens` is None where there is no tokenizer to count them."""

    text: str
    tokens: int | None


@dataclass(frozen=True)
class Window:
    """One clip of an item; each of `strips` is a WebP of frames of it, side by side."""

    bucket: str  # "13x64x64"
    used: str  # "13 frames at 8 fps from 0.5 s"
    strips: tuple[bytes, ...]


@dataclass(frozen=True)
class PageItem:
    """One card. `reason` says why a dropped item is not used."""

    name: str
    state: State
    captions: tuple[Caption, ...] = ()
    windows: tuple[Window, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()  # label and value: ("source", "24 fps, 48 frames")
    warnings: tuple[str, ...] = ()
    reason: str = ""
    group: int | None = None  # its place in Page.groups


@dataclass(frozen=True)
class BucketRow:
    """A line of the histogram."""

    bucket: str
    clips: int
    batches: int  # in an epoch


@dataclass(frozen=True)
class DuplicateGroup:
    """What belongs together, in words, and the names of some of it."""

    kind: str  # "3 are the same file"
    names: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """All that a page says."""

    title: str
    subtitle: str
    summary: Sequence[tuple[str, str]]  # label and figure
    notes: Sequence[str]
    buckets: Sequence[BucketRow]
    groups: Sequence[DuplicateGroup]
    items: Sequence[PageItem]


def write_page(path: Path, page: Page) -> None:
    """Write the page as one HTML file. A lone surrogate in a caption becomes a visible escape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_html(page), encoding="utf-8", errors="backslashreplace")


def page_html(page: Page) -> str:
    """The whole document."""
    style, script = (HERE.with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_allowed(style)}; "
        f"script-src {_allowed(script)}; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>\n<style>{style}</style>\n<body>",
            _head(page),
            _filters(page),
            "<main>",
            *(_card(item) for item in page.items),
            f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _allowed(text: str) -> str:
    """The source expression of a policy that allows exactly this inline text."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _head(page: Page) -> str:
    figures = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}</dd></div>"
        for label, figure in page.summary
    )
    sections = [_histogram(page.buckets)]
    if page.notes:
        sections.append(_list("Notes", [_isolated(note) for note in page.notes]))
    if page.groups:
        lines = [
            f'<a href="#group={number}">{escape(group.kind)}</a>: '
            + ", ".join(_isolated(name) for name in group.names)
            for number, group in enumerate(page.groups)
        ]
        sections.append(_list("Duplicates", lines))
    return (
        f'<header><h1>{_isolated(page.title)}</h1><p class="quiet">{_isolated(page.subtitle)}</p>'
        f'<dl class="summary">{figures}</dl></header>\n'
        f'<div class="overview">{"".join(sections)}</div>'
    )


def _histogram(rows: Sequence[BucketRow]) -> str:
    most = max((row.clips for row in rows), default=1)
    lines = "".join(
        f'<tr><td><a href="#bucket={row.bucket}">{_shape(row.bucket)}</a></td>'
        f'<td class="bar"><svg><rect width="{100 * row.clips / most:.1f}%" height="100%"/></svg>'
        f'</td><td class="number">{row.clips:,}</td><td class="number">{row.batches:,}</td></tr>'
        for row in rows
    )
    return (
        "<section><h2>Shapes</h2><table><tr><th>frames × height × width</th><th></th>"
        '<th class="number">clips</th><th class="number">batches</th></tr>'
        f"{lines}</table></section>"
    )


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<section><h2>{title}</h2><ul>{items}</ul></section>"


def _filters(page: Page) -> str:
    kinds = Counter(kind for item in page.items for kind in _kinds(item))
    words = [*STATE_WORDS.items(), ("warned", "with warnings"), ("duplicate", "duplicates")]
    links = "".join(
        f'<a href="#{kind}" data-kind="{kind}">{word} {kinds[kind]:,}</a>'
        for kind, word in words
        if kinds[kind]
    )
    options = "".join(
        f'<option value="{row.bucket}">{_shape(row.bucket)}</option>' for row in page.buckets
    )
    return (
        f'<nav><a href="#" data-kind="">all {len(page.items):,}</a>{links}'
        f'<select aria-label="shape"><option value="">every shape</option>{options}</select>'
        '<input type="search" placeholder="name or caption" aria-label="name or caption">'
        "<output></output></nav>"
    )


def _kinds(item: PageItem) -> list[str]:
    """The filters under which a card is found."""
    warned = ["warned"] if item.warnings else []
    return [item.state, *warned, *(["duplicate"] if item.group is not None else [])]


def _card(item: PageItem) -> str:
    buckets = " ".join(dict.fromkeys(window.bucket for window in item.windows))
    group = "" if item.group is None else item.group
    facts = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(fact)}</dd>" for label, fact in item.facts
    )
    reason = f'<p class="reason">{_isolated(item.reason)}</p>' if item.reason else ""
    return "".join(
        [
            f'<article class="{" ".join(_kinds(item))}" data-buckets="{buckets}" '
            f'data-group="{group}">',
            *(_figure(window, len(item.windows) > 1) for window in item.windows),
            f'<div class="body"><h3>{_isolated(item.name)}'
            f'<span class="badge {item.state}">{STATE_WORDS[item.state]}</span></h3>',
            *(_quote(caption) for caption in item.captions),
            f'<dl class="facts">{facts}</dl>' if facts else "",
            *(f'<p class="warning">{_isolated(warning)}</p>' for warning in item.warnings),
            f"{reason}</div></article>",
        ]
    )


def _figure(window: Window, several: bool) -> str:
    pictures = "".join(
        '<img loading="lazy" decoding="async" alt="frames of the clip" '
        f'src="data:image/webp;base64,{b64encode(strip).decode()}">'
        for strip in window.strips
    )
    words = f"<figcaption>{_shape(window.bucket)}: {escape(window.used)}</figcaption>"
    return f"<figure>{pictures}{words if several else ''}</figure>"


def _quote(caption: Caption) -> str:
    count = "" if caption.tokens is None else f"<small>{caption.tokens:,} tokens</small>"
    return f'<blockquote dir="auto">{_isolated(caption.text)}{count}</blockquote>'


def _isolated(text: str) -> str:
    """Text of the dataset, escaped; its direction of writing ends with it."""
    return f"<bdi>{escape(text)}</bdi>"


def _shape(bucket: str) -> str:
    return bucket.replace("x", "\N{THIN SPACE}×\N{THIN SPACE}")
