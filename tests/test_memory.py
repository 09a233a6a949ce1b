"""As much of the activations is kept as fits, and what does not pay to measure is not measured."""

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tools.bench_random import adapted, our_loss, random_inputs
from wan.memory import BlockBytes, keep_that_fits, measure_block, peak, set_up_blocks
from wan.speed_choices import INPUT_PLACES, InputPlace, Keep
from wan.variants import VARIANTS

COSTS: dict[Keep, BlockBytes] = {
    "nothing": BlockBytes(kept=2, peak=30),
    "attention": BlockBytes(kept=3, peak=30),
    "products": BlockBytes(kept=10, peak=32),
    "everything": BlockBytes(kept=20, peak=34),
}


def measuring(asked: list[Keep]) -> Callable[[Keep], BlockBytes]:
    def measure(keep: Keep) -> BlockBytes:
        asked.append(keep)
        return COSTS[keep]

    return measure


def test_the_peak_is_one_block_at_work_beside_what_those_before_it_keep() -> None:
    measured = measuring([])
    assert peak(("attention",) * 4, measured) == 3 * 3 + 30
    assert peak(["attention", "attention", "products", "products"], measured) == 2 * 3 + 10 + 32
    # A block that keeps much comes last, and those before it are at their own peak without it.
    assert peak(["attention", "everything"], measured) == 3 + 34


@pytest.mark.parametrize(
    ("budget", "expected", "asked"),
    [
        (1000, ["everything"] * 4, ["attention", "products", "everything"]),
        (20 + 10 + 10 + 34, ["products"] * 2 + ["everything"] * 2, None),
        (3 * 10 + 32, ["products"] * 4, ["attention", "products", "everything"]),
        (3 + 3 + 10 + 32, ["attention"] * 2 + ["products"] * 2, ["attention", "products"]),
        (3 * 3 + 30, ["attention"] * 4, ["attention", "products"]),
        (3 * 2 + 30, ["nothing"] * 4, ["attention", "nothing"]),
        (35, ["host"] * 4, ["attention", "nothing"]),
    ],
)
def test_as_much_is_kept_as_fits(
    budget: int, expected: list[Keep], asked: list[Keep] | None
) -> None:
    measured: list[Keep] = []
    keep = keep_that_fits(4, budget, measuring(measured))
    assert list(keep) == expected
    if asked is not None:
        assert measured == asked


def test_no_choice_that_fits_could_keep_more() -> None:
    measured = measuring([])
    for budget in range(39, 200):
        keep = keep_that_fits(4, budget, measured)
        assert peak(keep, measured) <= budget
        steps: list[Keep] = ["attention", "products", "everything"]
        for index in range(4):
            if keep[index] != "everything" and all(k == keep[index] for k in keep[:index]):
                more = list(keep)
                more[index] = steps[steps.index(keep[index]) + 1]
                if all(k == keep[index] for k in keep[: index + 1]) and (
                    index == 3 or keep[index + 1] != keep[index]
                ):
                    assert peak(more, measured) > budget


def test_on_a_cpu_everything_fits() -> None:
    facts = VARIANTS["tiny"]
    transformer = adapted(facts, 2, torch.float32, torch.device("cpu"), None)
    shape = random_inputs(facts, (5, 32, 32), torch.device("cpu")).x.shape
    assert set_up_blocks(transformer, "auto", False, shape, 1) == ("everything",) * 2
    assert set_up_blocks(transformer, "nothing", False, shape, 1) == ("nothing",) * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("inputs_wait", INPUT_PLACES)
@pytest.mark.parametrize("keep", ["nothing", "attention", "products", "everything"])
def test_the_peak_that_is_foretold_is_that_of_a_step(keep: Keep, inputs_wait: InputPlace) -> None:
    gc.collect()  # the model of the test before, whose end would else fall into a measurement
    device, facts, blocks = torch.device("cuda"), VARIANTS["ti2v_5b"], 8
    transformer = adapted(facts, blocks, torch.bfloat16, device, None)
    inputs = random_inputs(facts, (17, 480, 832), device)
    measured = partial(measure_block, transformer, inputs.x.shape, 1, False, inputs_wait)
    foretold = peak((keep,) * blocks, measured)
    static = 0
    for _ in range(2):
        transformer.zero_grad()
        static = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        our_loss(transformer, inputs).backward()
    assert torch.cuda.max_memory_allocated() - static == pytest.approx(foretold, rel=0.1)
