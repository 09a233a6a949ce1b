"""What a sample is given, and how much it counts: captions, dropout, masks, weights, repairs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.batches import Draws, EncodedClips, load_batch
from tests.toy_runs import (
    config_of,
    encoded,
    encoded_clips,
    make_image,
    start,
)
from train.config import Config
from train.encode import EncodedDataset
from train.learner import sample_draws
from wan.checkpoints import Model, ModelPaths, find_model
from wan.variants import variant

TINY = variant("tiny")


@pytest.fixture(scope="module")
def model(toy_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_model)), "tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> EncodedClips:
    """Three clips whose latents and texts are full of their number; the text of "" is of -1."""
    latents = [torch.full((4, 2, 3, 5), float(index)) for index in range(3)]
    texts = [torch.full((index + 1, 6), float(index)) for index in range(3)]
    folder = tmp_path_factory.mktemp("clips")
    return encoded_clips(folder, latents, [*texts, torch.full((1, 6), -1.0)])


def test_a_batch_holds_the_clips_and_their_texts(clips: EncodedClips) -> None:
    batch = load_batch(clips, [2, 0], Draws(0), place=7)
    assert batch.clips == [2, 0]
    assert batch.latents.shape == (2, 4, 2, 3, 5)
    assert batch.latents[:, 0, 0, 0, 0].tolist() == [2, 0]
    assert [text.shape for text in batch.text] == [(3, 6), (1, 6)]
    assert texts_of(clips, Draws(0), 7) == [2, 0]
    assert batch.mask is None
    assert batch.condition is None
    assert batch.loss_weight.tolist() == [1, 1]
    assert batch.first_given.tolist() == batch.last_given.tolist() == [False, False]


def texts_of(clips: EncodedClips, draws: Draws, place: int) -> list[float]:
    """The number of each text in the batch of clips 2 and 0 at a place."""
    return [text[0, 0].item() for text in load_batch(clips, [2, 0], draws, place).text]


def test_captions_drop_to_the_encoding_of_nothing_at_the_given_rate(clips: EncodedClips) -> None:
    assert texts_of(clips, Draws(0, caption_dropout=1.0), 7) == [-1, -1]  # not zeros
    draws = Draws(3, caption_dropout=0.25)
    dropped = [[text == -1 for text in texts_of(clips, draws, place)] for place in range(1000)]
    for slot in zip(*dropped, strict=True):
        assert 0.2 < sum(slot) / 1000 < 0.3
    assert len({tuple(pair) for pair in dropped}) == 4  # each slot has a draw of its own
    again = [[text == -1 for text in texts_of(clips, draws, place)] for place in (999, 5, 0)]
    assert again == [dropped[place] for place in (999, 5, 0)]


def test_each_of_several_captions_is_used_and_which_is_a_function_of_the_place(
    clips: EncodedClips,
) -> None:
    several = [replace(clip, captions=(0, 1, 2)) for clip in clips.clips]
    clips = replace(clips, clips=several)
    chosen = [tuple(texts_of(clips, Draws(1), place)) for place in range(300)]
    for slot in zip(*chosen, strict=True):
        counts = Counter(slot)
        assert set(counts) == {0, 1, 2}
        assert min(counts.values()) > 60  # 100 on average
    assert len(set(chosen)) == 9  # slots choose on their own
    assert chosen[250] == tuple(texts_of(clips, Draws(1), 250))
    assert chosen != [tuple(texts_of(clips, Draws(2), place)) for place in range(300)]


def test_first_and_last_frames_are_given_at_their_rates(clips: EncodedClips) -> None:
    draws = Draws(0, first_frame=0.5, last_frame=0.25)
    batches = [load_batch(clips, [2, 0], draws, place) for place in range(400)]
    for name, share in (("first_given", 0.5), ("last_given", 0.25)):
        given = torch.stack([getattr(batch, name) for batch in batches]).float()
        assert given.mean(dim=0).tolist() == pytest.approx([share] * 2, abs=0.07)
    whole = load_batch(clips, [2, 0], Draws(0, first_frame=1.0), 3)
    assert whole.first_given.tolist() == [True, True]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, of which one has a mask; a list with two captions; ordinary things."""
    path = tmp_path_factory.mktemp("mixing")
    for seed in range(4):
        make_image(path / "data" / f"{seed}.png", seed, f"thing {seed}")
    half = np.zeros((32, 48), np.uint8)
    half[:, 24:] = 255
    Image.fromarray(half).save(path / "data" / "1.mask.png")
    make_image(path / "faces" / "x.png", 10, "not read")
    row = {"path": "x.png", "caption": ["a face", "a smile"], "repeats": 2, "split": "train"}
    (path / "faces" / "list.jsonl").write_text(json.dumps(row) + "\n")
    for seed in (20, 21):
        make_image(path / "ordinary" / f"{seed}.png", seed, f"ordinary {seed}")
    (path / "heldout.txt").write_text("3\n")
    return path


def mix_of(home: Path, *overrides: str) -> Config:
    return config_of(
        home / "data", Path("embedded"), "data.frames=1", "data.trigger=zorbi",
        "data.prefix='zorbi, '", f"data.heldout_path={home / 'heldout.txt'}",
        f"+data.mix.faces={{path: {home / 'faces' / 'list.jsonl'}, weight: 0.5, prefix: ''}}",
        f"+data.mix.rest={{path: {home / 'ordinary'}, loss_weight: 0.25, weight: 2, "
        "regularisation: true}", "data.caption_dropout=0", "optim.warmup_steps=0", "steps=9",
        "optim.max_grad_norm=1e9", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mix(home: Path, toy_model: Path) -> EncodedDataset:
    return encoded(mix_of(home, f"model.path={toy_model}"))


def test_a_mixed_dataset_is_trained_on_with_its_captions_and_weights(
    home: Path, mix: EncodedDataset
) -> None:
    clips = mix.train
    assert [clip.name for clip in mix.heldout.clips] == ["3.png"]
    assert {clip.name: (clip.visits, clip.loss_weight) for clip in clips.clips} == {
        "0.png": (1.0, 1.0), "1.png": (1.0, 1.0), "2.png": (1.0, 1.0), "x.png": (1.0, 1.0),
        "20.png": (2.0, 0.25), "21.png": (2.0, 0.25),
    }  # fmt: skip
    captions = {clip.name: len(clip.captions) for clip in clips.clips}
    assert captions == dict.fromkeys(captions, 1) | {"x.png": 2}


def test_ordinary_things_are_prompted_without_the_trigger(
    home: Path, toy_model: Path, mix: EncodedDataset
) -> None:
    """The text that is trained with is the encoding of the caption as it stands in the file."""
    prompts = ["ordinary 20", "zorbi, ordinary 20", "zorbi, thing 0", "a smile"]
    known = encoded(mix_of(home, f"model.path={toy_model}"), prompts).prompts
    by_name = {clip.name: clip for clip in mix.train.clips}

    def text(name: str, number: int = 0) -> Tensor:
        return mix.train.text.read(by_name[name].captions[number])

    assert torch.equal(text("20.png"), known["ordinary 20"])
    assert not torch.equal(text("20.png")[:1], known["zorbi, ordinary 20"][:1])
    assert torch.equal(text("0.png"), known["zorbi, thing 0"])
    assert torch.equal(text("x.png", 1), known["a smile"])


def test_a_learner_shares_its_batches_as_the_weights_say(
    home: Path, model: Model, mix: EncodedDataset
) -> None:
    order = start(mix_of(home), model, mix).learner.order
    seen = Counter(mix.train.clips[order.indices(place)[0]].name for place in range(800))
    assert {name: round(count / 100) for name, count in seen.items()} == {
        "0.png": 1, "1.png": 1, "2.png": 1, "x.png": 1, "20.png": 2, "21.png": 2,
    }  # fmt: skip


def test_masks_of_real_files_meet_clips_without_one(mix: EncodedDataset) -> None:
    names = [clip.name for clip in mix.train.clips]
    order = [names.index("0.png"), names.index("1.png"), names.index("20.png")]
    batch = load_batch(mix.train, order, Draws(0), 0)
    assert batch.mask is not None
    assert batch.mask.shape == (3, 1, 4, 6)
    assert torch.equal(batch.mask[1], torch.tensor([0.0] * 3 + [1.0] * 3).expand(1, 4, 6))
    assert torch.equal(batch.mask[[0, 2]], torch.ones(2, 1, 4, 6))
    assert load_batch(mix.train, order[:1], Draws(0), 0).mask is None


def weighted(dataset: EncodedDataset, weight: dict[str, float]) -> EncodedDataset:
    clips = [replace(c, loss_weight=weight.get(c.name, 1.0)) for c in dataset.train.clips]
    return replace(dataset, train=replace(dataset.train, clips=clips))


def test_a_loss_weight_scales_the_gradient_and_not_the_loss(
    home: Path, model: Model, mix: EncodedDataset
) -> None:
    config = mix_of(home, "optim.name=torch.optim.SGD", "optim.learning_rate=1", "batch_size=2")
    config.optim.args = {}
    order = start(config, model, mix).learner.order
    first, second = (mix.train.clips[index].name for index in order.indices(0))
    assert first != second

    def step(weights: dict[str, float]) -> tuple[Tensor, Tensor]:
        """The gradient, by what plain descent with a rate of 1 moved, and the losses."""
        training = start(config, model, weighted(mix, weights))
        before = training.adapter()
        losses = training.step(0).losses
        moved = [(before[name] - tensor).flatten() for name, tensor in training.adapter().items()]
        return torch.cat(moved), losses

    nearly_nothing = 1e-12
    plain, losses = step({})
    only_first, only_second = step({second: nearly_nothing})[0], step({first: nearly_nothing})[0]
    assert only_first.abs().max() > 1e-5
    assert torch.allclose(plain, only_first + only_second, atol=1e-7)
    assert torch.allclose(step({first: 0.5, second: 0.5})[0], plain / 2, atol=1e-7)
    tripled, told = step({first: 3.0})
    assert torch.allclose(tripled, 3 * only_first + only_second, atol=1e-7)
    assert torch.equal(told, losses)


def test_a_damaged_entry_is_made_again_and_training_goes_on(
    home: Path, toy_model: Path, model: Model, tmp_path: Path
) -> None:
    said: list[str] = []
    config = mix_of(home, f"model.path={toy_model}", f"data.cache={tmp_path}", "batch_size=2")
    dataset = encoded(config, said=said)
    undisturbed = start(config, model, dataset)
    expected = [undisturbed.step(step).losses for step in range(4)]

    training = start(config, model, dataset)
    losses = [training.step(0).losses]
    latents, text = dataset.train.pictures.latents, dataset.train.text
    for path in {*latents.paths, *text.paths}:
        path.write_bytes(path.read_bytes()[:-4])
    losses += [training.step(step).losses for step in range(1, 4)]
    assert all(torch.equal(one, other) for one, other in zip(losses, expected, strict=True))
    assert said
    assert all("encoding it again" in line for line in said)
    assert len(said) == len(set(said))  # each once


def test_what_is_given_is_as_configured(home: Path) -> None:
    draws = sample_draws(mix_of(home, "data.caption_dropout=0.3"), TINY, seed=5)
    assert draws == Draws(5, caption_dropout=0.3)
    ti2v = variant("ti2v_5b")
    for given, share in (("null", 0.5), ("0", 0.0), ("1", 1.0)):
        overrides = ["model=ti2v_5b", "model.path=x", f"condition.first_frame={given}"]
        assert sample_draws(mix_of(home, *overrides), ti2v, 5).first_frame == share
