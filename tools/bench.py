"""Speed against the limit, both measured in the same run.

python -m tools.bench step                                  # on a GPU: floor, reference, presets
python -m tools.bench gradients                             # exactness of each format of weights
python -m tools.bench profile --blocks 4 --keep attention   # which kernels take how long
python -m tools.bench fit --cap 24 --frozen nf4             # a whole expert on a smaller card
python -m tools.bench cache DIR --clips 48 --workers 8      # DIR holds a few videos; on a GPU
python -m tools.bench cache datasets/demo/train --variant tiny --clips 16
python -m tools.bench model DIR --variant t2v_a14b          # DIR of python -m tools.random_model

`step` times a training step at full width with random weights, round by round beside the card's
large kernels alone (the floor) and beside diffusers and PEFT as their documentation has it (the
reference); all forty blocks by default. `gradients` compares the gradients of all adapters with
those in fp32. `fit` trains a few steps under a cap of memory.

`cache` fills a cache with clips of DIR (repeated until there are enough, each its own file) and
compares with the VAE alone on the same tensors, already in memory: their ratio is the share of the
time in which the encoder was at work. It also prints how far latents in bf16 are from fp32. The VAE
has its real size and random weights, but for `tiny`, whose weights are in this repository.

`model` loads all of a model, trains each expert for two steps, samples a video and prints how long
each took (of the steps, the second) and the peak of memory. Each prints lines of JSON.
"""

import argparse
import json
from pathlib import Path

import torch

from tools.bench_cache import bench_cache
from tools.bench_fit import Setup, bench_fit
from tools.bench_model import bench_model
from tools.bench_profile import bench_profile
from tools.bench_step import Shape, bench_steps, gradient_errors
from wan.speed import KEEPS
from wan.variants import VARIANTS

SHAPES: list[Shape] = [(81, 480, 832), (1, 1024, 1024)]


def main() -> None:
    """Read the command line and print lines of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(required=True, dest="what")
    step, gradients = (what.add_parser(name) for name in ("step", "gradients"))
    profile, fit = (what.add_parser(name) for name in ("profile", "fit"))
    cache, model = (what.add_parser(name) for name in ("cache", "model"))
    for each in (step, gradients, profile, fit, cache, model):
        each.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
    for each, default in (
        (step, SHAPES),
        (gradients, SHAPES[1:]),
        (fit, SHAPES[:1]),
        (model, None),
    ):
        each.add_argument("--shapes", type=_shape, nargs="+", default=default, help="81x480x832 …")
    for each, default in ((step, 40), (gradients, 4), (profile, 4), (fit, 40)):
        each.add_argument("--blocks", type=int, default=default)
    step.add_argument("--rounds", type=int, default=3)
    fit.add_argument("--cap", type=float, help="GiB of the card; all of it by default")
    fit.add_argument("--placement", choices=("resident", "stream"), default="resident")
    for each in (profile, fit):
        each.add_argument("--frozen", choices=("fp8", "fp8_weights", "int8", "nf4"))
        each.add_argument("--keep", choices=("auto", *KEEPS), default="auto")
    fit.add_argument("--steps", type=int, default=3)
    fit.add_argument("--eager", action="store_true")
    cache.add_argument("folder", type=Path)
    cache.add_argument("--clips", type=int, default=24)
    cache.add_argument("--workers", type=int, default=4)
    cache.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    model.add_argument("folder", type=Path)
    model.add_argument("--sample-steps", type=int, default=4)
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measure what was asked for."""
    facts = VARIANTS[arguments.variant]
    if arguments.what == "step":
        bench_steps(facts, arguments.blocks, arguments.shapes, arguments.rounds)
    elif arguments.what == "gradients":
        for shape in arguments.shapes:
            print(json.dumps(gradient_errors(facts, arguments.blocks, shape)), flush=True)
    elif arguments.what == "profile":
        for shape in arguments.shapes:
            bench_profile(facts, arguments.blocks, shape, arguments.frozen, arguments.keep)
    elif arguments.what == "fit":
        setup = Setup(
            arguments.cap,
            arguments.placement,
            arguments.frozen,
            arguments.keep,
            compiled=not arguments.eager,
            steps=arguments.steps,
        )
        for shape in arguments.shapes:
            print(json.dumps(bench_fit(facts, arguments.blocks, shape, setup)), flush=True)
    elif arguments.what == "cache":
        dtype = getattr(torch, arguments.dtype)
        found = bench_cache(arguments.folder, facts, arguments.clips, arguments.workers, dtype)
        print(json.dumps(found))
    else:
        shapes = arguments.shapes or [(facts.frames, facts.height, facts.width)]
        for shape in shapes:
            found = bench_model(arguments.folder, facts, shape, arguments.sample_steps)
            print(json.dumps(found), flush=True)


def _shape(text: str) -> Shape:
    """81x480x832 as (frames, height, width)."""
    frames, height, width = (int(number) for number in text.split("x"))
    return frames, height, width


if __name__ == "__main__":
    main()
