"""What a run will take, before it starts: files, memory in each phase, time, money, disk.

    python -m tools.plan experiment=demo
    python -m tools.plan experiment=t2v_character name=mira model.path=DIR data.path=DIR --gpu 4090
    python -m tools.plan … --gpu h100 --hourly-rate 2.5
    python -m tools.plan … --measure

The settings are those of training. Nothing is written but what is learned of media files into the
cache folder; no weight is read, and no GPU is needed. But for --measure: it encodes a clip of the
most frequent shapes, loads the model, and times three steps on each, after one to warm up.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.filling import MAKE_FIRST
from data.items import DataError
from data.shapes import Bucket
from train import machine, plan, plan_lines
from train.compose import compose
from train.encode import encode_dataset
from train.errors import clear_errors
from train.out_of_memory import Moment, out_of_memory
from train.report import clips_lines
from train.run import Checked
from train.timed_steps import timed_steps
from train.tracking import progress_bar
from wan.cards import CARDS
from wan.weights import parameter_count

CPU = torch.device("cpu")


def main(words: Sequence[str] | None = None) -> None:
    """Print the plan that the words of a command line ask for; None = those of this process."""
    arguments = _arguments(words)
    with clear_errors():
        checked = plan.look_up(compose(arguments.settings), progress_bar(True))
        print("\n".join([*_files(checked), *machine.versions(), machine.wandb(checked)]))
        print("\n".join(machine.disk(checked)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        card = CARDS[arguments.gpu] if arguments.gpu else plan_lines.here(device)
        measured = {}
        if arguments.measure:
            measured = _timed(checked, device)
            lines = plan_lines.measured_lines(checked, measured, arguments.hourly_rate)
            print("\n".join(lines))
        if card is None:
            print(f"plan       no known GPU here: choose one with --gpu, of {', '.join(CARDS)}")
            return
        print(plan_lines.on_card(checked, card, arguments.hourly_rate, measured))
        print(plan_lines.presets(checked, card))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="as for training: experiment=demo data.path=…")
    parser.add_argument("--gpu", choices=CARDS, help="the card to plan for; else that of here")
    parser.add_argument("--measure", action="store_true", help="time real steps on this machine")
    parser.add_argument("--hourly-rate", type=float, metavar="DOLLARS", help="what an hour costs")
    arguments = parser.parse_intermixed_args(words)
    if arguments.gpu and arguments.measure:
        parser.error("--measure times this machine, and --gpu plans for another: leave one out")
    return arguments


def _files(checked: Checked) -> list[str]:
    """The weights that were recognised, the clips, and what of them is in the cache."""
    lines = [f"model      {checked.facts.title}"]
    for part, weights in checked.model.parts.items():
        place = weights.files[0] if len(weights.files) == 1 else weights.files[0].parent
        lines.append(
            f"  {part:<13} {parameter_count(weights):,} numbers in {weights.storage}: {place}"
        )
    return [*lines, clips_lines(checked.clips), f"cache      {_cache_state(checked)}"]


def _timed(checked: Checked, device: torch.device) -> dict[Bucket, float]:
    try:
        return timed_steps(checked, device, progress_bar(True))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(checked.config, device, Moment("training")) from error


def _cache_state(checked: Checked) -> str:
    config = replace(checked.config, data=replace(checked.config.data, encode=False))
    try:
        encode_dataset(
            checked.clips, checked.previews.texts, config, checked.model, CPU, _silent, print
        )
    except DataError as missing:
        return str(missing).removesuffix(f"; {MAKE_FIRST}")
    return f"all of it is in {Path(config.data.cache)}/"


def _silent(steps: Iterable[int], _: str) -> Iterable[int]:
    return steps


if __name__ == "__main__":
    main()
