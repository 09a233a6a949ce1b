"""The study's stacked runs are the trainer's own, and its tables say what the results say."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from tests.toy_runs import batch_of
from tools.learning_choices import DEFAULT, Setting, bell, choices
from tools.learning_data import StudyData, load_data
from tools.learning_runs import (
    BATCH,
    Run,
    Samples,
    Stage,
    clips_at,
    draw_levels,
    draw_samples,
    errors,
    follow,
    heldout_losses,
    rate_factor,
    run_seed,
    shape_at,
    train_adapters,
)
from tools.learning_stack import StackedAdamW, fresh_adapters, make_stackable
from tools.learning_study import chosen, make_study, read_results, run
from tools.learning_tables import is_clear, tables
from tools.learning_variance import relative_variance
from train import optim
from train.compose import compose
from train.ema import decay_at
from train.step import draw_noise, velocity_error
from wan import flow, lora
from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.variants import TINY_PATH, Expert, variant

TINY = variant("tiny")
CPU = torch.device("cpu")
STEPS = 3


def silent(_: str) -> None:
    pass


def load(expert: Expert) -> WanTransformer3DModel:
    model = find_model(ModelPaths(str(TINY_PATH)), "tiny")
    return load_transformer(model, expert, torch.float32, CPU).eval()


@pytest.fixture(scope="module")
def data() -> StudyData:
    """Two videos, three images and two held-out clips of 2 x 4 x 4 latents."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    texts = drawn(5, 3, 64)
    return StudyData(
        texts=texts,
        videos=drawn(2, 16, 2, 4, 4),
        video_texts=torch.tensor([1, 2]),
        images=drawn(3, 16, 1, 4, 4),
        image_texts=torch.tensor([2, 3, 4]),
        heldout=drawn(2, 16, 2, 4, 4),
        heldout_texts=torch.tensor([1, 3]),
        concept_prompts=torch.tensor([1, 2]),
        world_prompts=torch.tensor([3]),
        world_wanted=torch.tensor([[0, 1]]),
    )


@pytest.fixture(scope="module")
def stage(data: StudyData) -> Stage:
    transformer = load("low")
    return Stage("low", transformer, make_stackable(transformer), data)


def trained_alone(stage: Stage, run: Run, steps: int) -> dict[str, Tensor]:
    """The state of an adapter after some steps of the trainer's own parts, on the study's clips."""
    config = compose(["experiment=demo"])
    transformer = load("low")
    rank, seed = run.setting.rank, run_seed(stage, run)
    lora.attach(transformer, rank, rank, target_modules("all"), 0.0, seed)
    named = lora.named_adapter_parameters(transformer)
    optimizer = optim.make_optimizer(named, config.optim, run.setting.learning_rate)
    levels = draw_levels(stage, [run], steps * BATCH)
    for step in range(steps):
        samples = draw_samples(stage, [run], levels, step)
        draw = draw_noise(
            run.setting.law(),
            stage.sigma_range,
            samples.x0.shape,
            seed,
            step * BATCH,
            run.setting.low_discrepancy,
        )
        assert torch.equal(draw.noise, samples.noise)
        assert torch.equal(draw.sigma, samples.sigma)
        batch = batch_of(samples.x0, list(samples.text))
        velocity_error(transformer, batch, draw, TINY).mean().backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), config.optim.max_grad_norm)
        rate = optim.learning_rate_at(step, steps, config.optim, run.setting.learning_rate)
        optim.set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
    return lora.adapter_state(transformer)


def test_runs_side_by_side_are_the_trainers_runs_one_by_one(stage: Stage) -> None:
    runs = [
        Run(Setting(), 0),
        Run(Setting(rank=2, learning_rate=3e-3, low_discrepancy=False, caption_dropout=0.5), 1),
    ]
    together = train_adapters(stage, runs, STEPS, silent)
    for row, run_ in enumerate(runs):
        for name, expected in trained_alone(stage, run_, STEPS).items():
            module, factor, _ = name.rsplit(".", 2)
            rank = run_.setting.rank
            a, b = together.a[module][row, :rank], together.b[module][row, :, :rank]
            found = a if factor == "lora_A" else b
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    narrow = together.rows([1])
    assert all(
        not narrow.a[name][:, 2:].any() and not narrow.b[name][..., 2:].any() for name in narrow.a
    )


def test_each_run_has_an_adamw_of_its_own() -> None:
    config, rates = compose(["experiment=demo"]), [0.1, 0.01]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, generator=generator)
    stacked = start.clone().requires_grad_()
    ours = StackedAdamW([stacked])
    alone = [start[row].clone().requires_grad_() for row in range(2)]
    theirs = [
        optim.make_optimizer({"lora_A": torch.nn.Parameter(p)}, config.optim, rate)
        for p, rate in zip(alone, rates, strict=True)
    ]
    for step in range(4):
        gradient = 10**-step * torch.randn(2, 3, 4, generator=generator)  # the first are clipped
        stacked.grad = gradient.clone()
        ours.step(torch.tensor(rates))
        for row, optimizer in enumerate(theirs):
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = gradient[row].clone()
            torch.nn.utils.clip_grad_norm_([parameter], config.optim.max_grad_norm)
            optimizer.step()
            torch.testing.assert_close(stacked[row], parameter)


def test_the_schedule_and_the_average_are_the_trainers() -> None:
    config = compose(["experiment=demo"])
    for step in (0, 19, 20, 100, 399):
        ours = 1e-3 * rate_factor(step, 400)
        assert ours == pytest.approx(optim.learning_rate_at(step, 400, config.optim, 1e-3))
    average, live = [torch.zeros(2, 1, 1)], [torch.ones(2, 1, 1)]
    follow(average, live, torch.tensor([0.0, decay_at(0, 0.99)]))
    assert average[0].flatten().tolist() == pytest.approx([1.0, 0.9])


def test_the_defaults_are_the_demos() -> None:
    config, setting = compose(["experiment=demo"]), Setting()
    assert (config.timesteps.base, config.timesteps.shift) == (setting.base, setting.shift)
    assert config.timesteps.low_discrepancy is setting.low_discrepancy
    assert (config.high.rank, config.low.rank) == (setting.rank, setting.rank)
    assert config.optim.learning_rate == setting.learning_rate
    assert config.data.caption_dropout == setting.caption_dropout
    assert config.lora.ema is None
    assert config.batch_size == BATCH
    names = [choice.name for choice in choices()]
    assert len(names) == len(set(names))
    changed = [
        c for c in choices() if c is not DEFAULT and dict(c.settings) == dict(DEFAULT.settings)
    ]
    assert not changed


def test_one_run_does_not_see_the_others(stage: Stage) -> None:
    wild = Run(Setting(learning_rate=1.0), 0)
    calm = Run(Setting(), 1)
    alone = train_adapters(stage, [calm], STEPS, silent)
    beside = train_adapters(stage, [wild, calm], STEPS, silent)
    for name, tensor in alone.b.items():
        torch.testing.assert_close(beside.b[name][1], tensor[0], rtol=1e-3, atol=1e-5)


def test_no_adapter_is_the_base(stage: Stage) -> None:
    fresh = fresh_adapters(stage.linears, [4], [0])
    with torch.no_grad():
        for tensor in fresh.b.values():
            tensor.add_(0.05)
    found = heldout_losses(stage, fresh.rows([0, None]))
    with_zero = heldout_losses(stage, fresh_adapters(stage.linears, [4], [0]))
    torch.testing.assert_close(found[1], with_zero[0], rtol=1e-5, atol=0)
    assert abs(found[0].mean() / found[1].mean() - 1) > 1e-3


def test_levels_are_those_of_the_setting(stage: Stage) -> None:
    settings = [Setting(), Setting(truncated=False), Setting(bell=True)]
    levels = draw_levels(stage, [Run(setting, 0) for setting in settings], 400)
    own, whole, weighted = levels.sigma
    assert own.max() < TINY.boundary  # pyright: ignore[reportOperatorIssue]
    assert (whole >= 0.875).float().mean().item() == pytest.approx(5 / 12, abs=0.02)
    assert torch.equal(own, weighted)
    assert torch.equal(levels.weight[:2], torch.ones(2, 400))
    assert levels.weight[2].mean().item() == pytest.approx(1, abs=0.02)
    middle, ends = bell(
        torch.tensor([0.5, 0.0, 1.0]), Setting().law(), flow.SigmaRange(0, 1)
    ).split([1, 2])
    assert middle.item() > 1
    assert ends.abs().max().item() < 1e-6


def test_an_epoch_has_each_clip_once_and_shapes_in_their_shares(data: StudyData) -> None:
    seen = [clip for batch in range(5) for clip in clips_at(3, "videos", batch, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    places = [shape_at(place, data) for place in range(8)]
    for shape in ("videos", "images"):
        assert [number for name, number in places if name == shape] == [0, 1, 2, 3]


def test_captions_drop_at_their_share(stage: Stage) -> None:
    settings = [Setting(caption_dropout=share) for share in (0.0, 0.3)]
    runs = [Run(setting, 0) for setting in settings]
    levels = draw_levels(stage, runs, 60 * BATCH)
    empty = stage.data.text(torch.zeros(1, dtype=torch.long))
    dropped = torch.zeros(2)
    for place in range(60):
        text = draw_samples(stage, runs, levels, place).text.unflatten(0, (2, BATCH))
        dropped += (text == empty).all(-1).all(-1).sum(1)
    assert dropped[0] == 0
    assert dropped[1].item() / (60 * BATCH) == pytest.approx(0.3, abs=0.08)


def test_weights_weigh(stage: Stage) -> None:
    runs = [Run(Setting(), 0)]
    samples = draw_samples(stage, runs, draw_levels(stage, runs, BATCH), 0)
    with torch.no_grad():
        plain = errors(stage, samples)
        doubled = errors(stage, replace(samples, weight=2 * samples.weight))
    assert torch.equal(doubled, 2 * plain)
    assert isinstance(samples, Samples)


def test_the_variance_of_gradients_is_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.ones(50, 20)  # |mean|^2 = 1000, E |g - mean|^2 = 4000
    found = [
        relative_variance([mean + 2 * torch.randn(8, 50, 20, generator=generator)])
        for _ in range(40)
    ]
    assert sum(found) / len(found) == pytest.approx(4, rel=0.05)


def arguments() -> argparse.Namespace:
    return argparse.Namespace(steps=[1, 1], sample_steps=1, prompts=[1, 1], repeats=2, batches=2)


def test_a_study_goes_on_where_it_was_killed(tmp_path: Path, data: StudyData) -> None:
    square = replace(data, videos=data.videos.repeat(1, 1, 2, 2, 2), heldout=data.heldout)
    square.save(tmp_path / "study.safetensors")
    study = make_study(load_data(tmp_path / "study.safetensors"), CPU, arguments())
    out = tmp_path / "out"
    rows = chosen("experts")
    run(study, out, rows[:2], [0], 8)
    results = out / "results.jsonl"
    first = results.read_text()
    results.write_text(first + '{"kind": "run", "choi')  # killed while it wrote
    run(study, out, rows[:3], [0], 8)
    lines = read_results(results)
    named = [line["choice"] for line in lines]
    assert named == ["default=", "experts=none", "spread high", "spread low", "experts=high only"]
    assert results.read_text().startswith(first)
    high_only, default = lines[-1]["heldout"], lines[0]["heldout"]
    assert high_only["high"] == pytest.approx(default["high"], abs=2e-5)
    assert high_only["low"] == pytest.approx(lines[1]["heldout"]["low"], abs=2e-5)
    other = replace(study, steps={"high": 2, "low": 2})
    with pytest.raises(SystemExit, match="holds results of other steps"):
        run(other, out, rows, [0], 8)


def test_unknown_factors_and_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'rang', which is no factor; known: default, sigma"):
        chosen("rank,rang")
    assert {choice.factor for choice in chosen("rank")} == {"default", "rank"}
    with pytest.raises(SystemExit, match=r"make it with `python -m tools.learning_study prepare"):
        load_data(tmp_path / "none.safetensors")


def line(choice: str, seed: int, loss: float) -> dict:
    bins = [0.5 * loss, 1.5 * loss]
    return {
        "kind": "run",
        "choice": choice,
        "seed": seed,
        "heldout": {"high": bins, "low": bins},
        "score": {"concept": 0.5, "unasked": 0.0, "shape": 1.0},
    }


def test_tables_compare_the_same_seeds() -> None:
    defaults = [line("default=", seed, 0.5 + seed) for seed in range(4)]
    better = [line("rank=4", seed, 0.4 + seed + 0.001 * (seed % 2)) for seed in range(4)]
    noisy = [line("rank=8", seed, 0.5 + seed + 0.1 * (-1) ** seed) for seed in range(3)]
    told = tables([*defaults, *better, *noisy])
    rows = told.splitlines()
    assert rows[2].startswith("| **16** (the demo's) | 2.0000 ± 0.6455 |")
    assert rows[3].startswith("| 4 | 1.9005 (**-0.0995 ± 0.0003**) |")
    assert "| 8 | 1.5333 (+0.0333 ± 0.0667) |" in rows[4]
    with pytest.raises(SystemExit, match="no results of the default"):
        tables(better)


def test_noise_levels_alike_weigh_bins_by_their_width() -> None:
    told = tables([line("default=", 0, 1.0), line("draws=random", 0, 1.0)])
    header, _, row, _ = told.splitlines()
    place = [cell.strip() for cell in header.split("|")].index("low, all sigma alike")
    # Of the low expert's range, 0 to 0.875, half of the law uniform, shift 5 is below 7/12 / 0.875
    # after the shift: u = 7/24, sigma = 5 u / (1 + 4 u) = 35/52.
    lower = 35 / 52 / 0.875
    assert row.split("|")[place].strip().startswith(f"{0.5 * lower + 1.5 * (1 - lower):.4f} ±")


def test_the_documents_tables_are_those_of_its_results() -> None:
    docs = Path(__file__).parent.parent / "docs"
    assert (
        tables(read_results(docs / "learning_results.jsonl")) in (docs / "learning.md").read_text()
    )


def test_clear_is_beyond_chance() -> None:
    assert not is_clear(1.0, 0.5, 8)
    assert is_clear(2.0, 0.5, 8)
    assert not is_clear(2.0, 0.5, 3)
    assert not is_clear(math.nan, 0.1, 8)
    assert json.loads(json.dumps(math.inf)) == math.inf
