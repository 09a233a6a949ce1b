"""What W&B would be sent, read back from the file of an offline run."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from PIL import Image

from tests.trackers import BASE, LOSS, config_of, figures_of, learner_of, no_account
from train.artifacts import adapter_artifact
from train.noise_panel import noise_panel
from train.preview_plan import Shot
from train.tracking import Tracker
from train.wandb_file import BLOCK, history, logged, records
from train.wandb_log import WandbLog, run_group
from wan.lora_format import ExportedFile

OFFLINE = "tracking.mode=offline"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_account(monkeypatch, tmp_path / "home")


def files_of(folder: Path) -> list[Path]:
    """W&B's files of all starts of a run, the first start first."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)


def sent(folder: Path, kind: str) -> list:
    found = [record for path in files_of(folder) for record in records(path)]
    return [getattr(record, kind) for record in found if record.HasField(kind)]


def steps_of(folder: Path) -> list[tuple[int, dict]]:
    return [found for path in files_of(folder) for found in history(path)]


def figures_sent(folder: Path) -> list[tuple[int, dict]]:
    """What was logged, without W&B's own clocks."""
    return [
        (step, {name: value for name, value in values.items() if name[0] != "_"})
        for step, values in steps_of(folder)
    ]


def test_a_pair_trained_one_by_one_is_one_group() -> None:
    high = config_of("experts=[high]", "name=a", "steps=100", "high.rank=4")
    low = config_of("experts=[low]", "name=b", "low.learning_rate=0.1")
    assert run_group(high) == run_group(low)
    assert run_group(high).startswith("tiny-data-")
    assert run_group(config_of("data.path=other/data")) != run_group(high)
    assert run_group(config_of("lora.kind=dora")) != run_group(high)
    assert run_group(config_of("tracking.group=mine")) == "mine"


def test_a_run_is_told_with_its_settings_and_its_group(tmp_path: Path) -> None:
    config = config_of(OFFLINE, "experts=[low]")
    Tracker(config, tmp_path, speaks=True).finish()
    (run,) = sent(tmp_path, "run")
    assert (run.project, run.run_group, run.job_type) == ("wan-lora", run_group(config), "low")
    assert list(run.tags) == ["tiny", "low"]
    settings = {update.key: update.value_json for update in run.config.update}
    assert '"rank":16' in settings["lora"]  # nested: runs can be searched by lora.rank
    lowest = {metric.glob_name: metric.summary.min for metric in sent(tmp_path, "metric")}
    assert lowest == {"heldout/*": True, "heldout_over_base/*": True}


def test_heat_maps_of_the_noise_bins_lie_beside_the_figures(tmp_path: Path) -> None:
    tracker = Tracker(config_of(OFFLINE, "tracking.floor=0.5"), tmp_path, speaks=True)
    low = learner_of("low")
    tracker.heldout(0, [BASE], [BASE])
    with tracker.phase("training"):
        pass
    tracker.trained(1, 2, low, figures_of([1.0], [0.25], 2.0))
    tracker.trained(2, 2, low, figures_of([3.0], [0.75], 2.0))
    tracker.finish()
    (zero, before), (two, after) = steps_of(tmp_path)
    assert (zero, two) == (0, 2)
    heat = {"_type": "histogram", "values": [4.0, 6.0], "bins": [0.0, 0.5, 1.0]}
    assert before["noise/heldout/low"] == heat
    assert before["heldout_over_base/low/loss"] == 0
    assert after["noise/train/low"]["values"] == pytest.approx([1.0, 3.0])
    seconds = 2 * after["time/step_s"]
    assert after["throughput/samples_per_s"] == pytest.approx(2 / seconds)
    assert after["throughput/megapixel_frames_per_s"] == pytest.approx(1 / seconds)
    assert after["throughput/mfu"] == pytest.approx(2 * 0.5 / seconds)


def test_a_panel_shows_the_change_by_noise_level_of_all_steps_so_far(tmp_path: Path) -> None:
    config = config_of(OFFLINE)
    tracker = Tracker(config, tmp_path, speaks=True)
    tracker.heldout(0, [BASE], [BASE])
    tracker.heldout(2, [LOSS], [BASE])
    saved = tracker.state()
    tracker.finish()
    again = Tracker(config, tmp_path, speaks=True, resumed=saved)
    again.heldout(4, [replace(LOSS, bins=[1.0, 9.0])], [BASE])
    again.finish()
    told = {step: values.get("noise/change/low") for step, values in steps_of(tmp_path)}
    assert told[0] is None
    media = told[4]
    assert isinstance(media, dict)
    assert media["_type"] == "html-file"
    page = (files_of(tmp_path)[1].parent / "files" / media["path"]).read_text()
    cells = re.findall(r"<td.*?>(.+?)</td>", page)
    assert cells == ["−50", "+50", "−50", "−75"]  # the noisier bin on top
    assert re.findall(r"<th>([^<]+)</th>", page)[-3:] == ["step", "2", "4"]


def test_a_panel_keeps_the_first_and_the_last_of_many_steps() -> None:
    history = [(step, {"heldout_over_base/low/bin_0": -0.1}) for step in range(100)]
    shown = re.findall(r"<th>([\d,]+)</th>", noise_panel("low", [0.0, 1.0], history))
    assert (shown[0], shown[-1], len(shown)) == ("1", "99", 16)
    assert noise_panel("high", [0.0, 1.0], history) == ""


def test_samples_are_playable_videos_with_their_strengths(tmp_path: Path) -> None:
    folder = tmp_path / "samples" / "step_000004"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "sheet.png")
    for name in ("grid", "adapters", "high_only", "low_only"):
        (folder / f"00_{name}.mp4").write_bytes(name.encode())
    tracker = Tracker(config_of(OFFLINE), tmp_path, speaks=True)
    shots, grid = [Shot("a ball", 7)], folder / "00_grid.mp4"
    tracker.samples(4, shots, [grid], folder / "sheet.png", "step_000000004")
    tracker.finish()
    ((step, values),) = steps_of(tmp_path)
    assert step == 4
    assert values["samples/00_grid"]["_type"] == "video-file"
    (path,) = files_of(tmp_path)[0].parent.glob("files/media/table/samples/table_*.table.json")
    table = wandb.Table.from_json(json.loads(path.read_text()), None)  # pyright: ignore[reportArgumentType]
    assert table.columns == [
        "step", "checkpoint", "prompt", "seed", "strength high", "strength low", "video",
        "beside the base",
    ]  # fmt: skip
    known = [4, "step_000000004", "a ball", 7]
    rows = [row[:6] for row in table.data]
    assert rows == [[*known, 1, 1], [*known, 1, 0], [*known, 0, 1]]


def test_alarms_reach_the_people_who_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(config_of(OFFLINE), tmp_path, speaks=True)
    low = learner_of("low")
    bad = replace(figures_of([1.0], [0.25], 2.0), problem="step 1: not finite")
    for low.bad_in_row in (1, 2):
        tracker.trained(low.bad_in_row, 9, low, bad)
    monkeypatch.setattr("train.tracking.STALL", 0.0)
    with tracker.phase("training"):
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()
    tracker.finish()
    alerts = [(alert.title, alert.text) for alert in sent(tmp_path, "alert")]
    assert alerts[0] == ("toy: NaN", "low expert, step 1: not finite")  # the first of a row alone
    assert [title for title, _ in alerts] == ["toy: NaN", "toy: stalled"]


def test_a_resumed_run_goes_on_and_logs_nothing_twice(tmp_path: Path) -> None:
    """Killed after step 3, of which W&B has a part, and saved after step 2; metrics have all."""
    config = config_of(OFFLINE)
    first = Tracker(config, tmp_path, speaks=True)
    for step in (1, 2):
        first.figures(step, {"a": step})
    saved = first.state()
    first.figures(3, {"a": 3})
    first.finish()
    again = Tracker(config, tmp_path, speaks=True, resumed=saved)
    again.figures(3, {"a": 3.5, "b": 1})
    again.figures(4, {"a": 4})
    again.finish()
    assert len(files_of(tmp_path)) == 2
    assert {run.run_id for run in sent(tmp_path, "run")} == {saved.wandb_id}
    got = [
        (step, {n: v for n, v in values.items() if n[0] != "_"})
        for step, values in steps_of(tmp_path)
    ]
    assert got == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3}), (3, {"b": 1}), (4, {"a": 4})]


def test_what_was_lost_in_a_killed_process_is_sent_after_all(tmp_path: Path) -> None:
    config = config_of(OFFLINE)
    first = Tracker(config, tmp_path, speaks=True)
    for step in range(1, 4):
        first.figures(step, {"a": step})
    saved = first.state()
    first.finish()
    (path,) = files_of(tmp_path)
    ends = [record.history.step.num for record in records(path) if record.HasField("history")]
    assert ends == [1, 2, 3]
    content, lost = path.read_bytes(), next(r for r in records(path) if r.history.step.num == 2)
    path.write_bytes(content[: content.index(lost.SerializeToString()) + 3])  # and a cut-off piece
    Tracker(config, tmp_path, speaks=True, resumed=saved).finish()
    assert [step for step, _ in steps_of(tmp_path)] == [1, 2, 3]


def test_a_file_is_read_across_its_blocks(tmp_path: Path) -> None:
    log = WandbLog(config_of(OFFLINE), tmp_path, None, lambda _: None)
    long = {f"figure_{index}": index for index in range(3 * BLOCK // 40)}
    for step in (1, 2):
        log.log(long, step)
    log.finish()
    assert log.run_id is not None
    found = logged(tmp_path, log.run_id)
    assert found.step == 2
    assert found.names >= long.keys()


def test_artifacts_have_a_lineage(tmp_path: Path) -> None:
    path = tmp_path / "toy_low_noise.safetensors"
    path.write_bytes(b"weights")
    log = WandbLog(config_of(OFFLINE), tmp_path, None, lambda _: None)
    data = wandb.Artifact("dataset-0123", "dataset")
    with data.new_file("report.txt") as file:
        file.write("3 clips\n")
    made = adapter_artifact("toy", {"low": ExportedFile(path, "5a", "A2", "A3", 7)}, [LOSS])
    log.used(data)
    log.made(made)
    log.finish()
    used, kept = sent(tmp_path, "artifact")
    assert (used.type, used.name, used.use_after_commit) == ("dataset", "dataset-0123", True)
    assert (kept.type, kept.name, kept.use_after_commit) == ("model", "toy", False)
    assert [entry.local_path for entry in kept.manifest.contents] == [str(path)]
    assert '"heldout/low/loss":2.5' in kept.metadata.replace(" ", "")
    assert '"low/autov2":"A2"' in kept.metadata.replace(" ", "")

    again = WandbLog(config_of(OFFLINE), tmp_path, log.run_id, lambda _: None)
    again.used(data)  # a draft as before
    again.finish()
    assert len(sent(tmp_path, "artifact")) == 2
