"""The measuring program measures what it says, at toy size."""

import pytest
import torch

from tools.bench_random import adapted, reference
from tools.bench_sample import bench_sample
from tools.bench_step import FORMATS, bench_steps, gradient_errors
from wan.lora import adapter_state
from wan.variants import VARIANTS

TINY = VARIANTS["tiny"]
CPU = torch.device("cpu")


def test_a_step_is_compared_with_floor_and_reference() -> None:
    lines = bench_steps(TINY, 2, [(5, 32, 32), (1, 32, 32)], rounds=1)
    assert [(line["preset"], line["shape"]) for line in lines] == [
        ("bf16, attention kept", [5, 32, 32]),
        ("bf16, auto", [5, 32, 32]),
        ("bf16, auto, inputs in host memory, 80 GiB", [5, 32, 32]),
        ("bf16, auto", [1, 32, 32]),
        ("fp8, auto", [5, 32, 32]),
        ("fp8, auto, inputs in host memory", [5, 32, 32]),
        ("fp8, auto", [1, 32, 32]),
    ]
    for line in lines:
        seconds, floor, against = (
            line[key] for key in ("seconds", "floor_seconds", "reference_seconds")
        )
        assert isinstance(seconds, float)
        assert isinstance(floor, float)
        assert isinstance(against, float)
        assert line["over_floor"] == pytest.approx(seconds / floor, rel=0.2)
        assert line["speed_up"] == pytest.approx(against / seconds, rel=0.2)


def test_reference_and_ours_are_the_same_model() -> None:
    ours = adapted(TINY, 2, torch.bfloat16, CPU, None)
    theirs = reference(TINY, 2, CPU)
    for name, tensor in adapter_state(ours).items():
        assert torch.equal(tensor, theirs.get_parameter(name.replace(".weight", ".default.weight")))
    assert torch.equal(ours.proj_out.weight, theirs.proj_out.weight)


def test_fewer_bits_cost_what_is_said_of_them() -> None:
    errors = gradient_errors(TINY, 2, (1, 64, 64), FORMATS)
    assert errors["bf16"]["relative"] < errors["reference"]["relative"]
    order = [errors[name]["relative"] for name in ("bf16", "int8", "fp8_weights", "fp8", "nf4")]
    assert order == sorted(order)
    assert errors["nf4"]["cosine"] > 0.98


def test_a_sample_is_timed_expert_by_expert() -> None:
    found, distilled = bench_sample(TINY, 2, (5, 32, 32), [8, 4], "swap", None)
    assert (found["high_steps"], found["low_steps"]) == (4, 4)
    for phase in ("high", "low", "decode"):
        seconds = found[f"{phase}_seconds"]
        assert isinstance(seconds, float)
        assert seconds >= 0
    assert (distilled["high_steps"], distilled["low_steps"]) == (2, 2)
    assert distilled["guidance"] == [1.0, 1.0]
