"""What is read from the folder of a run: of any state, also a damaged or a hostile one."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import BINS, LOG_EVERY, film, history, make_run

from tools import report
from tools.report_privacy import shown, shown_setting
from tools.report_runs import read_record
from tools.report_tables import best_step, change, environment, files, state
from train.rules import ConfigError
from train.video_files import write_mp4


def test_a_finished_run(tmp_path: Path) -> None:
    record = read_record(make_run(tmp_path / "fox", steps=100))
    assert record.experts == ["high", "low"]
    assert (record.step, record.planned_steps, record.seconds) == (100, 100, 10.0)
    assert state(record) == "finished, 100 steps"
    assert record.phases["training"] == 80
    assert [len(record.edges[expert]) for expert in record.experts] == [BINS + 1] * 2
    assert record.edges["low"][-1] == record.edges["high"][0] == 0.875
    assert list(record.samples) == [50, 100]
    assert change(record, "high") == pytest.approx((-63.2, 2.0), abs=0.05)
    assert best_step(record, "high") == 100
    for export in record.exports:
        assert export.hashes
        assert export.hashes.sha256 in files([record])


def test_a_package_is_told_once_and_a_checkpoint_knows_best(tmp_path: Path) -> None:
    record = read_record(make_run(tmp_path / "fox", steps=100))
    metadata = {"wan_lora.torch_version": "1.1", "wan_lora.peft_version": "2.2"}
    exports = [replace(export, metadata=metadata) for export in record.exports]
    page = environment([replace(record, exports=exports, versions={"torch": "9.9"})])
    assert [page.lower().count(word) for word in ("torch", "9.9", "1.1", "2.2")] == [1, 1, 0, 1]


def test_settings_of_an_expert_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", steps=100)
    with (folder / "config.yaml").open("a") as file:
        file.write("\nsingle:\n  rank: 777\n")
    settings = read_record(folder).settings
    assert "single.rank" not in settings
    assert {"high.steps", "low.steps"} <= settings.keys()


def test_a_run_that_was_killed_while_it_wrote(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", steps=100, finished=False)
    lines = history(100)
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][: len(lines[4]) // 2]]))
    (folder / "fox_high_noise.safetensors").write_bytes(b"half")
    (folder / "samples" / "step_000100" / "00_adapters.mp4").write_bytes(b"half")
    record = read_record(folder)
    assert record.step == 3 * LOG_EVERY
    assert state(record).startswith("not finished: step 30 of 100, last figures 20")
    assert "cannot be read" in files([record])
    report_of(folder)
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", samples=[], finished=False)
    (folder / "metrics.jsonl").unlink()
    report_of(folder)
    assert "not finished: step 0 of 100" in (folder / "report.html").read_text()


def test_steps_that_were_done_anew_count_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", finished=False)
    lines = [
        {"step": step, "seconds": seconds, "time/step_s": value}
        for step, seconds, value in [(10, 5, 1.0), (20, 9, 2.0), (20, 3, 3.0), (30, 6, 4.0)]
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = read_record(folder)
    assert record.figures["time/step_s"] == [(10, 1.0), (20, 3.0), (30, 4.0)]
    assert record.seconds == 9 + 6


def test_what_is_no_figure_is_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", finished=False)
    (folder / "metrics.jsonl").write_text(
        '[1]\n{"step": "x", "a": 1}\n{"step": 5, "new/key": 2, "text": "x", "gone": NaN}\n\xff\n'
    )
    (folder / "summary.json").write_text('{"seconds": [1], "heldout_base": 3')
    record = read_record(folder)
    assert record.figures == {"new/key": [(5, 2.0)]}
    assert not record.finished
    report_of(folder)


def test_a_sweep_cannot_reach_beyond_its_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", samples=[], finished=False)
    home = folder / "evaluation"
    write_mp4(tmp_path / "private.mp4", film((1, 2, 3)), 8)
    write_mp4(home / "own.mp4", film((1, 2, 3)), 8)
    (home / "link.mp4").symlink_to(tmp_path / "private.mp4")
    names = ["own.mp4", "../../private.mp4", str(tmp_path / "private.mp4"), "link.mp4", "none.mp4"]
    rows = [{"strengths": {"high": 1}, "prompt": "a", "seed": 0, "file": name} for name in names]
    (home / "sweep.json").write_text(json.dumps([*rows, 7, {"seed": "x"}]))
    assert [entry.file.name for entry in read_record(folder).sweep] == ["own.mp4"]


def test_checkpoints_are_found_by_their_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", steps=100, finished=False)
    later = folder / "checkpoints" / "step_000000100"
    later.mkdir(parents=True)
    (folder / "checkpoints" / "fox_000000050_low_noise.safetensors").write_bytes(b"")
    for name in ("fox_000000100_high_noise", "fox_000000100_low_noise", "state_high"):
        (later / f"{name}.safetensors").write_bytes(b"")
    state = {"versions": {"torch": "9.9"}, "best": 100, "tracker": {"seconds": {"saving": 2.0}}}
    (later / "state.json").write_text(json.dumps(state))
    record = read_record(folder)
    assert {step: len(names) for step, names in record.checkpoints.items()} == {50: 1, 100: 2}
    assert (record.best, record.versions, record.phases) == (100, {"torch": "9.9"}, {"saving": 2})
    assert "Best of both together: step 100: <bdi>checkpoints/step_000000100/" in files([record])
    assert "9.9" in environment([record])
    assert "step 100 (−63.2 ± 2.0\N{THIN SPACE}%): <bdi>checkpoints/step_000000100" in files(
        [record]
    )


@pytest.mark.parametrize("settings", [None, "- 1\n", "a: [\n"])
def test_what_is_no_run_is_told_in_a_sentence(
    settings: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nothing"
    if settings:
        folder.mkdir()
        (folder / "config.yaml").write_text(settings)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_record(folder)
    with pytest.raises(SystemExit, match="2"):
        report_of(folder)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_where_the_page_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, samples=[]) for name in ("fox", "owl")]
    report_of(*runs)
    assert (tmp_path / "report_compare.html").is_file()
    report_of(runs[0], "--to", tmp_path / "sub" / "page.html")
    assert f"report     {tmp_path}/sub/page.html (0." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        report_of(runs[0], "--to", tmp_path / "fox" / "config.yaml" / "page.html")
    assert "Set --to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/home/alice/my clips", "…/my clips"),
        ("~/clips/", "…/clips"),
        ("C:\\Users\\alice\\clips", "…/clips"),
        ("a.mp4 in /home/alice/x/y.mp4: is empty", "a.mp4 in …/y.mp4: is empty"),
        ("datasets/demo/train", "datasets/demo/train"),
        ("https://alice:secret@host/x", "https://(hidden)@host/x"),
        ("a fox and/or an owl, 3/4 of it", "a fox and/or an owl, 3/4 of it"),
        (f"token hf_{'a' * 30}", "token (hidden)"),
    ],
)
def test_a_report_keeps_private_things(text: str, said: str) -> None:
    assert shown(text) == said


def test_settings_are_written_on_one_line() -> None:
    assert shown_setting("tracking.api_key", "abc") == "(hidden)"
    assert shown_setting("model.tokenizer", None) == "null"
    assert shown_setting("preview.images", ["/home/alice/a.png"]) == '["…/a.png"]'
    assert shown_setting("data.prefix", "") == '""'


def report_of(*arguments: object) -> None:
    before = sys.argv
    sys.argv = ["report", *map(str, arguments)]
    try:
        report.main()
    finally:
        sys.argv = before
