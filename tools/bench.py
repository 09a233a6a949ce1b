"""Speed against the limit, both measured in the same run.

python -m tools.bench step                                  # on a GPU: floor, reference, presets
python -m tools.bench gradients                             # exactness of each format of weights
python -m tools.bench profile --blocks 4 --keep attention   # which kernels take how long
python -m tools.bench fit --cap 24 --frozen nf4             # a whole expert on a smaller card
python -m tools.bench sample                                # both experts, random weights, by phase
python -m tools.bench cache DIR --clips 48 --workers 8      # DIR holds a few videos; on a GPU
python -m tools.bench cache datasets/demo/train --variant tiny --clips 16
python -m tools.bench model DIR --variant t2v_a14b          # DIR of python -m tools.random_model

`step` times a training step at full width with random weights, round by round beside the card's
large kernels alone (the floor) and beside diffusers and PEFT as their documentation has it (the
reference); all forty blocks by default; then how far gradients are from those in fp32, for our bf16
and for each format in fewer bits. `gradients` compares the gradients of all adapters with those in
fp32. `fit` trains a few steps under a cap of memory. `sample` samples a video with both experts and
decodes it.

`cache` fills a cache with clips of DIR (repeated until there are enough, each its own file) and
compares with the VAE alone on the same tensors, already in memory: their ratio is the share of the
time in which the encoder was at work. It also prints how far latents in bf16 are from fp32. The VAE
has its real size and random weights, but for `tiny`, whose weights are in this repository.

`model` loads all of a model, trains each expert for two steps, samples a video and prints how long
each took (of the steps, the second) and the peak of memory. Each prints lines of JSON.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from tools.bench_cache import bench_cache
from tools.bench_fit import Setup, bench_fit
from tools.bench_model import bench_model
from tools.bench_profile import bench_profile
from tools.bench_random import Shape
from tools.bench_sample import bench_sample
from tools.bench_step import PRESETS, bench_steps, gradient_errors
from wan.speed_choices import INPUT_PLACES, KEEPS, FrozenFormat
from wan.variants import VARIANTS, Variant

EXACT_BLOCKS = 2  # in fp32 beside
SHAPES: list[Shape] = [(81, 480, 832), (1, 1024, 1024)]


def main() -> None:
    """Read the command line and print lines of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(required=True, dest="what")
    step, gradients = (what.add_parser(name) for name in ("step", "gradients"))
    profile, fit = (what.add_parser(name) for name in ("profile", "fit"))
    sample, cache, model = (what.add_parser(name) for name in ("sample", "cache", "model"))
    for each in (step, gradients, profile, fit, sample, cache, model):
        each.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
    for each, default in (
        (step, SHAPES),
        (gradients, SHAPES[1:]),
        (profile, SHAPES),
        (fit, SHAPES[:1]),
        (sample, SHAPES[:1]),
        (model, None),
    ):
        each.add_argument("--shapes", type=_shape, nargs="+", default=default, help="81x480x832 …")
    for each, default in ((step, 40), (gradients, 4), (profile, 4), (fit, 40), (sample, 40)):
        each.add_argument("--blocks", type=int, default=default)
    step.add_argument("--rounds", type=int, default=2)
    names = [preset.name for preset in PRESETS]
    step.add_argument("--presets", nargs="+", choices=names, default=names, help="all by default")
    fit.add_argument("--cap", type=float, help="GiB of the card; all of it by default")
    fit.add_argument("--placement", choices=("resident", "stream"), default="resident")
    sample.add_argument("--placement", choices=("resident", "swap", "stream"), default="swap")
    sample.add_argument(
        "--steps", type=int, nargs="+", default=[4, 40], help="4: distilled, without guidance"
    )
    for each in (profile, fit, sample):
        each.add_argument("--frozen", choices=("fp8", "fp8_weights", "int8", "nf4"))
    for each in (profile, fit):
        each.add_argument("--keep", choices=("auto", *KEEPS), default="auto")
    fit.add_argument("--inputs", choices=INPUT_PLACES, default="device")
    fit.add_argument("--steps", type=int, default=3)
    fit.add_argument("--eager", action="store_true")
    cache.add_argument("folder", type=Path)
    cache.add_argument("--clips", type=int, default=24)
    cache.add_argument("--workers", type=int, default=4)
    cache.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    model.add_argument("folder", type=Path)
    model.add_argument("--sample-steps", type=int, default=4)
    for each, measure in (
        (step, _step),
        (gradients, _gradients),
        (profile, _profile),
        (fit, _fit),
        (sample, _sample),
        (cache, _cache),
        (model, _model),
    ):
        each.set_defaults(measure=measure)
    arguments = parser.parse_args()
    arguments.measure(VARIANTS[arguments.variant], arguments)


def _step(facts: Variant, asked: argparse.Namespace) -> None:
    presets = [preset for preset in PRESETS if preset.name in asked.presets]
    bench_steps(facts, asked.blocks, asked.shapes, asked.rounds, presets)
    formats: list[FrozenFormat | None] = [None, *(p.frozen for p in presets if p.frozen)]
    if len(formats) > 1:
        least = min(asked.shapes, key=math.prod)
        errors = gradient_errors(facts, EXACT_BLOCKS, least, formats)
        print(json.dumps({"gradients_against_fp32": errors}), flush=True)


def _gradients(facts: Variant, asked: argparse.Namespace) -> None:
    for shape in asked.shapes:
        print(json.dumps(gradient_errors(facts, asked.blocks, shape)), flush=True)


def _profile(facts: Variant, asked: argparse.Namespace) -> None:
    for shape in asked.shapes:
        bench_profile(facts, asked.blocks, shape, asked.frozen, asked.keep)


def _fit(facts: Variant, asked: argparse.Namespace) -> None:
    compiled = not asked.eager
    setup = Setup(
        asked.cap, asked.placement, asked.frozen, asked.keep, asked.inputs, compiled, asked.steps
    )
    for shape in asked.shapes:
        print(json.dumps(bench_fit(facts, asked.blocks, shape, setup)), flush=True)


def _sample(facts: Variant, asked: argparse.Namespace) -> None:
    for shape in asked.shapes:
        bench_sample(facts, asked.blocks, shape, asked.steps, asked.placement, asked.frozen)


def _cache(facts: Variant, asked: argparse.Namespace) -> None:
    dtype = getattr(torch, asked.dtype)
    print(json.dumps(bench_cache(asked.folder, facts, asked.clips, asked.workers, dtype)))


def _model(facts: Variant, asked: argparse.Namespace) -> None:
    for shape in asked.shapes or [(facts.frames, facts.height, facts.width)]:
        found = bench_model(asked.folder, facts, shape, asked.sample_steps)
        print(json.dumps(found), flush=True)


def _shape(text: str) -> Shape:
    """81x480x832 as (frames, height, width)."""
    frames, height, width = (int(number) for number in text.split("x"))
    return frames, height, width


if __name__ == "__main__":
    main()
