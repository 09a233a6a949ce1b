"""The study's results as Markdown tables: means over seeds, and differences paired by seed."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from tools.learning_choices import DEFAULT, Setting
from wan.flow import bin_edges, expert_range
from wan.variants import VARIANTS, Expert

# Quantiles of Student's t: a difference beyond its error times this is of 1 % chance, for
# 1, 2, ... degrees of freedom.
T_99 = (63.7, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95)

FACTORS = {  # title and the default's value
    "sigma": ("Law of noise levels", "uniform shift 5"),
    "draws": ("Draws of noise levels", "low discrepancy"),
    "weighting": ("Weight of noise levels in the loss", "none"),
    "rank": ("Rank", "16"),
    "rate_high": ("Learning rate of the high expert", "0.001"),
    "rate_low": ("Learning rate of the low expert", "0.001"),
    "experts": ("Which experts are trained", "both"),
    "dropout": ("Share of dropped captions", "0.1"),
    "ema": ("Average of the weights", "live"),
}
Line = dict
Figure = Callable[[Line], float]


def loss(expert: Expert) -> Figure:
    """Held-out loss under the demo's law, of which bins have equal shares."""
    return lambda line: statistics.fmean(line["heldout"][expert])


def even_loss(expert: Expert) -> Figure:
    """Held-out loss with all noise levels of the expert alike: bins count by their widths."""

    def figure(line: Line) -> float:
        bins = line["heldout"][expert]
        own = expert_range(VARIANTS["tiny"].boundary, expert)
        widths = bin_edges(Setting().law(), own, len(bins)).diff().tolist()
        return statistics.fmean(bins, widths)

    return figure


COLUMNS: dict[str, tuple[Figure, float, int]] = {  # figure, factor, decimals
    "high, held out": (loss("high"), 1, 4),
    "low, held out": (loss("low"), 1, 4),
    "high, all sigma alike": (even_loss("high"), 1, 4),
    "low, all sigma alike": (even_loss("low"), 1, 4),
    "zorbi seen, %": (lambda line: line["score"]["concept"], 100, 1),
    "zorbi unasked, %": (lambda line: line["score"]["unasked"], 100, 1),
    "world's shape right, %": (lambda line: line["score"]["shape"], 100, 1),
}
EVEN = ("sigma", "weighting", "draws")  # factors for which the law that measures matters


def tables(lines: Sequence[Line]) -> str:
    """All tables of the lines of results.jsonl."""
    runs: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        if line["kind"] == "run":
            runs[line["choice"]][line["seed"]] = line
    if DEFAULT.name not in runs:
        raise SystemExit("error: there are no results of the default yet; `run` makes them")
    found = {_factor(choice) for choice in runs}
    parts = [_factor_table(factor, runs) for factor in FACTORS if factor in found]
    spreads = [line for line in lines if line["kind"] == "spread"]
    return "\n\n".join([*parts, *([_spread_table(spreads)] if spreads else [])])


def _factor(choice: str) -> str:
    return choice.partition("=")[0]


def _factor_table(factor: str, runs: dict[str, dict[int, Line]]) -> str:
    """The default first, then each value with its difference to the default."""
    title, default_value = FACTORS[factor]
    names = [name for name in COLUMNS if factor in EVEN or "alike" not in name]
    default = runs[DEFAULT.name]
    rows = [f"**{default_value}** (the demo's) | " + " | ".join(_own(default, names))]
    for choice, of in runs.items():
        if _factor(choice) == factor:
            value = choice.partition("=")[2]
            rows.append(f"{value} | " + " | ".join(_against(of, default, names)))
    head = f"| {title} | " + " | ".join(names) + " |"
    return "\n".join([head, "|---" * (len(names) + 1) + "|", *(f"| {row} |" for row in rows)])


def _own(of: dict[int, Line], names: Sequence[str]) -> list[str]:
    """Mean and standard error over the seeds."""
    cells = []
    for name in names:
        figure, factor, decimals = COLUMNS[name]
        mean, error = mean_and_error([factor * figure(line) for line in of.values()])
        cells.append(f"{mean:.{decimals}f} ± {error:.{decimals}f}")
    return cells


def _against(of: dict[int, Line], default: dict[int, Line], names: Sequence[str]) -> list[str]:
    """Mean of a value, and its difference to the default's with the same seeds; bold if clear."""
    seeds = sorted(of.keys() & default.keys())
    cells = []
    for name in names:
        figure, factor, decimals = COLUMNS[name]
        values = [factor * figure(of[seed]) for seed in seeds]
        differences = [
            value - factor * figure(default[seed])
            for seed, value in zip(seeds, values, strict=True)
        ]
        change, error = mean_and_error(differences)
        told = f"{round(change, decimals) + 0.0:+.{decimals}f} ± {error:.{decimals}f}"
        told = f"**{told}**" if is_clear(change, error, len(seeds)) else told
        cells.append(f"{statistics.fmean(values):.{decimals}f} ({told})")
    return cells


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is infinite."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), error


def is_clear(change: float, error: float, seeds: int) -> bool:
    """Whether a difference is beyond what chance gives once in a hundred tables' cells."""
    if seeds < 2 or not math.isfinite(change):
        return False
    return abs(change) > T_99[min(seeds - 1, len(T_99)) - 1] * error


def _spread_table(lines: Sequence[Line]) -> str:
    """Variance with low-discrepancy draws over that with random ones, by expert."""
    figures: dict[str, Figure] = {
        "gradient of 4 samples": lambda line: line["gradient"][0][0] / line["gradient"][1][0],
        "gradient of 64 samples": lambda line: line["gradient"][0][1] / line["gradient"][1][1],
        "training loss of 4 samples": lambda line: line["loss"][0][0] / line["loss"][1][0],
        "training loss of 64 samples": lambda line: line["loss"][0][1] / line["loss"][1][1],
        "held-out loss, low discrepancy": lambda line: line["heldout"][1] / line["heldout"][2],
        "held-out loss, in bins": lambda line: line["heldout"][0] / line["heldout"][2],
    }
    rows = ["| Variance over that of random draws | high | low |", "|---|---|---|"]
    for name, figure in figures.items():
        cells = []
        for expert in ("high", "low"):
            # Ratios are averaged as logarithms: twice and half are alike.
            logs = [math.log(figure(line)) for line in lines if line["expert"] == expert]
            mean, error = mean_and_error(logs)
            cells.append(f"{math.exp(mean):.3f} ± {math.exp(mean) * error:.3f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)
