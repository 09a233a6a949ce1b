"""Charts as text: where their curves run, what is cut off, and what labels say."""

import re
from pathlib import Path

from run_folders import BINS, make_run

from tools.report_charts import MOST_POINTS, Chart, Line, line_chart, number
from tools.report_curves import heldout_heat
from tools.report_runs import read_record

THIN = "\N{THIN SPACE}"


def path_of(points: list[tuple[int, float]]) -> str:
    chart = line_chart(Chart("loss", [Line("high", "high", points)]))
    found = re.search(r'class="curve" d="([^"]+)"', chart)
    assert found
    return found[1]


def test_a_curve_falls_where_its_values_do_and_breaks_at_a_gap() -> None:
    path = path_of([(0, 5.0), (10, 4.0), (20, 3.0), (90, 2.0), (100, 1.0)])
    assert re.sub(r"[\d. ]+", "", path) == "MLLML"
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", path)[1:]]
    assert [x for x, _ in places] == [0, 100, 200, 900, 1000]
    heights = [y for _, y in places]
    assert heights == sorted(heights)
    assert 0 <= heights[0] < heights[-1] <= 1000


def test_long_curves_are_averaged_and_peaks_cut_off() -> None:
    points = [(step, 1.0) for step in range(1, 10_001)]
    assert path_of(points).count("L") == MOST_POINTS - 1
    peak = [*[(step, 1.0) for step in range(99)], (99, 500.0)]
    assert "The highest peak, 500, is cut off" in line_chart(
        Chart("norm", [Line("high", "high", peak)])
    )
    assert line_chart(Chart("nothing", [Line("high", "high", [])])) == ""


def test_cells_say_the_change_against_the_base(tmp_path: Path) -> None:
    maps = heldout_heat(read_record(make_run(tmp_path / "fox", samples=[], finished=False)))
    titles = [re.findall("<title>([^<]+)</title>", heat) for heat in maps]
    assert [len(cells) for cells in titles] == [2 * BINS] * 2
    # Bins are exp(-step / 100) + index at high; the upper edge of the noisiest one is sigma 1.
    assert titles[0][0] == f"step 50, σ 0.875 to 0.917: −39.35{THIN}%"
    assert titles[0][-1].endswith(f"to 1.000: −15.8{THIN}%")


def test_numbers_are_short() -> None:
    values = (0.123456, -1234.5, 123456.0, 1e-8, 0.0)
    assert [number(value) for value in values] == ["0.1235", "−1234", "123,456", "1e−08", "0"]
