from pathlib import Path

import pytest
import torch

from tests.toy_runs import Training, config_of, encoded, make_image, start
from train.ema import averaged, decay_at
from train.encode import EncodedDataset
from train.export import Exporter
from train.learner import as_used
from wan.checkpoints import Model, ModelPaths, find_model
from wan.lora_format import read_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ema") / "data"
    for seed in range(4):
        make_image(path / f"{seed}.png", seed, "a fox")
    return path


@pytest.fixture(scope="module")
def model(toy_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_model)), "tiny")


@pytest.fixture(scope="module")
def dataset(folder: Path, toy_model: Path) -> EncodedDataset:
    return encoded(config_of(folder, toy_model))


def training(folder: Path, model: Model, dataset: EncodedDataset, *settings: str) -> Training:
    settings = ("steps=9", "optim.warmup_steps=1", "optim.learning_rate=0.01", *settings)
    return start(config_of(folder, Path("embedded"), *settings), model, dataset)


def test_the_average_is_that_of_the_steps(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    run = training(folder, model, dataset, "lora.ema=0.6")
    assert run.learner.ema is not None
    expected = run.adapter()
    for step in range(6):
        run.step(step)
        decay = min(0.6, (1 + step) / (10 + step))
        assert decay_at(step, 0.6) == decay
        for name, tensor in run.adapter().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    assert list(run.learner.ema.values) == list(expected)
    for name, average in run.learner.ema.values.items():
        torch.testing.assert_close(average, expected[name], msg=name)
        assert average.dtype == torch.float32


def test_an_average_changes_no_training_and_is_shown_only_within_its_block(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    plain = training(folder, model, dataset)
    run = training(folder, model, dataset, "lora.ema=0.6", "export.weights=ema")
    assert plain.learner.ema is None
    for step in range(4):
        plain.step(step)
        run.step(step)
        own = run.adapter()
        with as_used({"low": run.learner}):
            assert run.learner.ema is not None
            shown = run.adapter()
            assert all(torch.equal(t, run.learner.ema.values[n]) for n, t in shown.items())
            with averaged(run.learner.ema):
                assert all(torch.equal(t, shown[n]) for n, t in run.adapter().items())
            assert all(torch.equal(t, shown[n]) for n, t in run.adapter().items())
        assert all(torch.equal(tensor, own[name]) for name, tensor in run.adapter().items())
    after = plain.adapter()
    assert all(torch.equal(tensor, after[name]) for name, tensor in run.adapter().items())
    with as_used({"low": plain.learner}):
        assert all(torch.equal(t, after[name]) for name, t in plain.adapter().items())


@pytest.mark.parametrize("weights", ["live", "ema", "both"])
def test_what_is_asked_for_is_exported(
    folder: Path, model: Model, dataset: EncodedDataset, tmp_path: Path, weights: str
) -> None:
    settings = ("lora.ema=0.6", f"export.weights={weights}", "export.dtype=float32")
    run = training(folder, model, dataset, *settings)
    for step in range(4):
        run.step(step)
    exporter = Exporter(run.config, model, dataset)
    exporter.write(tmp_path, "toy", run.experts, {"low": run.learner}, [], {})
    names = {"live": [""], "ema": [""], "both": ["", "_ema"]}[weights]
    paths = [tmp_path / f"toy{name}_low_noise.safetensors" for name in names]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    kinds = {"live": ["live"], "ema": ["ema"], "both": ["live", "ema"]}[weights]
    for path, kind in zip(paths, kinds, strict=True):
        state, _, metadata = read_adapter(path)
        assert metadata["wan_lora.weights"] == kind
        assert run.learner.ema is not None
        wanted = run.adapter() if kind == "live" else run.learner.ema.values
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
