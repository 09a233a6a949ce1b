"""A run with a schedule-free optimizer shows, measures and exports its average, and trains on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.toy_runs import config_of, make_image, silent
from train.deliver import deliver
from train.learner import as_used, train_step
from train.lora import check, prepare
from train.preview import render
from train.run import Run, measure, sample
from train.run_folder import open_run_folder
from train.stopping import stop_requests
from train.validate import heldout_loss
from wan.lora import adapter_state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps of the low expert on six images, far apart."""
    data = tmp_path_factory.mktemp("averaged") / "data"
    for seed in range(6):
        make_image(data / f"picture_{seed}.png", seed, f"caption {seed}")
    config = config_of(
        data, Path("embedded"), f"output_dir={data.parent / 'out'}", "data.frames=1",
        "optim=schedulefree", "optim.learning_rate=0.01", "optim.warmup_steps=0", "experts=[low]",
        "steps=9", "eval.bins=2", "eval.draws=1", "tracking.mode=disabled", "preview.prompts=[a]",
        "preview.steps=2", "preview.frames=1", "preview.height=32", "preview.width=48",
        "export.dtype=float32",
    )  # fmt: skip
    accelerator = Accelerator()
    with stop_requests(None) as stop:
        folder = open_run_folder(config, accelerator)
        run = prepare(check(config, accelerator.device, silent), folder, accelerator, stop)
    for step in range(4):
        more = run.facts, run.experts, run.dataset, accelerator
        train_step(run.learners["low"], step, config, *more)
    return run


def test_what_a_user_gets_is_the_average(run: Run, tmp_path: Path) -> None:
    low = run.experts["low"]
    before = adapter_state(low)
    in_training = heldout_loss(low, "low", run.facts, run.checks, silent)
    with as_used(run.learners):
        average = adapter_state(low)
        loss = heldout_loss(low, "low", run.facts, run.checks, silent)
        prompts = run.dataset.prompts
        videos = render(run.previews, run.facts, run.experts, run.vae, prompts, silent, print)
    assert in_training.mean != loss.mean
    assert measure(run, 4) == [loss]
    assert np.array_equal(sample(run, {"low": 1.0}), videos)

    files = run.exporter.write(tmp_path, "toy", run.experts, run.learners, [], {})
    written = load_file(files["low"].path).values()
    for name, tensor in average.items():
        assert any(torch.equal(tensor, found) for found in written), name
        assert not any(torch.equal(before[name], found) for found in written), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(low).items())


def test_the_file_is_compared_with_the_average(run: Run) -> None:
    run.history.heldout = {0: measure(run, 0), 4: measure(run, 4)}
    deliver(run)  # raises if the files do not do what the model beside them does
