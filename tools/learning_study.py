"""Measure on the toy model what folklore decides: noise levels, rank, rates, experts and more.

    python -m tools.learning_study prepare study.safetensors   # encode the demo's clips, once
    python -m tools.learning_study run OUT --data study.safetensors --seeds 0 1 2 3
    python -m tools.learning_study table OUT/results.jsonl     # as in docs/learning.md

`run` trains many adapters side by side on one device (minutes on a GPU) and appends a line of JSON
for each choice and seed to OUT/results.jsonl; what is there already is not run again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tools.judge import load_judge
from tools.learning_choices import DEFAULT, Choice, Setting, choices
from tools.learning_data import StudyData, load_data
from tools.learning_runs import FACTS, Run, Say, Stage, heldout_losses, train_adapters
from tools.learning_scores import Judging, scores
from tools.learning_stack import Adapters, make_stackable
from tools.learning_tables import tables
from tools.learning_variance import Repeats, spread
from wan.checkpoints import ModelPaths, find_model, load_transformer, load_vae
from wan.variants import EXPERTS, TINY_PATH, Expert

RESULTS = "results.jsonl"
Wanted = tuple[Choice, int]  # with a seed


@dataclass(frozen=True)
class Trained:
    """The adapters of one expert for a group of runs, and how well each does on held-out clips."""

    rows: dict[Run, int]
    adapters: Adapters
    heldout: dict[Run | None, list[float]]  # in noise bins; None: the base


@dataclass(frozen=True)
class Study:
    """What all runs of a study have in common."""

    stages: dict[Expert, Stage]
    judging: Judging
    steps: dict[Expert, int]
    repeats: int  # gradients of which a variance is taken
    batches: int  # of the longer ones

    def scope(self) -> dict[str, object]:
        """What makes results comparable: told in every line."""
        judging = self.judging
        return {
            "steps": list(self.steps.values()),
            "sample_steps": judging.steps,
            "prompts": [judging.concept_prompts, judging.world_prompts],
        }


def main() -> None:
    """Prepare, run or print tables."""
    arguments = parsed()
    if arguments.command == "prepare":
        # Only here: it reads videos, which takes packages that a machine for `run` may lack.
        from tools.learning_prepare import prepare_data

        prepare_data().save(arguments.file)
        print(f"written: {arguments.file} ({arguments.file.stat().st_size / 1e6:.1f} MB)")
    elif arguments.command == "run":
        torch.backends.cudnn.benchmark = True
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        study = make_study(load_data(arguments.data), device, arguments)
        run(study, arguments.out, chosen(arguments.only), arguments.seeds, arguments.together)
    else:
        print(tables(read_results(arguments.file)))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="encode the demo's clips and prompts")
    prepare.add_argument("file", type=Path)
    runs = commands.add_parser("run", help="train, measure and judge")
    runs.add_argument("out", type=Path, help=f"folder of {RESULTS}")
    runs.add_argument("--data", type=Path, required=True, help="file that `prepare` wrote")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--steps", type=int, nargs=2, default=[400, 600], help="of high and low")
    runs.add_argument("--only", default="", help="factors, such as sigma,rank (default: all)")
    runs.add_argument("--together", type=int, default=112, help="runs side by side; memory's bound")
    runs.add_argument("--sample-steps", type=int, default=FACTS.sample_steps)
    runs.add_argument("--prompts", type=int, nargs=2, default=[36, 24], help="of zorbi and world")
    runs.add_argument("--repeats", type=int, default=64, help="gradients of which to take variance")
    runs.add_argument("--batches", type=int, default=16, help="batches of the longer of them")
    table = commands.add_parser("table", help="print the tables in Markdown")
    table.add_argument("file", type=Path, help=f"{RESULTS} of a run")
    return parser.parse_args()


def chosen(only: str) -> list[Choice]:
    """The choices of some factors, comma-separated; the default is always among them."""
    every = choices()
    if not only:
        return every
    factors = {"default", *only.split(",")}
    if unknown := sorted(factors - {choice.factor for choice in every}):
        known = ", ".join(dict.fromkeys(choice.factor for choice in every))
        raise SystemExit(f"error: --only has {unknown[0]!r}, which is no factor; known: {known}")
    return [choice for choice in every if choice.factor in factors]


def make_study(data: StudyData, device: torch.device, arguments: argparse.Namespace) -> Study:
    """Load the toy model and the judge."""
    model = find_model(ModelPaths(str(TINY_PATH)), FACTS.name)
    data, stages = data.to(device), {}
    for expert in EXPERTS:
        transformer = load_transformer(model, expert, torch.float32, device).eval()
        stages[expert] = Stage(expert, transformer, make_stackable(transformer), data)
    judging = Judging(
        load_vae(model, torch.float32, device),
        load_judge().to(device),
        arguments.sample_steps,
        *arguments.prompts,
    )
    steps = dict(zip(EXPERTS, arguments.steps, strict=True))
    return Study(stages, judging, steps, arguments.repeats, arguments.batches)


def run(
    study: Study, out: Path, rows: Sequence[Choice], seeds: Sequence[int], together: int
) -> None:
    """Run what is missing in groups, and append the results of each group when it is done."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / RESULTS
    before = read_results(file) if file.exists() else []
    file.write_text("".join(json.dumps(line) + "\n" for line in before))  # no torn line
    if any(line["scope"] != study.scope() for line in before):
        raise SystemExit(
            f"error: {file} holds results of other steps or prompts "
            f"({before[0]['scope']}, asked for {study.scope()}); name another folder"
        )
    done = {(line["choice"], line["seed"]) for line in before}
    todo = [(row, seed) for seed in seeds for row in rows if (row.name, seed) not in done]
    started = time.monotonic()

    def say(message: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {message}", flush=True)

    for start in range(0, len(todo), together):
        group = todo[start : start + together]
        say(f"runs {start + 1} to {start + len(group)} of {len(todo)}")
        trained: dict[Expert, Trained] = {}
        for expert in EXPERTS:
            trained[expert] = train_group(study, expert, group, say)
        lines = results(study, group, trained)
        say("judged")
        lines += spreads(study, group, trained)
        with file.open("a") as appended:
            appended.writelines(json.dumps(line) + "\n" for line in lines)
        say(f"written to {file}")


def train_group(study: Study, expert: Expert, group: Sequence[Wanted], say: Say) -> Trained:
    """Train each adapter of an expert that the group needs, once, and measure it."""
    stage = study.stages[expert]
    needed = [run_of(choice, expert, seed) for choice, seed in group]
    # One at least: a stack cannot be empty.
    runs = list(dict.fromkeys(r for r in needed if r is not None)) or [Run(Setting(), 0)]
    adapters = train_adapters(stage, runs, study.steps[expert], say)
    found = heldout_losses(stage, adapters.rows([*range(len(runs)), None]))
    heldout = dict(zip([*runs, None], found.tolist(), strict=True))
    return Trained({run: row for row, run in enumerate(runs)}, adapters, heldout)


def run_of(choice: Choice, expert: Expert, seed: int) -> Run | None:
    """The adapter that a choice has for an expert."""
    setting = choice.settings[expert]
    return None if setting is None else Run(setting, seed)


def results(
    study: Study, group: Sequence[Wanted], trained: dict[Expert, Trained]
) -> list[dict[str, object]]:
    """A line for each run: the held-out loss of both experts, and the score of the pair."""
    pairs, losses = {}, {}
    for expert, of in trained.items():
        runs = [run_of(choice, expert, seed) for choice, seed in group]
        pairs[expert] = of.adapters.rows([None if r is None else of.rows[r] for r in runs])
        losses[expert] = [_rounded(of.heldout[r]) for r in runs]
    judged = scores(study.stages, pairs, study.judging)
    return [
        {
            "kind": "run",
            "choice": choice.name,
            "seed": seed,
            "scope": study.scope(),
            "heldout": {expert: losses[expert][number] for expert in trained},
            "score": {name: round(share, 6) for name, share in asdict(judged[number]).items()},
        }
        for number, (choice, seed) in enumerate(group)
    ]


def spreads(
    study: Study, group: Sequence[Wanted], trained: dict[Expert, Trained]
) -> list[dict[str, object]]:
    """Lines of variances, with the adapters of the default as they are after training."""
    lines: list[dict[str, object]] = []
    for choice, seed in group:
        if choice != DEFAULT:
            continue
        for expert, of in trained.items():
            setting = choice.settings[expert]
            assert setting is not None
            row = of.rows[Run(setting, seed)]
            repeats = Repeats(study.repeats, study.batches, seed)
            found = spread(study.stages[expert], of.adapters, row, repeats)
            head = {"kind": "spread", "choice": f"spread {expert}", "expert": expert, "seed": seed}
            lines.append({**head, "scope": study.scope(), **asdict(found)})
    return lines


def _rounded(losses: Sequence[float]) -> list[float]:
    return [round(loss, 5) for loss in losses]


def read_results(file: Path) -> list[dict]:
    """The lines of a file; a last one that was cut off by a killed run does not count."""
    if not file.is_file():
        raise SystemExit(f"error: there is no file {file}; `run` makes OUT/{RESULTS}")
    whole, _, _ = file.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
    main()
