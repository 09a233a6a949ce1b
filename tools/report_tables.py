"""The sections of a report that are words and numbers: overview, files, data, time, settings."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from tools.report_charts import number
from tools.report_privacy import shown, shown_setting
from tools.report_runs import Export, RunRecord
from wan.variants import VARIANTS, Expert

VERSION = re.compile(r"wan_lora\.(torch|diffusers|peft)_version")  # in an exported file
MANY = 30  # lines of a list that may be long
ALWAYS_DIFFERENT = ("name", "output_dir")  # between runs
FROM_METADATA = {
    "wan_lora.git_commit": "commit of wan-lora",
    "wan_lora.base_model_hash": "base model, hash",
    "wan_lora.dataset_hash": "dataset, hash",
    "wan_lora.config_sha256": "settings, hash",
    "ss_mixed_precision": "mixed precision",
    "modelspec.date": "finished (UTC)",
}


def isolated(text: str) -> str:
    """Text from outside, escaped; its direction of writing ends with it."""
    return f"<bdi>{escape(text)}</bdi>"


def section(title: str, body: str, name: str) -> str:
    """A part of the page, or nothing where there is nothing to show."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML; all columns but the first are aligned as numbers."""
    if not rows:
        return ""
    words = "".join(f"<th>{escape(word)}</th>" for word in head)
    top = f"<tr>{words}</tr>" if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}{body}</table></div>'


def colour_of(place: int) -> str:
    """The class of the run in this place."""
    return f"c{place % 8}"


def expert_words(expert: Expert) -> str:
    """What people call it."""
    return "transformer" if expert == "single" else f"{expert} noise"


def change(record: RunRecord, expert: Expert, step: int | None = None) -> tuple[float, float]:
    """Change of held-out loss against the base in percent, and its error; NaN before there is."""
    losses = record.figures.get(f"heldout/{expert}/loss", [])
    errors = dict(record.figures.get(f"heldout/{expert}/standard_error", []))
    if len(losses) < 2 or losses[0][0] != 0 or losses[0][1] == 0:
        return float("nan"), 0.0
    base = losses[0][1]
    at, loss = losses[-1] if step is None else (step, dict(losses)[step])
    return 100 * (loss / base - 1), 100 * errors.get(at, 0.0) / base


def percent(value: float, error: float = 0.0) -> str:
    """A signed percentage with its error; a dash if it is not known."""
    if value != value:
        return "–"
    spread = f" ± {error:.1f}" if error else ""
    return f"{value:+.1f}{spread}\N{THIN SPACE}%".replace("-", "\N{MINUS SIGN}")


def best_step(record: RunRecord, expert: Expert) -> int | None:
    """The step of the least held-out loss after training began."""
    losses = [(v, s) for s, v in record.figures.get(f"heldout/{expert}/loss", []) if s > 0]
    return min(losses)[1] if losses else None


def state(record: RunRecord) -> str:
    """How far the run came."""
    planned = record.planned_steps or record.step
    if record.finished:
        return f"finished, {record.step:,} steps"
    when = f"{record.last_written:, last figures %Y-%m-%d %H:%M UTC}" if record.last_written else ""
    return f"not finished: step {record.step:,} of {planned:,}{when}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def overview(records: Sequence[RunRecord]) -> str:
    """One line for each expert of each run: loss before and now, and where it was least."""
    rows = []
    for place, record in enumerate(records):
        for expert in record.experts:
            losses = record.figures.get(f"heldout/{expert}/loss", [])
            best = best_step(record, expert)
            if not losses or losses[0][0] != 0:
                continue
            dot = f'<span class="dot {colour_of(place)}"></span>{isolated(record.name)}: '
            least = "–" if best is None else percent(change(record, expert, best)[0])
            rows.append(
                [
                    (dot if len(records) > 1 else "") + expert_words(expert),
                    number(losses[0][1]),
                    number(losses[-1][1]),
                    percent(*change(record, expert)),
                    least if best is None else f"{least} at step {best:,}",
                ]
            )
    head = ["", "base model", "now", "change", "least"]
    return table(head, rows, "numbers overview")


def runs_table(records: Sequence[RunRecord]) -> str:
    """The runs that are compared, each with the colour it has in all charts."""
    rows = [
        [
            f'<span class="dot {colour_of(place)}"></span>{isolated(record.name)}',
            escape(state(record)),
            duration(record.seconds),
        ]
        for place, record in enumerate(records)
    ]
    return table(["run", "state", "time"], rows, "runs")


def files(records: Sequence[RunRecord]) -> str:
    """Exported adapters with their hashes, and where the best ones are."""
    blocks = []
    for record in records:
        title = f"<h3>{isolated(record.name)}</h3>" if len(records) > 1 else ""
        entries = "".join(_file(export) for export in record.exports)
        body = f'<div class="files">{entries}</div>{_best(record)}{_kept(record)}'
        blocks.append(title + body if entries or record.checkpoints else "")
    return "".join(blocks)


def _file(export: Export) -> str:
    facts = {"size": _size(export.size_bytes)}
    if export.hashes is None:
        facts["state"] = "cannot be read as a safetensors file"
    else:
        facts |= {"AutoV3": export.hashes.autov3, "SHA256": export.hashes.sha256}
    for key, word in (("ss_network_dim", "rank"), ("ss_steps", "steps")):
        if key in export.metadata:
            facts[word] = export.metadata[key]
    return f"<article><h3>{isolated(export.name)}</h3>{facts_list(facts)}</article>"


def facts_list(facts: Mapping[str, str]) -> str:
    """Labels and values under each other."""
    rows = "".join(
        f"<dt>{escape(label)}</dt><dd>{isolated(shown(fact))}</dd>" for label, fact in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _best(record: RunRecord) -> str:
    """For each expert the step of the least held-out loss, and the files that were saved there."""
    lines = []
    if record.best is not None:
        where = _files_of(record.checkpoints.get(record.best, []))
        lines.append(f"<li>Best of both together: step {record.best:,}: {where}</li>")
    for expert in record.experts:
        step = best_step(record, expert)
        if step is None:
            continue
        saved = record.checkpoints.get(step, [])
        wanted = [name for name in saved if f"_{expert}_" in name] or saved
        if step == record.step and record.finished:
            wanted = [e.name for e in record.exports if f"_{expert}_" in e.name] or wanted
        lines.append(
            f"<li>Best by held-out loss, {expert_words(expert)}: step {step:,} "
            f"({percent(*change(record, expert, step))}): {_files_of(wanted)}</li>"
        )
    return f'<ul class="plain">{"".join(lines)}</ul>' if lines else ""


def _files_of(names: Sequence[str]) -> str:
    return ", ".join(isolated(name) for name in names) or "no checkpoint is kept of it"


def _kept(record: RunRecord) -> str:
    if not record.checkpoints:
        return ""
    steps = ", ".join(f"{step:,}" for step in record.checkpoints)
    return f'<p class="quiet">Checkpoints after step {steps}.</p>'


def data(records: Sequence[RunRecord]) -> str:
    """What was trained on: shapes and clips, and what was left out."""
    blocks = []
    for record in records:
        title = f"<h3>{isolated(record.name)}</h3>" if len(records) > 1 else ""
        blocks.append(title + facts_list(_data_facts(record)) + _clips(record.dataset))
    return "".join(blocks)


def _data_facts(record: RunRecord) -> dict[str, str]:
    settings = record.settings
    named = {
        "data.path": "dataset",
        "data.heldout_path": "held out",
        "data.trigger": "trigger",
        "data.fps_policy": "frame rates",
    }
    facts = {
        word: shown_setting(key, settings[key]) for key, word in named.items() if settings.get(key)
    }
    mixed = [k for k in settings if k.startswith("data.mix.") and k.endswith(".path")]
    facts |= {f"mixed in: {k.split('.')[2]}": shown_setting(k, settings[k]) for k in mixed}
    size = [settings.get(f"data.{key}") for key in ("frames", "height", "width")]
    if all(size):
        facts["clips"] = f"{size[0]} frames, {size[1]} × {size[2]} pixels (height × width)"
    items = next((e.metadata.get("ss_num_train_items") for e in record.exports), None)
    return facts | ({"trained on": f"{items} clips"} if items else {})


def _clips(dataset: Mapping[str, object]) -> str:
    rows = []
    for side, word in (("train", "trained on"), ("heldout", "held out")):
        entry = dataset.get(side)
        shapes = entry.get("shapes") if isinstance(entry, dict) else None
        for shape, count in shapes.items() if isinstance(shapes, dict) else ():
            rows.append([f"{word}, {isolated(str(shape).replace('x', ' × '))}", escape(str(count))])
    dropped, notes = dataset.get("dropped"), dataset.get("notes")
    lines = [
        f"{entry.get('name')}: {entry.get('reason')}"
        for entry in (dropped if isinstance(dropped, list) else [])
        if isinstance(entry, dict)
    ]
    return (
        table(["frames × height × width", "clips"], rows, "numbers")
        + _long_list(f"left out: {len(lines):,}", lines)
        + _long_list("notes", [str(note) for note in notes] if isinstance(notes, list) else [])
    )


def _long_list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{isolated(shown(line))}</li>" for line in lines[:MANY])
    more = f"<li>and {len(lines) - MANY:,} more</li>" if len(lines) > MANY else ""
    return f'<h3>{escape(title)}</h3><ul class="plain">{items}{more}</ul>'


def time_spent(records: Sequence[RunRecord]) -> str:
    """A bar for each run, cut by phases, and the seconds of each."""
    timed = [(place, record) for place, record in enumerate(records) if record.phases]
    names = list(dict.fromkeys(name for _, record in timed for name in record.phases))
    blocks = []
    for _, record in timed:
        total, left, parts = sum(record.phases.values()), 0.0, []
        for name, spent in record.phases.items():
            parts.append(
                f'<rect class="{colour_of(names.index(name))}" x="{100 * left / total:.2f}%" '
                f'width="{100 * spent / total:.2f}%" height="100%">'
                f"<title>{escape(name)}: {duration(spent)}</title></rect>"
            )
            left += spent
        label = isolated(record.name) if len(records) > 1 else ""
        blocks.append(f'{label}<svg class="share" role="img">{"".join(parts)}</svg>')
    rows = [
        [
            f'<span class="dot {colour_of(place)}"></span>{isolated(name)}',
            *(_spent(record, name) for _, record in timed),
        ]
        for place, name in enumerate(names)
    ]
    head = ["phase", *(record.name if len(records) > 1 else "time" for _, record in timed)]
    return "".join(blocks) + table(head, rows, "numbers")


def _spent(record: RunRecord, name: str) -> str:
    spent, total = record.phases.get(name, 0.0), sum(record.phases.values())
    return f'{duration(spent)} <span class="quiet">{100 * spent / total:.0f} %</span>'


def environment(records: Sequence[RunRecord]) -> str:
    """Versions and hashes, as the checkpoints and the exported files say them."""
    versions = [_versions(record) for record in records]
    named = dict.fromkeys(name for known in versions for name in known)
    rows = [
        [isolated(name), *(isolated(shown(known.get(name, ""))) for known in versions)]
        for name in named
    ]
    for key, word in FROM_METADATA.items():
        values = [next((e.metadata.get(key, "") for e in r.exports), "") for r in records]
        if any(values):
            rows.append([escape(word), *(isolated(value) for value in values)])
    head = ["", *(record.name if len(records) > 1 else "" for record in records)]
    return table(head, rows, "environment")


def _versions(record: RunRecord) -> dict[str, str]:
    """Of a checkpoint's packages, or of those that an exported file names, where none is kept."""
    said = {
        match[1]: value
        for export in record.exports
        for key, value in export.metadata.items()
        if (match := VERSION.fullmatch(key))
    }
    return said | dict(record.versions)


def differences(records: Sequence[RunRecord]) -> str:
    """The settings in which the runs differ, beside each other; folded, what only some have."""
    differing = [
        (key, values)
        for key, values in _settings(records)
        if len(set(values)) > 1 and key not in ALWAYS_DIFFERENT
    ]
    if not differing:
        return "<p>The settings are the same, but for the name.</p>"
    common = [(k, v) for k, v in differing if all(k in record.settings for record in records)]
    some = [entry for entry in differing if entry not in common]
    summary = f"<summary>{len(some)} settings that only some of these runs have</summary>"
    folded = f"<details>{summary}{_settings_table(records, some)}</details>" if some else ""
    return (_settings_table(records, common) if common else "") + folded


def configuration(records: Sequence[RunRecord]) -> str:
    """All settings, with a field to search in them."""
    return (
        '<div class="search"><input type="search" placeholder="search the settings" '
        'aria-label="search the settings"><output></output></div>'
        f"{_settings_table(records, _settings(records))}"
    )


def _settings_table(
    records: Sequence[RunRecord], settings: Sequence[tuple[str, Sequence[str]]]
) -> str:
    names = [escape(record.name if len(records) > 1 else "") for record in records]
    rows = "".join(
        f"<tr><td>{_key(key)}</td>"
        + "".join(
            f'<td data-run="{name}">{isolated(value)}</td>'
            for name, value in zip(names, values, strict=True)
        )
        + "</tr>"
        for key, values in settings
    )
    head = f"<tr><th></th>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    kind = "settings compared" if len(records) > 1 else "settings"
    return f'<div class="scroll"><table class="{kind}">{head}{rows}</table></div>'


def _settings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for record in records for key in record.settings)
    return [
        (
            key,
            [
                shown_setting(key, record.settings[key]) if key in record.settings else "–"
                for record in records
            ],
        )
        for key in keys
    ]


def _key(key: str) -> str:
    group, dot, name = key.rpartition(".")
    return f'<span class="quiet">{escape(group)}{dot}</span><wbr>{escape(name)}'


def model_title(record: RunRecord) -> str:
    """The model's name as people know it."""
    facts = VARIANTS.get(str(record.settings.get("model.variant")))
    return facts.title if facts else str(record.settings.get("model.variant", "unknown model"))


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} KB"
