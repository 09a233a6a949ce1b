"""I2V-A14B and TI2V-5B at toy size: what they are given enters, and whole runs of both."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor

from data.batches import Batch, Draws, load_batch
from data.buckets import Bucket, Clip
from data.media import read_clip
from tests import toy_runs
from tests.media_files import make_item
from tests.toy_runs import CPU, batch_of, encoded, make_image, make_video, planned, start
from train.config import Config, PreviewConfig
from train.encode import EncodedDataset, as_video
from train.lora import train
from train.preview import render
from train.preview_plan import plan_previews
from train.step import NoiseDraw, velocity_error
from wan.checkpoints import Model, ModelPaths, find_model, load_transformer, load_vae
from wan.conditioning import first_frame_latents, image_condition
from wan.experts import load_experts
from wan.latents import decode_latents
from wan.variants import variant

I2V, TI2V = variant("i2v_a14b"), variant("ti2v_5b")
SIGMA = 0.625


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, and two images to start previews from."""
    path = tmp_path_factory.mktemp("image_to_video")
    for frames in (9, 10, 11):
        make_video(path / "data" / f"{frames}.mp4", frames, f"a video {frames}", (32, 64))
    for seed, name in enumerate(("start.png", "other.png")):
        make_image(path / name, seed, "", (48, 40))  # of another shape
    return path


def config_of(home: Path, name: str, model: Path, *overrides: str) -> Config:
    return toy_runs.config_of(
        home / "data", model, f"model={name}", f"model.path={model}", "model.dtype=float32",
        "data.width=64", "data.frames=9", "data.heldout_fraction=0.3", *overrides,
    )  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def noise_of(latents: Tensor, seed: int = 1) -> NoiseDraw:
    return NoiseDraw(torch.full((len(latents),), SIGMA), random(*latents.shape, seed=seed))


@pytest.fixture(scope="module")
def i2v(toy_i2v_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_i2v_model)), "i2v_a14b")


@pytest.fixture(scope="module")
def ti2v(toy_ti2v_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_ti2v_model)), "ti2v_5b")


@pytest.fixture(scope="module")
def i2v_net(i2v: Model) -> WanTransformer3DModel:
    return load_transformer(i2v, "high", torch.float32, CPU)


@pytest.fixture(scope="module")
def ti2v_net(ti2v: Model) -> WanTransformer3DModel:
    net = load_transformer(ti2v, "single", torch.float32, CPU)
    net.condition_embedder.time_proj.weight.mul_(30)  # as in a trained one, time has a say
    return net


def i2v_batch(last: bool = False) -> Batch:
    batch = batch_of(random(2, 16, 3, 4, 8), [random(4, 32), random(6, 32)])
    given = torch.tensor([False, last])
    return replace(batch, condition=random(2, 16, 3, 4, 8, seed=9), last_given=given)


def ti2v_batch(given: list[bool], frames: int = 3) -> Batch:
    batch = batch_of(random(2, 48, frames, 2, 4), [random(4, 32), random(6, 32)])
    return replace(batch, first_given=torch.tensor(given))


@torch.no_grad()
def errors_by_hand(
    net: WanTransformer3DModel, batch: Batch, x: Tensor, timestep: Tensor, noise: Tensor
) -> Tensor:
    """Squared error (B, F) of each latent frame, by the library's own forward pass."""
    text = torch.stack([torch.cat([t, torch.zeros(512 - len(t), 32)]) for t in batch.text])
    predicted = net(x, timestep, text).sample
    return (predicted - (noise - batch.latents)).square().mean(dim=(1, 3, 4))


def noisy(batch: Batch, noise: Tensor) -> Tensor:
    return (1 - SIGMA) * batch.latents + SIGMA * noise


@pytest.mark.parametrize("last", [False, True])
def test_i2v_gets_the_mask_and_the_frames_beside_the_noise(
    i2v_net: WanTransformer3DModel, last: bool
) -> None:
    """As the official code builds its 36 channels (wan22.md section 4.2)."""
    batch = i2v_batch(last)
    draw = noise_of(batch.latents)
    mask = torch.zeros(2, 4, 3, 4, 8)
    mask[:, :, 0] = 1
    mask[1, 3, 2] = float(last)  # only in the sample whose last frame is given
    assert batch.condition is not None
    x = torch.cat([noisy(batch, draw.noise), mask, batch.condition], dim=1)
    expected = errors_by_hand(i2v_net, batch, x, torch.full((2,), 1000 * SIGMA), draw.noise)
    error = velocity_error(i2v_net, batch, draw, I2V)
    assert torch.allclose(error, expected.mean(dim=1), rtol=1e-4)


def test_the_condition_of_i2v_changes_its_prediction(i2v_net: WanTransformer3DModel) -> None:
    batch = i2v_batch()
    assert batch.condition is not None
    other = batch.condition.clone()
    other[0, :, 0] += 1  # another first frame in the first sample
    draw = noise_of(batch.latents)
    before, after = (
        velocity_error(i2v_net, each, draw, I2V)
        for each in (batch, replace(batch, condition=other))
    )
    assert abs(after[0] / before[0] - 1) > 1e-3
    assert after[1] == before[1]


def test_a_given_first_frame_is_clean_at_timestep_0_and_not_in_the_loss(
    ti2v_net: WanTransformer3DModel,
) -> None:
    """As the official code samples: a timestep for each token, 0 in the first frame."""
    batch = ti2v_batch([True, True])
    draw = noise_of(batch.latents)
    x = noisy(batch, draw.noise)
    x[:, :, 0] = batch.latents[:, :, 0]
    timestep = torch.full((2, 6), 1000 * SIGMA)  # 3 frames of 1 x 2 tokens
    timestep[:, :2] = 0
    expected = errors_by_hand(ti2v_net, batch, x, timestep, draw.noise)[:, 1:].mean(dim=1)
    error = velocity_error(ti2v_net, batch, draw, TI2V)
    assert torch.allclose(error, expected, rtol=1e-4)


def test_the_target_of_a_given_frame_has_no_say(ti2v_net: WanTransformer3DModel) -> None:
    batch = ti2v_batch([True, False])
    draw = noise_of(batch.latents)
    other = draw.noise.clone()
    other[:, :, 0] += 2  # the first frame's target, and its noise where it is not given
    before, after = (
        velocity_error(ti2v_net, batch, NoiseDraw(draw.sigma, noise), TI2V)
        for noise in (draw.noise, other)
    )
    assert after[0] == before[0]
    assert abs(after[1] / before[1] - 1) > 0.1


def test_a_given_frame_enters_the_prediction(ti2v_net: WanTransformer3DModel) -> None:
    batch = ti2v_batch([True, True])
    draw = noise_of(batch.latents)
    other = batch.latents.clone()
    other[0, :, 0] += 1
    before, after = (
        velocity_error(ti2v_net, each, draw, TI2V)
        for each in (batch, replace(batch, latents=other))
    )
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_text_and_image_samples_share_a_batch(ti2v_net: WanTransformer3DModel) -> None:
    plain, given, mixed = (
        velocity_error(ti2v_net, batch, noise_of(batch.latents), TI2V)
        for batch in map(ti2v_batch, ([False, False], [True, True], [True, False]))
    )
    assert torch.allclose(mixed, torch.stack([given[0], plain[1]]), rtol=1e-5)
    assert not torch.allclose(plain, given, rtol=1e-3)


def test_an_image_alone_is_always_learned(ti2v_net: WanTransformer3DModel) -> None:
    """A clip of one frame would have nothing left to learn if that frame were given."""
    given, plain = ti2v_batch([True, True], frames=1), ti2v_batch([False, False], frames=1)
    draw = noise_of(plain.latents)
    errors = [velocity_error(ti2v_net, batch, draw, TI2V) for batch in (given, plain)]
    assert torch.allclose(*errors, rtol=1e-5)
    assert errors[0].min() > 0.1


def test_a_mask_that_leaves_only_the_given_frame_gives_no_error(
    ti2v_net: WanTransformer3DModel,
) -> None:
    first = torch.zeros(2, 3, 2, 4)
    first[:, 0] = 1
    batch = replace(ti2v_batch([True, False]), mask=first)
    error = velocity_error(ti2v_net, batch, noise_of(batch.latents), TI2V)
    assert error[0] == 0
    assert error[1] > 0.1


@pytest.fixture(scope="module")
def i2v_data(home: Path, toy_i2v_model: Path) -> tuple[Config, EncodedDataset]:
    config = config_of(home, "i2v_a14b", toy_i2v_model, "condition.last_frame=0.5")
    return config, encoded(config)


def test_conditions_are_those_of_the_frames_of_each_clip(
    i2v: Model, i2v_data: tuple[Config, EncodedDataset]
) -> None:
    config, dataset = i2v_data
    vae = load_vae(i2v, torch.float32, CPU)
    for index, clip in enumerate(planned(config).train):
        video = as_video(read_clip(clip))  # (1, 3, T, H, W)
        for share, last in ((0.0, None), (1.0, video[:, :, -1])):
            batch = load_batch(dataset.train, [index], Draws(0, last_frame=share), 0)
            assert batch.condition is not None
            expected = image_condition(vae, video[:, :, 0], last, clip.bucket.frames)
            assert torch.allclose(batch.condition, expected, atol=1e-5)
            assert batch.condition.shape == batch.latents.shape
            assert batch.last_given.tolist() == [last is not None]


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_ti2v_learns_from_text_from_images_or_from_both(
    home: Path, toy_ti2v_model: Path, ti2v: Model, share: float
) -> None:
    """In each step the frames that are given are clean, and the share of them is as configured."""
    config = config_of(
        home, "ti2v_5b", toy_ti2v_model, f"condition.first_frame={share}", "optim.warmup_steps=0",
        "steps=40", "batch_size=2", "data.caption_dropout=0",
    )  # fmt: skip
    dataset = encoded(config)
    training = start(config, ti2v, dataset, "single")
    before = training.adapter()
    rows: list[int] = []
    embedder = training.experts["single"].condition_embedder.time_embedder
    hook = embedder.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    for step in range(12):
        assert math.isfinite(training.step(step).loss)
    hook.remove()
    if share == 0.5:  # 12 batches of 2 samples: nearly all of them hold a given frame, or both
        assert {1, 2} == set(rows)
    else:
        assert set(rows) == {1 if share == 0 else 2}
    assert any(not torch.equal(before[name], tensor) for name, tensor in training.adapter().items())


def whole_run(home: Path, folder: Path, name: str, model: Path, *overrides: str) -> dict:
    """Two steps of each expert through the whole program; its summary."""
    train(
        config_of(
            home, name, model, f"output_dir={folder / 'out'}", "steps=2", "turn_steps=1",
            "batch_size=2", "optim.warmup_steps=0", "optim.learning_rate=0.01", "eval.bins=1",
            "eval.draws=2", "preview.prompts=[a fox, a ball]", "preview.steps=2",
            "preview.frames=5", "preview.height=32", "preview.width=64",
            "preview.negative_prompt=bad", "tracking.mode=disabled", "tracking.log_every=1",
            "export.dtype=float32", *overrides,
        )
    )  # fmt: skip
    return json.loads((folder / "out" / "summary.json").read_text())


def check_run(folder: Path, summary: dict, names: dict[str, str]) -> None:
    """Everything that a run promises is there, for each expert and its file."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for expert, name in names.items():
        losses = [line[key] for line in lines if (key := f"train/{expert}/loss") in line]
        assert len(losses) == 2
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)
        base, trained = (
            summary[key][expert]["mean"] for key in ("heldout_base", "heldout_adapters")
        )
        assert math.isfinite(base)
        assert base != trained
        assert summary["reload_error"][expert] < 1e-3
        with safe_open(folder / name, "pt") as file:
            assert len(list(file.keys())) == 2 * 2 * 10  # A and B of ten linears of two blocks
    (sheet,) = (folder / "samples").rglob("sheet.png")
    assert len(list(sheet.parent.glob("*_adapters.mp4"))) == 4
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(names.values())


def images(home: Path) -> str:
    return f"preview.images=[{home / 'start.png'}, {home / 'other.png'}]"


def test_i2v_a14b_from_end_to_end(home: Path, toy_i2v_model: Path, tmp_path: Path) -> None:
    own = [images(home), "condition.last_frame=0.5"]
    summary = whole_run(home, tmp_path, "i2v_a14b", toy_i2v_model, *own)
    files = {expert: f"toy_{expert}_noise.safetensors" for expert in ("high", "low")}
    check_run(tmp_path / "out", summary, files)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_ti2v_5b_from_end_to_end(
    home: Path, toy_ti2v_model: Path, tmp_path: Path, share: float
) -> None:
    own = [images(home)] if share else []  # previews of text alone when only text is trained
    own.append(f"condition.first_frame={share}")
    summary = whole_run(home, tmp_path, "ti2v_5b", toy_ti2v_model, *own)
    check_run(tmp_path / "out", summary, {"single": "toy.safetensors"})


@pytest.mark.parametrize("name", ["i2v_a14b", "ti2v_5b"])
def test_a_preview_starts_from_its_image(home: Path, i2v: Model, ti2v: Model, name: str) -> None:
    model = i2v if name == "i2v_a14b" else ti2v
    facts = model.variant
    paths = [str(home / "start.png"), str(home / "other.png"), str(home / "start.png")]
    preview = PreviewConfig(
        prompts=["a fox"] * 3, images=paths, steps=2, frames=5, height=32, width=64,
        negative_prompt="bad",
    )  # fmt: skip
    plan = plan_previews(preview, facts, batch_size=3)
    text = {"a fox": random(4, 32), "bad": random(3, 32)}
    vae = load_vae(model, torch.float32, CPU)
    experts = load_experts(model, torch.float32, CPU)
    videos = render(plan, facts, experts, vae, text, toy_runs.silent, print)
    first, other, again = (video.astype(int) for video in videos)
    rounding = np.abs(first - again).mean()  # in a batch
    assert rounding < 0.02
    assert np.abs(first - other).mean() > 0.3
    if name == "ti2v_5b":  # latent frame 0 is the image, which alone makes pixel frame 0
        clip = Clip(make_item(home / "start.png"), Bucket(1, 32, 64), 0, 0, "keep")
        latents = first_frame_latents(vae, as_video(read_clip(clip))[:, :, 0])
        image = (decode_latents(vae, latents)[0, :, 0].permute(1, 2, 0) + 1) * 127.5
        assert np.abs(first[0] - image.numpy()).max() <= 1.5  # rounding
