"""The plan of a run: from headers alone, right where it can be counted, and honest where not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.full_size_models import full_size_model
from tests.toy_runs import make_image, make_video, silent
from tools import plan as program
from train import machine, plan, plan_lines
from train.compose import compose
from train.out_of_memory import Moment, changes, need_of, out_of_memory
from train.run import Checked
from wan import cards
from wan.cards import CARDS, H200
from wan.footprint import GIB, Load
from wan.speed_choices import Keep
from wan.variants import A14B, VARIANTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-size model without bytes, and videos and images for it."""
    place = tmp_path_factory.mktemp("plan")
    full_size_model(place / "model", VARIANTS["t2v_a14b"])
    for number in range(3):
        make_video(place / "data" / f"{number}.mp4", 25 + number, "A clip.", (64, 96))
        make_image(place / "data" / f"image_{number}.png", number, "An image.", (64, 96))
    return place


def settings(folder: Path, *overrides: str) -> list[str]:
    return [
        "name=mira", "model=t2v_a14b", f"model.path={folder}/model", f"data.path={folder}/data",
        f"data.cache={folder}/cache", "data.workers=0", "data.upscale=true",
        "data.height=480", "data.width=832", f"output_dir={folder}/out",
        "preview.prompts=['A clip.']", *overrides,
    ]  # fmt: skip


def checked(folder: Path, *overrides: str) -> Checked:
    return plan.look_up(compose(settings(folder, *overrides)), silent)


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    program.main(settings(folder, *overrides))
    return capsys.readouterr().out


def test_the_program_tells_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, folder, "--gpu", "h200", "--hourly-rate", "3.5")
    for part in (
        "14,288,491,584 numbers in bf16",
        "entries of latents are missing",
        "versions   torch",
        "account for",
        "checkpoints: up to",
        "memory     caching",
        "memory     training",
        "memory     sampling",
        "4,000 steps of high and low",
        "$",
        "take       speed=fp8, the fastest that fits; of those that round no weight, speed=",
    ):
        assert part in said, part
    assert not (folder / "out").exists()


def test_it_says_when_none_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, folder, "batch_size=16", "--gpu", "4090")
    assert "take       none fits: speed=stream needs least" in said
    assert "DOES NOT FIT" in said


def test_without_a_gpu_it_asks_for_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose one with --gpu" in shown(capsys, folder)


def test_a_preset_that_fits_is_within_the_card(folder: Path) -> None:
    inputs = checked(folder)
    for card in (CARDS[name] for name in ("h200", "l40s", "3090")):
        found = plan.choices(inputs, card)
        usable = plan.setting_of(inputs, card).usable
        assert all(choice.fits == (choice.peak <= usable) for choice in found)
        fitting = [choice.seconds for choice in found if choice.fits]
        assert fitting == sorted(fitting)
        assert [choice.fits for choice in found] == sorted((c.fits for c in found), reverse=True)


def test_time_grows_with_what_is_done(folder: Path) -> None:
    def hours(*overrides: str) -> plan.Hours:
        inputs = checked(folder, *overrides)
        return plan.hours(plan.setting_of(inputs, H200), inputs)

    once = hours()
    assert hours("steps=4000").training == pytest.approx(2 * once.training)
    assert hours("accumulate=3").training == pytest.approx(3 * once.training)
    assert hours("experts=[low]").training == pytest.approx(once.training / 2)
    assert hours("preview.prompts=[]").sampling == 0
    assert hours("preview.every=0").sampling == pytest.approx(once.sampling * 2 / 9)
    assert hours("speed=resident").swapping == 0 < once.swapping


def test_hours_and_dollars_add_up_for_the_pair(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """High's steps and low's at the time of a step, the mean over clips, and all of it paid."""
    inputs = checked(folder, "low.steps=1000", "accumulate=2")
    setting = plan.setting_of(inputs, H200)
    works = {w.bucket: w for w in plan.training(setting, plan.buckets_of(inputs.clips.train))}
    clips = inputs.clips.train
    step = sum(works[clip.bucket].seconds for clip in clips) / len(clips)
    spent = plan.hours(setting, inputs)
    assert spent.training == pytest.approx((2000 + 1000) * 2 * step / 3600)
    said = shown(
        capsys, folder, "low.steps=1000", "accumulate=2", "--gpu", "h200", "--hourly-rate", "3.5"
    )
    total, dollars = re.findall(r"3,000 steps of high and low: (\S+) hours, \$(\S+) at", said)[0]
    parts = [spent.training, spent.sampling, spent.measuring, spent.caching, spent.swapping]
    assert float(total) == pytest.approx(sum(parts), abs=0.05)
    assert float(dollars.replace(",", "")) == pytest.approx(3.5 * sum(parts), abs=0.006)
    shares = re.findall(r"(training|samples|held-out loss|swaps|encoding) (\d+)%", said)
    assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=2)  # each is rounded
    assert int(dict(shares)["samples"]) == round(100 * spent.sampling / sum(parts))


def keep(attention: int, products: int, everything: int = 0) -> tuple[Keep, ...]:
    counts: dict[Keep, int] = {
        "attention": attention,
        "products": products,
        "everything": everything,
    }
    return tuple(kind for kind, count in counts.items() for _ in range(count))


@pytest.mark.parametrize(
    ("load", "kept", "measured"),
    [
        (Load(A14B, 32_760, 1, 16), keep(40, 0), 9.86),
        (Load(A14B, 32_760, 1, 16), keep(18, 22), 9.31),
        (Load(A14B, 32_760, 1, 16, "fp8"), keep(14, 26), 8.27),
        (Load(A14B, 4096, 1, 16), keep(0, 0, 40), 0.488),
        (Load(A14B, 4096, 1, 16), keep(0, 0, 40), 0.526),
        (Load(A14B, 4096, 1, 16, "fp8"), keep(0, 0, 40), 0.370),
        (Load(A14B, 1024, 1, 16), keep(0, 0, 40), 0.122),
        (Load(A14B, 32_760, 1, 16, compiled=False), ("nothing",) * 40, 14.47),
    ],
)
def test_steps_take_as_long_as_on_the_h200(
    load: Load, kept: tuple[Keep, ...], measured: float
) -> None:
    """Those of `docs/performance.md`; of the picture the extremes of several calls."""
    assert cards.step_seconds(load, kept, H200) == pytest.approx(measured, rel=0.1)


def test_gpus_that_share_a_clip_divide_its_time(folder: Path) -> None:
    inputs = checked(folder, "speed.context=4", "speed.keep=attention")
    alone = checked(folder, "speed.keep=attention")
    shared, once = (
        plan.training(plan.setting_of(found, H200), [plan.largest_bucket(found)])[0]
        for found in (inputs, alone)
    )
    assert shared.seconds == pytest.approx(once.seconds / 4, rel=0.05)  # each has all of the text
    assert shared.peak < once.peak
    assert "each clip shared by 4 GPUs" in plan_lines.on_card(inputs, H200)


def test_a_card_is_known_by_what_its_driver_calls_it() -> None:
    known = {
        "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "4090", "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    }  # fmt: skip
    for driver, name in known.items():
        found = cards.card_of(driver, 40 * GIB)
        assert found is not None, driver
        assert (found.bf16, found.gib) == (CARDS[name].bf16, 40)
    assert cards.card_of("Tesla T4", GIB) is None


def test_what_does_not_fit_on_the_disk_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = checked(folder)
    assert not any("NOT ENOUGH" in line for line in machine.disk(inputs))
    rank = checked(folder, "lora.rank=1024", "checkpoint.keep=1000")
    assert "NOT ENOUGH" in machine.disk(rank)[1]
    numbers = 2 * cards.adapter_numbers(A14B, 16)
    assert numbers == 2 * 76_677_120  # wan22.md section 8.2: 76.7 M
    assert machine.checkpoint_bytes(inputs) == numbers * 14
    monkeypatch.setattr(machine, "KNOWN_BAD", {("torch", torch.__version__[:3]): "do not"})
    assert any("do not" in line for line in machine.versions())


PLACED = ["speed.placement=stream", "model.dtype=bfloat16", "speed.frozen=fp8"]


@pytest.mark.parametrize(
    ("phase", "remedies"),
    [
        ("training", ["speed.inputs=host", "speed.keep=attention", "speed.keep=nothing",
                      "speed.keep=host", "accumulate=2", *PLACED, "data.frames=25",
                      "data.width=624"]),
        ("measuring", ["accumulate=2", *PLACED, "data.frames=25", "data.width=624"]),
        ("loading", PLACED),
        ("encoding", ["data.vae_dtype=bfloat16", "data.frames=25", "data.width=624"]),
    ],
)  # fmt: skip
def test_full_memory_has_the_remedies_of_its_phase_in_order(
    folder: Path, phase: str, remedies: list[str]
) -> None:
    config = compose(settings(folder, "batch_size=2", "model.dtype=float32"))
    config.model.dtype = "bfloat16" if phase == "encoding" else "float32"  # UMT5 would be most
    message = str(out_of_memory(config, CPU, Moment(phase)))
    assert re.findall(r"(\S+=\S+) saves [\d.]+ GiB", message) == remedies


def test_a_remedy_saves_what_it_says(folder: Path) -> None:
    inputs = checked(folder, "speed=resident", "speed.keep=attention")
    need = need_of(inputs, plan.setting_of(inputs, H200), Moment("training"))
    saved = {change: need.peak - changed.peak for change, changed in changes(need)}
    now, then = (
        plan.training(plan.setting_of(looked_up, H200), [need.bucket])[0].peak
        for looked_up in (inputs, checked(folder, "speed=swap", "speed.keep=attention"))
    )
    assert saved["speed.placement=swap"] == pytest.approx(now - then)
    assert saved["speed.keep=host"] > saved["speed.keep=nothing"] > 0


@pytest.mark.parametrize(
    ("keep", "change"),
    [("attention", "speed.inputs=host"), ("auto", "speed.keep=attention speed.inputs=host")],
)
def test_room_that_auto_would_fill_again_is_no_remedy(folder: Path, keep: str, change: str) -> None:
    inputs = checked(folder, f"speed.keep={keep}")
    need = need_of(inputs, plan.setting_of(inputs, H200), Moment("training"))
    need = replace(need, keep=("attention", *need.keep[1:]))  # as on a card that is short of room
    assert [told for told, _ in changes(need) if "speed.inputs" in told] == [change]


def test_the_first_screen_is_about_the_disk_where_no_card_is_known(folder: Path) -> None:
    lines = plan_lines.first_screen(checked(folder), CPU)
    assert [line.split()[0] for line in lines] == ["disk", "disk"]
