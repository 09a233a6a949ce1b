"""The report as a browser shows it: charts, playing videos, a phone, hostile text, two runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import BINS, EVAL_EVERY, LOG_EVERY, RED_FOX, film, make_run

from tests.chromium import Tab, browser_tab, in_browser
from tools.report_page import write_page
from tools.report_runs import read_record
from train.video_files import write_mp4

pytestmark = in_browser
THIN = "\N{THIN SPACE}"
STEPS = 100
EVALUATIONS = 1 + STEPS // EVAL_EVERY
LOGGED = STEPS // LOG_EVERY
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&lt; \u202e\ud800"
TEXTS = """(selector) =>
  [...document.querySelectorAll(selector)].map((node) => node.textContent.trim())"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser_tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(autouse=True)
def quiet_page(tab: Tab) -> Iterator[None]:
    """No page may write to its console, nor ask for anything beside itself."""
    tab.console.clear()
    tab.requests.clear()
    yield
    assert not tab.console
    assert not [url for url in tab.requests if not url.startswith(("file:", "data:", "about:"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("outputs") / "fox", steps=STEPS)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report_on(run)


@pytest.fixture(scope="module")
def comparison(run: Path) -> str:
    other = make_run(
        run.parent / "owl", "optim.warmup_steps=7", "seed=5", steps=STEPS, samples=[100]
    )
    return report_on(run, other)


def report_on(*folders: Path) -> str:
    path = folders[0].parent / f"{len(folders)}_{folders[0].name}.html"
    write_page(path, [read_record(folder) for folder in folders])
    return path.as_uri()


def texts(tab: Tab, selector: str) -> list[str]:
    return tab.run(f"({TEXTS})({json.dumps(selector)})")


def count(tab: Tab, selector: str) -> int:
    return tab.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_the_charts_hold_all_figures(tab: Tab, page: str) -> None:
    tab.open(page)
    assert count(tab, "#heldout svg.plot circle") == 2 * EVALUATIONS
    assert count(tab, "#heldout path.band") == 2
    assert count(tab, "#noise rect.good, #noise rect.bad") == 2 * BINS * (EVALUATIONS - 1)
    assert count(tab, "#noise rect.amount") == BINS * LOGGED
    paths = tab.run(
        "[...document.querySelectorAll('#training path.curve')]"
        ".map((path) => path.getAttribute('d').match(/[ML]/g).length)"
    )
    assert paths == [LOGGED // 2] * 6 + [LOGGED]  # of each expert, and the time of a step
    titles = texts(tab, "#training figcaption")
    assert [title.split(",")[0] for title in titles] == [
        "Training loss", "Gradient norm before clipping", "Learning rate", "Time of a step",
    ]  # fmt: skip
    assert texts(tab, "#heldout .end") == [
        f"{expert} noise −63.2{THIN}%" for expert in ("high", "low")
    ]


def test_a_curve_is_where_its_figures_are(tab: Tab, page: str) -> None:
    tab.open(page)
    x, y, zero, end = tab.run(
        """(() => {
          const middle = (node) => (({ x, y, width, height }) => [x + width / 2, y + height / 2])
            (node.getBoundingClientRect());
          const plot = document.querySelector("#heldout svg.plot");
          const box = plot.getBoundingClientRect();
          const dot = middle(plot.querySelectorAll("circle.high")[1]);
          const tick = (words) => [...plot.querySelectorAll("text.side")]
            .filter((text) => text.textContent.startsWith(words)).map(middle)[0][1];
          return [(dot[0] - box.x) / box.width, (dot[1] - tick("0")) / (tick("−40") - tick("0")),
                  middle(plot.querySelector("line.zero"))[1] - tick("0"),
                  plot.querySelector("g.high .curve").getBoundingClientRect().bottom
                    - middle([...plot.querySelectorAll("circle.high")].at(-1))[1]];
        })()"""
    )
    assert x == pytest.approx(0.5, abs=0.01)  # step 50 of 100
    assert 40 * y == pytest.approx(39.3, abs=1.0)  # 1 - exp(-0.5), percent
    assert abs(zero) < 2
    assert abs(end) < 3  # the curve falls to where its last dot is


def test_the_pointer_shows_values(tab: Tab, page: str) -> None:
    tab.open(page)
    x, y = tab.run(
        "(({ x, y, width, height }) => [x + 0.52 * width, y + height / 2])"
        "(document.querySelector('#heldout svg.plot').getBoundingClientRect())"
    )
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.wait_for("!document.querySelector('#heldout .tip').hidden")
    assert texts(tab, "#heldout .tip > *") == [
        "step 50", f"high noise −39.35{THIN}%", f"low noise −39.35{THIN}%",
    ]  # fmt: skip
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y + 600)
    tab.wait_for("document.querySelector('#heldout .tip').hidden")


def test_videos_play_while_in_view_and_stop_at_a_click(tab: Tab, page: str) -> None:
    tab.open(page)
    assert texts(tab, "#samples h3 bdi") == [RED_FOX, "a wall"]
    assert texts(tab, "#samples h3 small") == ["seed 3"] * 2
    assert texts(tab, "#samples figcaption") == ["base model", "step 50", "step 100"] * 2
    assert "guidance high 4.0" in texts(tab, "#samples > .quiet")[0]
    tab.run("document.querySelector('#samples').scrollIntoView()")
    playing = "[...document.querySelectorAll('video')].every((v) => v.readyState >= 2 && "
    tab.wait_for(f"{playing}v.currentTime > 0.2)")
    tab.run("document.querySelector('video').click()")
    paused = "[...document.querySelectorAll('video')].map((video) => video.paused)"
    assert tab.run(paused) == [True] * 3 + [False] * 3
    tab.run("scrollTo(0, 0)")
    tab.wait_for("[...document.querySelectorAll('video')].every((video) => video.paused)")


def test_the_base_is_cut_from_its_comparison(tab: Tab, page: str, tmp_path: Path) -> None:
    tab.open(page, height=2400)
    tab.run("document.querySelector('#samples').scrollIntoView()")
    tab.wait_for("[...document.querySelectorAll('video')].every((v) => v.currentTime > 0.2)")
    places = tab.run(
        "[...document.querySelectorAll('#samples video')].slice(0, 3)"
        ".map((v) => v.getBoundingClientRect()).map((b) => [b.x + b.width / 2, b.y + 150])"
    )
    tab.screenshot(tmp_path / "shot.png")
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert [pixels[int(y), int(x)].argmax() for x, y in places] == [0, 1, 1]  # red, green, green


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_scrolling_sideways(
    dark: bool, tab: Tab, page: str, comparison: str, tmp_path: Path
) -> None:
    for address in (page, comparison):
        tab.open(address, width=390, height=800, dark=dark)
        assert tab.run("document.documentElement.scrollWidth") == 390
        assert tab.run("getComputedStyle(document.querySelector('.legend')).display") == "flex"
        tab.screenshot(tmp_path / "shot.png")
        with Image.open(tmp_path / "shot.png") as image:
            assert (np.asarray(image.convert("RGB"))[2, 2].mean() < 64) == dark


def test_the_settings_can_be_searched(tab: Tab, page: str) -> None:
    tab.open(page)
    tab.run(
        "document.querySelector('.search input').value = 'high RATE';"
        "document.querySelector('.search input').dispatchEvent(new Event('input'))"
    )
    shown = texts(tab, "#settings tr:not([hidden]) td:first-child")
    assert shown == ["high.learning_rate"]
    assert texts(tab, ".search output")[0].startswith("1 of ")
    assert "alice" not in tab.run("document.documentElement.outerHTML")


def test_two_runs_are_compared(tab: Tab, comparison: str) -> None:
    tab.open(comparison)
    assert texts(tab, "header td:first-child") == ["fox", "owl"]
    rows = tab.run(
        "[...document.querySelectorAll('#differences tr')].slice(1)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert rows == [["seed", "0", "5"], ["optim.warmup_steps", "20", "7"]]
    assert [title.rpartition(", ")[2] for title in texts(tab, "#heldout figcaption")] == [
        "high noise", "low noise",
    ]  # fmt: skip
    assert count(tab, "#heldout .line.c0") == count(tab, "#heldout .line.c1") == 2
    assert texts(tab, "#samples .films figcaption") == [
        "base model", "fox, step 100", "owl, step 100",
    ] * 2  # fmt: skip


def test_hostile_text_is_only_text(tab: Tab, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", samples=[50], finished=False).rename(tmp_path / "a <i>&")
    config = folder / "config.yaml"
    prompts = f"prompts: [{json.dumps(HOSTILE)}]\n  old:"
    config.write_text(
        config.read_text().replace("prompts:", prompts) + f"{json.dumps(HOSTILE)}: 1\n"
    )
    names = json.dumps({"dropped": [{"name": HOSTILE, "reason": HOSTILE}], "notes": [HOSTILE]})
    (folder / "dataset.json").write_text(names)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 100, f"alarm/{HOSTILE}": 1}) + "\n")
    tab.open(report_on(folder))
    assert tab.run("document.title") == "a <i>&"
    assert count(tab, "script") == 1
    assert count(tab, "img, i") == 0
    assert HOSTILE[:30] in texts(tab, "#samples h3")[0]
    assert HOSTILE[:30] in texts(tab, ".alarm")[0]
    assert HOSTILE[:30] in "".join(texts(tab, "#data li"))


def test_a_sweep_is_a_grid(tab: Tab, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", samples=[], finished=False)
    home = folder / "evaluation" / "step_100"
    entries = []
    for place, (high, low) in enumerate([(0.4, 0.4), (0.4, 1.2), (1.2, 0.4)]):
        write_mp4(home / f"{place}.mp4", film((40 * place, 90, 90)), 8)
        strengths = {"high": high, "low": low}
        entry = {"strengths": strengths, "prompt": "a fox", "seed": 1, "file": f"{place}.mp4"}
        entries.append(entry)
    (home / "sweep.json").write_text(json.dumps(entries))
    tab.open(report_on(folder))
    assert texts(tab, "#sweep-0 h3 bdi") == ["a fox"]
    assert texts(tab, "#sweep-0 th") == ["", "low 0.4", "low 1.2", "high 0.4", "high 1.2"]
    cells = "[...document.querySelectorAll('#sweep-0 td')].map((cell) => cell.children.length)"
    assert tab.run(cells) == [1, 1, 1, 0]
