"""Memory that is full in any phase: nothing is lost, and the message says what to change.

On a machine with a GPU its memory is really filled; elsewhere PyTorch's error is raised.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.resumable_runs import assert_same_run, config_of, make_data, run
from tests.toy_runs import make_image
from train import learner
from train.checkpoint import checkpoints_in, step_of
from train.config import Config
from train.ema import Average
from train.errors import clear_errors
from train.rules import ConfigError, MemoryFull, TrainingStopped
from train.step import StepInputs

SIZES = [
    "data.height=64", "data.width=96", "preview.prompts=[]", "checkpoint.every=0",
    # On a GPU what is compiled calls no hook, and a block that is measured calls it too early.
    "speed.compile=false", "speed.keep=everything",
]  # fmt: skip
# PyTorch's fused update takes no memory, and cannot run out of it.
AVERAGED = ["lora.ema=0.6", "export.weights=ema", "+optim.args.foreach=false"]
SMALL, LARGE = (4, 6), (8, 12)  # of latents
ON_GPU = torch.cuda.is_available()
SMALLEST = 512  # bytes that PyTorch gives at least

pytestmark = pytest.mark.gpu

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first product


@pytest.fixture(scope="module", autouse=True)
def to_the_bit() -> Iterator[None]:
    """Runs of the same settings are the same run, on a GPU too."""
    torch.use_deterministic_algorithms(ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    """What frames of an error hold that a test has caught: as a program that ends gives it back."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two sizes, two of them large."""
    place = make_data(tmp_path_factory.mktemp("memory"))
    for seed in range(10, 12):
        make_image(place / "data" / f"{seed}.png", seed, f"large {seed}", (64, 96))
    return place


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    return run(config_of(home, toy_model, "whole", *SIZES))


@pytest.fixture(scope="module")
def averaged(home: Path, toy_model: Path) -> Path:
    return run(config_of(home, toy_model, "averaged", *SIZES, *AVERAGED))


def run_out() -> NoReturn:
    """All of the memory is taken, and more is asked for."""
    if ON_GPU:
        taken, size = [], torch.cuda.mem_get_info()[1]  # this frame holds it, as others their own
        while size >= SMALLEST:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        torch.empty(SMALLEST, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("CUDA out of memory")


@contextmanager
def full_memory(kind: str, when: Callable[[Tensor], bool]) -> Iterator[None]:
    """As if memory were full when a module of this class is given such an input."""

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if type(module).__name__ == kind and when(inputs[0]):
            run_out()

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def assert_goes_on(config: Config, step: int, whole: Path) -> None:
    """All steps up to this one are saved, and the same command ends as the whole run did."""
    folder = Path(config.output_dir)
    (saved,) = checkpoints_in(folder / "checkpoints")
    assert step_of(saved) == step
    run(config)
    assert_same_run(folder, whole)


def stopped(home: Path, model: Path, name: str, kind: str, when: Callable[[Tensor], bool]) -> str:
    """What a run says that finds no memory."""
    with full_memory(kind, when), pytest.raises(TrainingStopped) as error:
        run(config_of(home, model, name, *SIZES))
    return str(error.value)


class Training:
    """True for training on latents of a size, once so many batches have passed."""

    def __init__(self, size: tuple[int, int], passed: int) -> None:
        self.size, self.left = size, passed

    def __call__(self, latents: Tensor) -> bool:
        self.left -= torch.is_grad_enabled()
        return torch.is_grad_enabled() and self.left < 0 and latents.shape[-2:] == self.size


@pytest.mark.parametrize(
    ("size", "passed", "told"),
    [
        (LARGE, 8, "its batch of 1x64x96 is predicted to take 0.0 GiB, as much as any of this run"),
        (SMALL, 12, "its batch of 1x32x48 is predicted to take 0.0 GiB, the run's largest of 1x64"),
    ],
)
def test_a_batch_that_is_too_large_is_named_and_the_steps_before_it_are_kept(
    home: Path, toy_model: Path, whole: Path, size: tuple[int, int], passed: int, told: str
) -> None:
    name = f"batch_{passed}"
    message = stopped(home, toy_model, name, "WanRotaryPosEmbed", Training(size, passed))
    (saved,) = checkpoints_in(home / "out" / name / "checkpoints")
    assert step_of(saved) >= passed // 3
    assert f"is full, in step {step_of(saved) + 1}: {told}" in message
    assert f"Saved is {saved}: type the same command with the change." in message
    run(config_of(home, toy_model, name, *SIZES))
    assert_same_run(home / "out" / name, whole)


def test_at_the_first_step_there_is_nothing_to_save(home: Path, toy_model: Path) -> None:
    message = stopped(
        home, toy_model, "first", "WanRotaryPosEmbed", lambda _: torch.is_grad_enabled()
    )
    assert "is full, in step 1: its batch of 1x" in message
    assert "No step is saved yet, and what is encoded stays in the cache" in message
    assert not checkpoints_in(home / "out" / "first" / "checkpoints")


def test_full_memory_while_measuring_loses_no_step_and_no_trained_value(
    home: Path, toy_model: Path, averaged: Path
) -> None:
    """The averages are in place of the adapters just then."""
    config = config_of(home, toy_model, "measured", *SIZES, *AVERAGED)
    folder = Path(config.output_dir)

    def measuring(_: Tensor) -> bool:
        metrics = folder / "metrics.jsonl"
        begun = metrics.is_file() and '"step": 3' in metrics.read_text()
        return begun and not torch.is_grad_enabled()

    with full_memory("WanRotaryPosEmbed", measuring), pytest.raises(TrainingStopped) as error:
        run(config)
    assert "is full, while measuring after 4 steps, which is predicted to take" in str(error.value)
    assert_goes_on(config, 4, averaged)


def test_full_memory_while_encoding_is_told_so(home: Path, toy_model: Path, tmp_path: Path) -> None:
    config = config_of(home, toy_model, "encoded", *SIZES, f"data.cache={tmp_path / 'cache'}")
    with full_memory("WanEncoder3d", lambda _: True), pytest.raises(TrainingStopped) as error:
        run(config)
    assert "is full, while encoding, which is predicted to take" in str(error.value)


def test_full_memory_while_loading_is_told_so(home: Path, toy_model: Path) -> None:
    made = torch.optim.AdamW.__init__

    @wraps(made)
    def make(optimizer: torch.optim.AdamW, groups: list[dict], **settings: Any) -> None:
        made(optimizer, groups, **settings)
        if sum(len(group["params"]) for group in groups) > 2:  # those of the check before
            run_out()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", make)
        with pytest.raises(TrainingStopped, match="is full, while loading, which is predicted"):
            run(config_of(home, toy_model, "loaded", *SIZES))


def test_no_room_for_what_an_optimizer_remembers_loses_no_step_of_the_other_expert(
    home: Path, toy_model: Path, whole: Path
) -> None:
    """High has done three steps when low takes its first, and half of it is done."""
    stepped, calls = torch.optim.AdamW.step, []

    @wraps(stepped)
    def step(optimizer: torch.optim.AdamW) -> None:
        calls.append(optimizer)
        stepped(optimizer)
        if len(calls) > 2 and optimizer is not calls[-2]:  # the first are those of the check
            run_out()

    config = config_of(home, toy_model, "optimizer", *SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(TrainingStopped, match="is full, in step 4: "):
            run(config)
    assert_goes_on(config, 3, whole)


def test_full_memory_on_the_way_back_loses_no_step(
    home: Path, toy_model: Path, whole: Path
) -> None:
    error_of, calls = learner.error_of, []

    def error(transformer: WanTransformer3DModel, inputs: StepInputs) -> Tensor:
        losses = error_of(transformer, inputs)
        calls.append(losses.shape)
        if len(calls) == 8:  # the second batch of the third step
            losses.register_hook(lambda _: run_out())
        return losses

    config = config_of(home, toy_model, "backward", *SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "error_of", error)
        with pytest.raises(TrainingStopped, match="is full, in step 3: "):
            run(config)
    assert_goes_on(config, 2, whole)


@pytest.mark.parametrize("updating", ["adapter", "average"])
def test_full_memory_in_a_later_update_loses_no_step(
    home: Path, toy_model: Path, averaged: Path, updating: str
) -> None:
    """High's third step, and all of it or of the average after it has been changed."""
    stepped, followed, calls = torch.optim.AdamW.step, learner.follow_adapter, []

    @wraps(stepped)
    def step(optimizer: torch.optim.AdamW) -> None:
        stepped(optimizer)
        raise_at_third(optimizer.param_groups[0]["params"], "adapter")

    def follow(average: Average, step: int) -> None:
        followed(average, step)
        raise_at_third(average.parameters, "average")

    def raise_at_third(changed: list[nn.Parameter], what: str) -> None:
        calls.extend([what] * (what == updating and len(changed) > 2))  # fewer are the check's
        if len(calls) == 3:
            run_out()

    config = config_of(home, toy_model, f"late_{updating}", *SIZES, *AVERAGED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(learner, "follow_adapter", follow)
        with pytest.raises(TrainingStopped, match="is full, in step 3: "):
            run(config)
    assert_goes_on(config, 2, averaged)


def test_of_several_processes_the_one_whose_memory_is_full_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    for error, told in ((MemoryFull("it is full"), "error: it is full\n"), (ConfigError("x"), "")):
        with pytest.raises(SystemExit), clear_errors():
            raise error
        assert capsys.readouterr().err == told
