"""Clips, captions, masks and prompts become cache entries by the toy model, each encoded once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.items import DataError
from data.media import read_clip
from tests import toy_runs
from tests.toy_runs import CPU, Progress, encoded, make_image, make_video, planned
from train.config import Config
from train.encode import EncodedDataset
from wan.checkpoints import (
    Model,
    ModelPaths,
    find_model,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)
from wan.latents import encode_video
from wan.text import encode_prompts
from wan.variants import variant

TINY = variant("tiny")


@pytest.fixture
def model(toy_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_model)), "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos of two lengths and two images."""
    path = tmp_path / "data"
    make_video(path / "long.mp4", 24, "a long video")
    make_video(path / "short.mp4", 9, "a short video")
    make_image(path / "a.png", 1, "an image")
    make_image(path / "b.png", 2, "another image")
    return path


def config_of(folder: Path, model: Path, *overrides: str) -> Config:
    own = ["data.frames=13", "data.heldout_fraction=0.25"]
    return toy_runs.config_of(folder, model, *own, *overrides)


def report_lines(dataset: EncodedDataset) -> list[str]:
    return [line for report in dataset.reports for line in report.lines()]


def test_entries_are_what_the_encoders_make_of_the_files(
    folder: Path, toy_model: Path, model: Model
) -> None:
    config = config_of(folder, toy_model)
    clips, dataset = planned(config), encoded(config)
    vae = load_vae(model, torch.float32, CPU)
    encoder, tokenizer = load_text_encoder(model, torch.float32, CPU), load_tokenizer(model)
    for side, cached in [(clips.train, dataset.train), (clips.heldout, dataset.heldout)]:
        assert [entry.bucket for entry in cached.clips] == [clip.bucket for clip in side]
        assert [entry.name for entry in cached.clips] == [clip.item.name for clip in side]
        for clip, entry in zip(side, cached.clips, strict=True):
            frames = read_clip(clip).permute(3, 0, 1, 2).float()  # (3, T, H, W) in 0..255
            expected = encode_video(vae, frames[None] / 127.5 - 1)[0]
            latents = cached.pictures.latents.read(entry.latents)
            assert torch.equal(latents, expected)
            bucket = clip.bucket
            shape = TINY.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
            assert latents.shape == shape
            texts = [cached.text.read(caption) for caption in entry.captions]
            (embedding,) = encode_prompts(clip.item.captions, tokenizer, encoder, TINY.text_len)
            assert len(texts) == 1
            assert torch.equal(texts[0], embedding)
    (empty,) = encode_prompts([""], tokenizer, encoder, TINY.text_len)
    assert torch.equal(dataset.train.text.read(dataset.train.no_caption), empty)
    first, latents, text = dataset.heldout.clips[0], *dataset.heldout.first()
    assert torch.equal(latents, dataset.heldout.pictures.latents.read(first.latents))
    assert torch.equal(text, dataset.heldout.text.read(first.captions[0]))


def test_nothing_is_encoded_twice(folder: Path, toy_model: Path) -> None:
    first, again = Progress(), Progress()
    made = encoded(config_of(folder, toy_model), ["a prompt"], first)
    assert report_lines(made) == [
        "latents: 0 reused, 4 encoded", "  4 new", "text: 0 reused, 6 encoded", "  6 new",
    ]  # fmt: skip
    assert first.done.count("encoding latents") == 4
    assert first.done.count("encoding text") == 6  # four captions, "" and the prompt
    reused = encoded(config_of(folder, toy_model), ["a prompt"], again)
    assert report_lines(reused) == [
        "latents: 4 reused, 0 encoded", "text: 6 reused, 0 encoded",
    ]  # fmt: skip
    assert not [name for name in again.done if name.startswith("encoding")]
    assert reused.train.clips == made.train.clips
    assert reused.train.pictures.latents.paths == made.train.pictures.latents.paths


def test_another_caption_is_encoded_alone(folder: Path, toy_model: Path) -> None:
    before = encoded(config_of(folder, toy_model, "data.heldout_fraction=0.5"))
    name = before.train.clips[0].name
    (folder / name).with_suffix(".txt").write_text("a fox")
    progress = Progress()
    after = encoded(config_of(folder, toy_model, "data.heldout_fraction=0.5"), (), progress)
    assert after.train.pictures.latents.paths == before.train.pictures.latents.paths
    assert progress.done.count("encoding latents") == 0
    assert progress.done.count("encoding text") == 1
    assert report_lines(after)[1:] == ["text: 4 reused, 1 encoded", "  1 new"]
    assert after.fingerprint() != before.fingerprint()


def test_another_picture_under_the_same_name_is_encoded_alone(
    folder: Path, toy_model: Path
) -> None:
    before = encoded(config_of(folder, toy_model))
    for entry in before.train.clips:
        if entry.name.endswith(".png"):
            make_image(folder / entry.name, 99 + ord(entry.name[0]), entry.name)
    changed = sum(entry.name.endswith(".png") for entry in before.train.clips)
    after = encoded(config_of(folder, toy_model))
    lines = [f"latents: {4 - changed} reused, {changed} encoded", f"  {changed} whose file changed"]
    assert report_lines(after)[:2] == lines
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize(
    ("override", "kind"), [("model.dtype=bfloat16", "text"), ("data.vae_dtype=bfloat16", "latents")]
)
def test_the_dtype_of_an_encoder_belongs_to_its_entries(
    folder: Path, toy_model: Path, override: str, kind: str
) -> None:
    fine, coarse = (
        encoded(config_of(folder, toy_model, *overrides)).train for overrides in ([], [override])
    )
    for name, one, other in [
        ("latents", fine.pictures.latents, coarse.pictures.latents),
        ("text", fine.text, coarse.text),
    ]:
        shared = set(one.paths) & set(other.paths)
        assert len(shared) == (0 if name == kind else len(one.paths))


def test_preview_prompts_are_found_as_they_were_written(folder: Path, toy_model: Path) -> None:
    prompts = ["  a   red\nball ", "a red ball", ""]
    dataset = encoded(config_of(folder, toy_model), prompts)
    assert list(dataset.prompts) == prompts
    assert torch.equal(dataset.prompts[prompts[0]], dataset.prompts[prompts[1]])
    train = dataset.train
    assert torch.equal(dataset.prompts[""], train.text.read(train.no_caption))
    assert not torch.equal(dataset.prompts[""], dataset.prompts["a red ball"])


def test_the_fingerprint_is_of_the_content(folder: Path, toy_model: Path) -> None:
    before = encoded(config_of(folder, toy_model)).fingerprint()
    assert len(before) == 16
    moved = folder.parent / "moved" / "elsewhere"
    moved.parent.mkdir()
    folder.rename(moved)
    cache = f"data.cache={folder.parent / 'cache'}"
    assert encoded(config_of(moved, toy_model, cache)).fingerprint() == before


def test_workers_make_the_same_entries(folder: Path, toy_model: Path, tmp_path: Path) -> None:
    white = np.full((32, 48), 255, np.uint8)
    white[:, :24] = 0
    Image.fromarray(white).save(folder / "long.mask.png")
    caches = {number: tmp_path / f"cache_{number}" for number in (0, 2)}
    for number, cache in caches.items():
        encoded(config_of(folder, toy_model, f"data.workers={number}", f"data.cache={cache}"))
    alone, beside = (
        {path.relative_to(cache): path for path in cache.rglob("*.safetensors")}
        for cache in caches.values()
    )
    assert alone.keys() == beside.keys()
    assert {path.parts[0] for path in alone} == {"latents", "text", "mask"}
    for name in alone:
        with safe_open(alone[name], "pt") as one, safe_open(beside[name], "pt") as other:
            assert one.metadata() == other.metadata()
            assert torch.equal(one.get_tensor(name.parts[0]), other.get_tensor(name.parts[0]))


def test_masks_belong_to_their_clips_and_to_the_fingerprint(folder: Path, toy_model: Path) -> None:
    config = config_of(folder, toy_model)
    before = encoded(config)
    assert before.train.pictures.masks is None
    right, below = np.zeros((2, 32, 48), np.uint8)
    right[:, 24:], below[16:] = 255, 255
    masks = dict(zip([clip.name for clip in before.train.clips[1:]], (right, below), strict=True))
    for name, mask in masks.items():  # not of the first clip
        Image.fromarray(mask).save((folder / name).with_suffix(".mask.png"))
    after = encoded(config)
    assert after.train.pictures.masks is not None
    for clip in after.train.clips:
        assert (clip.mask is not None) == (clip.name in masks)
        if clip.mask is not None:
            weights = after.train.pictures.masks.read(clip.mask)
            latents = after.train.pictures.latents.read(clip.latents)
            assert weights.shape == latents.shape[1:]
            expected = torch.from_numpy(masks[clip.name][::8, ::8]) / 255  # (h, w)
            assert torch.equal(weights, expected.expand(weights.shape))
    assert after.fingerprint() != before.fingerprint()


def test_nothing_is_encoded_when_told_so_and_the_command_is_named(
    folder: Path, toy_model: Path
) -> None:
    with pytest.raises(DataError, match=r"4 of 4 entries of latents.*python -m tools\.cache"):
        encoded(config_of(folder, toy_model, "data.encode=false"))
    assert not list((folder.parent / "cache").rglob("*.safetensors"))
    made = encoded(config_of(folder, toy_model))
    found = encoded(config_of(folder, toy_model, "data.encode=false"))
    assert found.fingerprint() == made.fingerprint()
    (folder / "a.txt").write_text("another caption")
    with pytest.raises(DataError, match=r"1 of 5 entries of text.*\(1 new\).*another caption"):
        encoded(config_of(folder, toy_model, "data.encode=false"))


@pytest.mark.parametrize("damage", ["truncated", "nan", "removed"])
def test_a_damaged_entry_is_named_and_made_again(
    folder: Path, toy_model: Path, damage: str
) -> None:
    said: list[str] = []
    dataset = encoded(config_of(folder, toy_model), said=said)
    latents, clip = dataset.train.pictures.latents, dataset.train.clips[0]
    path, sound = latents.paths[clip.latents], latents.read(clip.latents)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "nan":
        tensors = load_file(path)
        save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    else:
        path.unlink()
    assert torch.equal(latents.read(clip.latents), sound)
    assert len(said) == 1
    assert clip.name in said[0]
    assert "encoding it again" in said[0]
    assert torch.equal(latents.read(clip.latents), sound)
    assert len(said) == 1  # it was mended
