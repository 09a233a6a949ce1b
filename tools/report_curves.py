"""Which curves and heat maps a report has, from the figures of its runs.

One run has all its experts in a chart. Runs that are compared have a chart for each expert.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from tools.report_charts import Chart, HeatMap, Line, heat_map, line_chart, number
from tools.report_runs import EXPERTS, Points, RunRecord
from tools.report_tables import change, colour_of, expert_words, percent
from wan.variants import Expert

WINDOW = 20  # points of the running mean
MOST_COLUMNS = 60  # of a heat map; what has more is averaged
FULL_PERCENT = 50.0  # the change of held-out loss that has the strongest colour, at least

Lines = Callable[[RunRecord, Expert, str, str], list[Line]]  # ..., label, colour


def heldout(records: Sequence[RunRecord]) -> str:
    """Held-out loss against the base model, in percent, with its standard error."""

    def lines(record: RunRecord, expert: Expert, label: str, colour: str) -> list[Line]:
        losses = _points(record, f"heldout/{expert}/loss")
        if len(losses) < 2 or losses[0][0] != 0 or losses[0][1] == 0:
            return []
        base, spread = losses[0][1], dict(_points(record, f"heldout/{expert}/standard_error"))
        points = [(step, 100 * (loss / base - 1)) for step, loss in losses]
        errors = [100 * spread.get(step, 0.0) / base for step, _ in losses]
        return [Line(label, colour, points, errors, end=percent(change(record, expert)[0]))]

    title = "Held-out loss against the base model"
    return _charts(records, title, lines, unit="\N{THIN SPACE}%", zero="base model")


def training_loss(records: Sequence[RunRecord]) -> str:
    """The running mean of the training loss; for one run also the means that it is made of."""

    def lines(record: RunRecord, expert: Expert, label: str, colour: str) -> list[Line]:
        losses = _points(record, f"train/{expert}/loss")
        running = [
            (step, fmean(loss for _, loss in losses[max(0, place - WINDOW + 1) : place + 1]))
            for place, (step, _) in enumerate(losses)
        ]
        faint = [Line(label, colour, losses, faint=True)] if len(records) == 1 else []
        return [*faint, Line(label, colour, running, end=last(running))]

    return _charts(records, f"Training loss, mean of {WINDOW} values", lines)


def last(points: Points) -> str:
    """What a curve says at its end: its last value."""
    return number(points[-1][1]) if points else ""


def peak(points: Points) -> str:
    """What a curve says at its end: its highest value."""
    return f"peak {number(max(value for _, value in points))}"


def of_expert(
    records: Sequence[RunRecord], prefix: str, title: str, end: Callable[[Points], str] = last
) -> str:
    """A figure that each expert has, such as `grad_norm/high`."""

    def lines(record: RunRecord, expert: Expert, label: str, colour: str) -> list[Line]:
        points = _points(record, f"{prefix}/{expert}")
        return [Line(label, colour, points, end=end(points))] if points else []

    return _charts(records, title, lines)


def of_run(records: Sequence[RunRecord], key: str, title: str, unit: str) -> str:
    """A figure of the whole run, such as `time/step_s`."""
    lines = [
        Line(
            record.name if len(records) > 1 else "",
            colour_of(place),
            _points(record, key),
            end=last(_points(record, key)) + unit,
        )
        for place, record in enumerate(records)
        if _points(record, key)
    ]
    return line_chart(Chart(title, lines, unit))


def heldout_heat(record: RunRecord) -> list[str]:
    """By expert: change of the held-out loss against the base in each noise bin, in percent."""
    maps = []
    for expert in record.experts:
        bins = [dict(_points(record, key)) for key in _bins(record, f"heldout/{expert}")]
        if not bins or not all(losses.get(0) for losses in bins):
            continue
        steps = list(bins[0])[1:]
        rows = [
            [100 * (losses[step] / losses[0] - 1) if step in losses else None for step in steps]
            for losses in bins
        ]
        steps, rows = _merged(steps, rows)
        largest = max((abs(v) for row in rows for v in row if v is not None), default=0.0)
        if steps:
            maps.append(
                heat_map(
                    HeatMap(
                        expert_words(expert),
                        [f"{step:,}" for step in steps],
                        _edge_words(record, expert, len(rows)),
                        rows,
                        max(FULL_PERCENT, largest),
                        signed=True,
                        unit="\N{THIN SPACE}%",
                    )
                )
            )
    return maps


def training_heat(record: RunRecord) -> list[str]:
    """By expert: the training loss in each noise bin."""
    maps = []
    for expert in record.experts:
        bins = [dict(_points(record, key)) for key in _bins(record, f"train/{expert}")]
        steps = sorted({step for points in bins for step in points})
        rows = [[points.get(step) for step in steps] for points in bins]
        steps, rows = _merged(steps, rows)
        values = sorted(v for row in rows for v in row if v is not None)
        if values:
            maps.append(
                heat_map(
                    HeatMap(
                        expert_words(expert),
                        [f"{step:,}" for step in steps],
                        _edge_words(record, expert, len(rows)),
                        rows,
                        values[int(0.98 * (len(values) - 1))],
                    )
                )
            )
    return maps


def alarms(record: RunRecord) -> list[tuple[int, str]]:
    """Steps at which something was wrong: figures `alarm/...` that are not zero, skipped steps."""
    skipped = [
        (points[-1][0], f"so far {number(points[-1][1])} steps of the {expert} expert were skipped")
        for expert in EXPERTS
        if (points := _points(record, f"bad_steps/{expert}"))
    ]
    raised = [
        (step, name.removeprefix("alarm/").replace("/", " "))
        for name, points in record.figures.items()
        if name.startswith("alarm/")
        for step, value in points
        if value
    ]
    return sorted(raised + skipped)


def _charts(
    records: Sequence[RunRecord], title: str, lines: Lines, unit: str = "", zero: str = ""
) -> str:
    if len(records) == 1:
        (record,) = records
        both = [
            line
            for expert in record.experts
            for line in lines(record, expert, expert_words(expert), expert)
        ]
        return line_chart(Chart(title, both, unit, zero, alarms(record)))
    charts = []
    for expert in EXPERTS:
        several = [
            line
            for place, record in enumerate(records)
            for line in lines(record, expert, record.name, colour_of(place))
        ]
        charts.append(line_chart(Chart(f"{title}, {expert_words(expert)}", several, unit, zero)))
    return "".join(charts)


def _points(record: RunRecord, key: str) -> Points:
    return record.figures.get(key, [])


def _bins(record: RunRecord, prefix: str) -> list[str]:
    """The names of the bins in their order, the least noisy first."""
    count = sum(name.startswith(f"{prefix}/bin_") for name in record.figures)
    return [f"{prefix}/bin_{index}" for index in range(count)]


def _edge_words(record: RunRecord, expert: Expert, rows: int) -> list[str]:
    """Sigma at the edges of the bins, or their numbers where it is not known."""
    edges = record.edges.get(expert, [])
    if len(edges) == rows + 1:
        return [f"{edge:.3f}" for edge in edges]
    return [str(index) for index in range(rows + 1)]


def _merged(
    steps: Sequence[int], rows: Sequence[Sequence[float | None]]
) -> tuple[list[int], list[list[float | None]]]:
    """At most MOST_COLUMNS columns, each a mean, at the step of the last of them."""
    size = max(1, math.ceil(len(steps) / MOST_COLUMNS))
    starts = range(0, len(steps), size)
    merged = [
        [fmean(known) if (known := [v for v in row[s : s + size] if v is not None]) else None
         for s in starts]
        for row in rows
    ]  # fmt: skip
    return [steps[min(start + size, len(steps)) - 1] for start in starts], merged
