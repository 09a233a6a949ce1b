"""The dataset program: what is shown is what the model sees, and what is wrong is said."""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import Clip, ClipSettings, plan_clips
from data.files import FileFacts
from data.items import Dropped, Item, MediaInfo
from data.media import probe, read_clip
from tools.dataset import main
from tools.dataset_cards import Entry, duplicate_groups, entries_of, final_prompts, make_page
from tools.dataset_page import Page, PageItem
from tools.dataset_pictures import HEIGHT, Shot, add_round_trips, first_middle_last, take_shots
from tools.near_duplicates import LOOK_SIZE
from train.compose import compose
from train.config import Config
from train.dataset import Clips
from train.encode import as_video
from wan.checkpoints import ModelPaths, find_model, load_vae
from wan.latents import decode_latents, encode_video
from wan.variants import TINY_PATH, VARIANTS

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "datasets" / "demo" / "train"
SETTINGS = ClipSettings((64, 64), 13, 8, "resample", 16, 4, "head")
TINY = VARIANTS["tiny"]


def item_of(path: Path, *captions: str) -> Item:
    kind = "video" if path.suffix == ".mp4" else "image"
    return Item(path, captions or ("A zorbi rolling.",), kind, path.name)


def clips_of(item: Item, settings: ClipSettings = SETTINGS) -> list[Clip]:
    return plan_clips([item], [probe(item.path, item.kind, item.name)], settings).clips


def quiet(steps: Iterable[int], _: str) -> Iterable[int]:
    return steps


def noise_video(path: Path, frames: int, fps: float, size: tuple[int, int]) -> Path:
    height, width = size
    pixels = np.random.default_rng(frames).integers(0, 255, (frames, height, width, 3), np.uint8)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-threads", "1", str(path),
    ]  # fmt: skip
    subprocess.run(command, input=pixels.tobytes(), check=True)
    return path


@pytest.mark.parametrize("policy", ["resample", "keep"])
@pytest.mark.parametrize("extraction", ["head", "middle"])
@pytest.mark.parametrize("fps", [8, 11.7, 30])
def test_the_frames_shown_are_those_of_the_clip(
    policy: str, extraction: str, fps: float, tmp_path: Path
) -> None:
    item = item_of(noise_video(tmp_path / "a.mp4", 23, fps, (40, 56)))
    (clip,) = clips_of(item, replace(SETTINGS, frames=9, policy=policy, extraction=extraction))
    whole = read_clip(clip)
    last = len(whole) - 1
    assert torch.equal(first_middle_last(clip), whole[[0, last // 2, last]])


def test_an_image_is_one_frame_and_a_strip_is_small(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    (clip,) = clips_of(item_of(tmp_path / "a.png"))
    (shot,) = take_shots([clip], 0, quiet)
    with Image.open(io.BytesIO(shot.strips[0])) as strip:
        assert strip.size[1] == HEIGHT
        assert strip.size[0] / HEIGHT == pytest.approx(clip.bucket.width / clip.bucket.height, 0.02)
        assert np.asarray(strip.convert("RGB"))[5, 5, 0] > 245


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_decoded_is_a_problem_of_its_own(
    workers: int, tmp_path: Path
) -> None:
    good = clips_of(item_of(DEMO / "01_rolling.mp4"))[0]
    (tmp_path / "bad.mp4").write_text("no video")
    bad = replace(good, item=item_of(tmp_path / "bad.mp4"))
    shots = take_shots([good, bad, good], workers, quiet)
    assert [bool(shot.strips) for shot in shots] == [True, False, True]
    assert "bad.mp4" in shots[1].problem
    assert shots[0].strips == shots[2].strips
    assert shots[0].look @ shots[2].look == pytest.approx(1)


def test_the_round_trip_shows_and_measures_what_the_vae_keeps() -> None:
    vae = load_vae(find_model(ModelPaths(str(TINY_PATH)), "tiny"), torch.float32, "cpu")
    shots = take_shots(clips_of(item_of(DEMO / "01_rolling.mp4")), 0, quiet)
    ((shot,), (again,)) = (add_round_trips(shots, vae, workers, quiet) for workers in (0, 1))
    given, back = (np.asarray(Image.open(io.BytesIO(s)).convert("RGB"), int) for s in shot.strips)
    assert 0 < np.abs(given - back).mean() < 20
    frames = read_clip(shot.clip)
    pixels = decode_latents(vae, encode_video(vae, as_video(frames)))[0].permute(1, 2, 3, 0)
    error = ((pixels + 1) * 127.5 - frames).square().mean().item()
    assert shot.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert error < 0.03 * 255**2  # 15 dB
    assert again == replace(shot, look=again.look)


# --- cards


def shown(entry: Entry, looks: dict[str, np.ndarray]) -> Entry:
    look = looks.get(entry.item.name, np.zeros(LOOK_SIZE, np.float32))
    return replace(entry, shots=tuple(Shot(clip, (b"webp",), look) for clip in entry.clips[:2]))


def page_of(
    train: list[Item],
    infos: list[MediaInfo],
    settings: ClipSettings = SETTINGS,
    tokens: dict[str, int] | None = None,
    heldout: int = 0,
    overrides: tuple[str, ...] = (),
) -> Page:
    """The page of made-up items, the last `heldout` of them held out; nothing is opened."""
    plan = plan_clips(train, infos, settings)
    files = {
        item.path: FileFacts(f"digest of {item.path}", info, None, None)
        for item, info in zip(train, infos, strict=True)
    }
    side = {id(item) for item in train[len(train) - heldout :]}
    clips = Clips(
        [clip for clip in plan.clips if id(clip.item) not in side],
        [clip for clip in plan.clips if id(clip.item) in side],
        files,
        [Dropped("gone.mp4", "is empty")],
        plan.warnings,
    )
    looks = {"twin a": np.eye(LOOK_SIZE, dtype=np.float32)[0]}
    looks["twin b"] = looks["twin a"]
    entries = [shown(entry, looks) for entry in entries_of(clips)]
    return make_page(config(*overrides), TINY, clips, entries, tokens or {})


def config(*overrides: str) -> Config:
    return compose(["experiment=demo", *overrides])


def fact(card: PageItem, label: str) -> str:
    return dict(card.facts)[label]


VIDEO = MediaInfo(48, 24, 64, 64)


def named(name: str, **changes: object) -> Item:
    return replace(Item(Path(f"/{name}"), ("A zorbi.",), "video", name), **changes)


def test_a_card_says_how_its_item_is_used() -> None:
    wide = MediaInfo(48, 24, 90, 160)
    page = page_of([named("a", visits=2.0, loss_weight=0.5, mask=Path("/m/mask.png"))], [wide])
    card, gone = page.items
    assert fact(card, "source") == "48 frames at 24 fps, 90 × 160"
    assert fact(card, "used") == "13 frames at 8 fps from 0.00 s"
    assert fact(card, "shape") == "13x48x80"
    assert fact(card, "crop") == "6%"
    assert fact(card, "visits") == "2 in an epoch"
    assert fact(card, "loss") == "weighted 0.5"
    assert fact(card, "mask") == "mask.png"
    assert (gone.state, gone.reason) == ("dropped", "is empty")


def test_windows_of_one_item_are_on_one_card() -> None:
    settings = replace(SETTINGS, extraction="sliding", stride=1, frames=9)
    page = page_of([named("a"), named("b")], [VIDEO, VIDEO], settings)
    card = page.items[0]
    assert [window.used for window in card.windows] == [
        "9 frames at 8 fps from 0.00 s",
        "9 frames at 8 fps from 0.12 s",
    ]
    assert fact(card, "shown") == "2 of 8 windows"
    assert [(row.bucket, row.clips) for row in page.buckets] == [("9x64x64", 16)]


def test_warnings_of_captions() -> None:
    long = "A zorbi " + "very " * 20
    items = [
        named("long", captions=(long, "A ball.")),
        named("inside", captions=("Zorbis everywhere.",)),
        named("capital", captions=("ZORBI, rolling.",)),
        named("ordinary", captions=("A ball.",), regularisation=True),
    ]
    (clean, _) = final_prompts(items[0])
    page = page_of(items, [VIDEO] * 4, tokens={clean: 513, "A ball.": 512})
    warnings = [card.warnings for card in page.items[:4]]
    assert warnings == [
        (
            "a caption of 513 tokens: the model sees the first 512",
            "1 of its captions lack the trigger zorbi",
        ),
        ("its caption lacks the trigger zorbi",),
        (),
        (),
    ]
    assert [c.tokens for c in page.items[0].captions] == [513, 512]


def test_warnings_of_pictures_and_speed() -> None:
    tall = MediaInfo(48, 30, 30, 16)  # 16 x 16 of it fit
    settings = replace(SETTINGS, policy="keep")
    (card, _) = page_of([named("a")], [tall], settings).items
    assert card.warnings == (
        "47% of the picture is cropped away",
        "30 fps shown to the model as 8: motion is 3.75 times slower",
    )
    (card, _) = page_of([named("a")], [MediaInfo(48, 6, 64, 64)]).items
    assert card.warnings == ("6 fps: frames repeat to make 8",)


def test_a_duplicate_on_the_other_side_is_a_warning() -> None:
    items = [named("twin a"), named("other"), named("twin b")]
    page = page_of(items, [VIDEO] * 3, heldout=1)
    assert [(group.kind, group.names) for group in page.groups] == [
        ("2 look alike", ("twin a", "twin b"))
    ]
    assert [card.group for card in page.items] == [0, None, 0, None]
    first, _, last, _ = page.items
    assert first.warnings == (
        "twin b shows the same and is held out: the held-out loss is too good",
    )
    assert last.warnings == (
        "twin a shows the same and is trained on: the held-out loss is too good",
    )


def test_two_parts_of_a_film_are_no_duplicates() -> None:
    parts = [named("film", start=float(start), end=start + 1.0) for start in (0, 1, 0)]
    files = {Path("/film"): FileFacts("digest", VIDEO, None, None)}
    clips = plan_clips(parts, [VIDEO] * 3, SETTINGS).clips
    entries = entries_of(Clips(clips, [], files, [], []))
    groups = duplicate_groups([shown(entry, {}) for entry in entries], files)
    assert [(group.members, group.exact) for group in groups] == [((0, 2), True)]


def test_the_summary_counts_as_training_does() -> None:
    items = [named(f"{index}", visits=2.0 if index else 1.0) for index in range(5)]
    settings = replace(SETTINGS, scales=(1.0, 0.5))
    page = page_of(items, [VIDEO] * 5, settings, heldout=1, overrides=("accumulate=2",))
    summary = dict(page.summary)
    assert summary["trained on"] == "4"
    assert summary["in clips"] == "8"
    assert summary["held out"] == "1"
    assert summary["dropped"] == "1"
    batches = -(-7 // 4) * 2  # 7 visits of each of two shapes
    assert summary["batches of 4 in an epoch"] == str(batches)
    assert summary["steps in an epoch"] == "2"
    assert sum(row.batches for row in page.buckets) == batches


# --- the program


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips and an image of the demo, a copy, a broken file, and a name for terminals."""
    root = tmp_path_factory.mktemp("dataset")
    for name in ("01_rolling.mp4", "02_bouncing.mp4", "image_01.png"):
        shutil.copy(DEMO / name, root / name)
        shutil.copy((DEMO / name).with_suffix(".txt"), root)
    shutil.copy(DEMO / "01_rolling.mp4", root / "copy.mp4")
    (root / "copy.txt").write_text("A <b>ball</b> &amp; a zorbi\x1b[31m \u202e!")
    (root / "broken 🎈.mp4").write_bytes(b"")
    (root / "broken 🎈.txt").write_text("A zorbi.")
    return root


def test_the_program_prints_a_table_and_writes_a_page(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "deep" / "page.html"
    command = [
        "dataset", "experiment=demo", "--roundtrip", "--html", f"{page}",
        f"data.path={dataset}", "data.heldout_path=null", f"data.cache={tmp_path}",
        "data.workers=1", "data.frames=5", "~data.mix.world",
    ]  # fmt: skip
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    main()
    lines = capsys.readouterr().out.splitlines()
    (copy,) = [line for line in lines if line.endswith("  copy.mp4")]
    shape, crop, tokens, _ = copy.split()[-4:]
    assert (shape, crop) == ("5x64x64", "0%")
    assert int(tokens) > 5
    assert any(re.match(r"dropped +broken 🎈\.mp4: is empty \(0 bytes\)", line) for line in lines)
    assert any("2 are the same file: 01_rolling.mp4, copy.mp4" in line for line in lines)
    text = page.read_text()
    assert text.count("<article") == 5
    assert text.count('src="data:image/webp') == 2 * 4
    assert "dB after the VAE" in text
    assert "A &lt;b&gt;ball&lt;/b&gt; &amp; a zorbi" in text
    assert "http" not in text.replace("http-equiv", "")


def test_prompts_and_only(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings = [f"data.path={dataset}", "data.heldout_path=null", f"data.cache={tmp_path}"]
    options = ["--prompts", "experiment=demo", "--only", "copy", *settings, "data.workers=0"]
    monkeypatch.setattr(sys, "argv", ["dataset", *options, "data.prefix='zorbi: '"])
    main()
    assert capsys.readouterr().out == "copy.mp4: zorbi: A <b>ball</b> & a zorbi \\u202e!\n"


def test_a_wrong_setting_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["dataset", "experiment=demo", f"data.path={tmp_path}/no"])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: data.path={tmp_path}/no: ")
    assert said.count("\n") == 1


def test_without_a_model_all_but_tokens_is_shown(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.html"
    options = [f"data.path={dataset}", "data.heldout_path=null", f"data.cache={tmp_path}"]
    options += ["experiment=demo", "data.workers=0", f"model.path={tmp_path}/none"]
    monkeypatch.setattr(sys, "argv", ["dataset", *options, "--html", str(page), "--limit", "2"])
    main()
    said = capsys.readouterr()
    assert "tokens     are not counted: " in said.err
    assert "... and 1 more" in said.out  # the dropped file is always on the page
    text = page.read_text()
    assert text.count("<article") == 3
    assert " tokens</small>" not in text

    monkeypatch.setattr(sys, "argv", ["dataset", *options, "--roundtrip"])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_a_page_that_cannot_be_written_is_one_sentence(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    options = [f"data.path={dataset}", "data.heldout_path=null", f"data.cache={tmp_path}"]
    options += ["experiment=demo", "data.workers=0", "--html", f"{tmp_path}/file/page.html"]
    monkeypatch.setattr(sys, "argv", ["dataset", *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/file/page.html cannot be written (" in said
