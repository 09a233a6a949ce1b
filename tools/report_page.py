"""The HTML of a report: one file without any request, about one run or comparing several.

All text of the runs is escaped, and a Content-Security-Policy allows the page's own style, script
and videos and nothing else: `report_page.css`, and `report_page.js`, which plays the videos that
are in view, shows the values under the pointer and searches the settings. Without a script the
charts are there, and the videos have controls.
"""

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tools import report_curves as curves
from tools import report_tables as tables
from tools.report_runs import RunRecord
from tools.report_samples import films_by_importance, samples, shots_of, sweep
from tools.report_tables import isolated, section
from tools.report_videos import Reel, pack
from train.rules import ConfigError

LIMIT = 25_000_000  # bytes of a page
FIGURE = 400  # bytes that a video takes beside its own
HERE = Path(__file__)


def write_page(path: Path, records: Sequence[RunRecord], limit: int = LIMIT) -> None:
    """Write the page, smaller than `limit` bytes. A lone surrogate becomes a visible escape."""
    films = films_by_importance(records, shots_of(records))
    bare = len(page_html(records, Reel({})).encode(errors="backslashreplace"))
    reel = pack(films, max(0, limit - bare - FIGURE * (len(films) + 1)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = page_html(records, reel)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}). Set --to to a file that can."
        ) from error


def page_html(records: Sequence[RunRecord], reel: Reel) -> str:
    """The whole document, with the videos of the reel."""
    style, script = (HERE.with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))
    policy = (
        f"default-src 'none'; media-src data:; style-src {_allowed(style)}; "
        f"script-src {_allowed(script)}; base-uri 'none'; form-action 'none'"
    )
    title = " / ".join(record.name for record in records)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n<body>",
            _head(records),
            "<main>",
            *_sections(records, reel),
            f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _allowed(text: str) -> str:
    """The source expression of a policy that allows exactly this inline text."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _head(records: Sequence[RunRecord]) -> str:
    if len(records) > 1:
        return f"<header><h1>{len(records)} runs</h1>{tables.runs_table(records)}</header>"
    (record,) = records
    cards = []
    for expert in record.experts:
        now, error = tables.change(record, expert)
        if now == now:
            words = f"held-out loss, {tables.expert_words(expert)}"
            cards.append((words, tables.percent(now, error)))
    cards.append(("steps", f"{record.step:,}"))
    cards.append(("time", tables.duration(record.seconds)))
    figures = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}</dd></div>" for label, figure in cards
    )
    alarms = "".join(
        f'<p class="alarm">Step {step:,}: {isolated(words)}</p>'
        for step, words in curves.alarms(record)
    )
    return (
        f'<header><h1>{isolated(record.name)}</h1><p class="quiet">'
        f"{escape(tables.model_title(record))}: {escape(tables.state(record))}</p>"
        f'<dl class="summary">{figures}</dl>{alarms}</header>'
    )


def _sections(records: Sequence[RunRecord], reel: Reel) -> list[str]:
    shots = shots_of(records)
    differing = tables.differences(records) if len(records) > 1 else ""
    learning = curves.heldout(records) + tables.overview(records)
    training = (
        curves.training_loss(records)
        + curves.of_expert(records, "grad_norm", "Gradient norm before clipping")
        + curves.of_expert(records, "lr", "Learning rate", curves.peak)
        + curves.of_run(records, "time/step_s", "Time of a step", "\N{THIN SPACE}s")
    )
    return [
        section("What differs", differing, "differences"),
        section("Is it learning?", learning, "heldout"),
        section("By noise level", _heat(records), "noise"),
        section("Samples", _reduced(reel) + samples(records, shots, reel.videos), "samples"),
        *(
            section(_of("Strengths", r, records), sweep(r, reel.videos), f"sweep-{place}")
            for place, r in enumerate(records)
        ),
        section("Training", f'<div class="grid">{training}</div>' if training else "", "training"),
        section("Files", tables.files(records), "files"),
        section("Data", tables.data(records), "data"),
        section("Where the time went", tables.time_spent(records), "time"),
        section("Environment", tables.environment(records), "environment"),
        section("Settings", tables.configuration(records), "settings"),
    ]


def _heat(records: Sequence[RunRecord]) -> str:
    """Two maps for one run, the change of held-out loss alone for several."""
    blocks = []
    for record in records:
        if maps := curves.heldout_heat(record):
            words = _of("Held-out loss against the base model, percent", record, records)
            blocks.append(_maps(words, maps))
        if len(records) == 1 and (maps := curves.training_heat(record)):
            blocks.append(_maps("Training loss", maps))
    if not blocks:
        return ""
    words = "Each row is a range of sigma, the noisiest on top; columns are steps."
    return f'<p class="quiet">{words}</p><div class="grid">{"".join(blocks)}</div>'


def _maps(title: str, maps: Sequence[str]) -> str:
    return f'<div class="maps"><h3>{escape(title)}</h3>{"".join(maps)}</div>'


def _of(title: str, record: RunRecord, records: Sequence[RunRecord]) -> str:
    return f"{title}: {record.name}" if len(records) > 1 else title


def _reduced(reel: Reel) -> str:
    """What was done so that the page stays small."""
    words = []
    if reel.reduced:
        words.append(f"{reel.reduced:,} videos were made smaller")
    if reel.left_out:
        words.append(f"{reel.left_out:,} older ones were left out")
    if not words:
        return ""
    return (
        f'<p class="note">To keep this page under {LIMIT / 1e6:.0f} MB, {" and ".join(words)}; '
        "all of them lie in the folder of the run as they were rendered.</p>"
    )
