"""Held-out loss by noise level over the steps of a run, as a panel for W&B that needs no account.

W&B draws histograms over steps as a heat map too, but of losses as they are, in which what training
changes is hardly seen: here it is the change against the base model.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

MOST_COLUMNS = 16
STRONGEST = 0.5  # the change that has the strongest colour, at least
BETTER, WORSE = "31, 111, 181", "200, 80, 30"
STYLE = (
    "body{margin:8px;background:#fff;color:#1c1d1f;font:12px/1.4 system-ui,sans-serif}"
    "table{border-collapse:separate;border-spacing:2px;width:100%;table-layout:fixed;"
    "font-variant-numeric:tabular-nums}"
    "caption{text-align:left;font-weight:600;padding-bottom:6px}"
    "th{font-weight:400;color:#66686e;text-align:right;white-space:nowrap;padding:0 6px 0 0}"
    "th:first-child{width:8rem}th+th,td{text-align:center;padding:3px 1px}"
    "td{border-radius:3px}td.strong{color:#fff}"
)


def noise_panel(
    expert: str, edges: Sequence[float], history: Iterable[tuple[int, Mapping[str, float]]]
) -> str:
    """A page with a row for each noise bin between the `edges`, the noisiest on top.

    `history` are the figures of the run by step, as metrics.jsonl has them; of many steps as many
    are shown as fit, the first and the last among them. Empty if nothing was measured.
    """
    bins = [f"heldout_over_base/{expert}/bin_{index}" for index in range(len(edges) - 1)]
    measured = {
        step: [found[name] for name in bins]
        for step, found in history
        if step > 0 and all(name in found for name in bins)
    }
    if not measured:
        return ""
    steps = _spread(sorted(measured))
    limit = max(STRONGEST, *(abs(change) for step in steps for change in measured[step]))
    rows = []
    for index in reversed(range(len(bins))):
        cells = "".join(_cell(measured[step][index], limit) for step in steps)
        rows.append(f"<tr><th>σ {edges[index]:.3f} – {edges[index + 1]:.3f}</th>{cells}</tr>")
    below = "".join(f"<th>{step:,}</th>" for step in steps)
    title = f"{expert}: change of held-out loss against the base model, percent, over steps"
    return (
        f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><table>'
        f"<caption>{escape(title)}</caption><tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><th>step</th>{below}</tr></tfoot></table>"
    )


def _spread(steps: Sequence[int]) -> list[int]:
    """At most MOST_COLUMNS of the steps, evenly."""
    last = len(steps) - 1
    columns = min(MOST_COLUMNS, len(steps))
    return [steps[round(place * last / max(1, columns - 1))] for place in range(columns)]


def _cell(change: float, limit: float) -> str:
    strength = abs(change) / limit
    colour = f"rgba({WORSE if change > 0 else BETTER}, {0.05 + 0.9 * strength:.2f})"
    kind = ' class="strong"' if strength > 0.55 else ""
    text = f"{100 * change:+.0f}".replace("-", "\N{MINUS SIGN}")
    return f'<td{kind} style="background:{colour}">{text}</td>'
