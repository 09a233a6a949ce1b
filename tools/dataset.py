"""What the model will see of your dataset: a table here, and a page that shows every clip.

    python -m tools.dataset experiment=demo                  # writes outputs/demo_dataset.html
    python -m tools.dataset experiment=demo --only rolling --limit 20
    python -m tools.dataset experiment=demo --roundtrip      # also through the VAE, with PSNR
    python -m tools.dataset experiment=demo --prompts        # the final captions and nothing else

The settings are those of training. No model is needed, but for the number of tokens and the VAE.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data.files import Progress
from tools.dataset_cards import Entry, entries_of, final_prompts, make_page
from tools.dataset_page import STATE_WORDS, Page, PageItem, write_page
from tools.dataset_pictures import Shot, add_round_trips, take_shots
from train.compose import compose
from train.config import Config
from train.dataset import plan_dataset
from train.encode import model_paths
from train.errors import clear_errors
from train.rules import ConfigError
from train.tracking import progress_bar
from wan.checkpoints import Model, ModelError, find_model, load_tokenizer, load_vae
from wan.variants import VARIANTS

SHOWN_WINDOWS = 6  # of one item: the first of them, and others spread over the rest
LISTED = 60  # lines of the table without --limit
# What would move the cursor, hide text or turn its direction on a terminal.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def main() -> None:
    """Read the dataset, print the table and write the page."""
    args = _arguments()
    with clear_errors():
        config = compose(args.settings)
        facts, progress = VARIANTS[config.model.variant], progress_bar(True)
        # What cannot be used is shown, not refused.
        plan = plan_dataset(replace(config.data, skip_bad=True), facts, progress)
        wanted = [e for e in entries_of(plan) if args.only in e.item.name][: args.limit]
        if args.prompts:
            for entry in wanted:
                for prompt in final_prompts(entry.item):
                    print(f"{_printable(entry.item.name)}: {_printable(prompt)}")
            return
        model = _model(config, required=args.roundtrip)
        vae = model if args.roundtrip else None
        entries = _photographed(wanted, config, vae, progress)
        page = make_page(config, facts, plan, entries, _tokens(entries, model))
        _print_table(page, args.limit or LISTED)
        path = args.html or Path(f"{config.output_dir}_dataset.html")
        try:
            write_page(path, page)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}). Set --html to a file that can."
            ) from error
        print(f"page       {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="as for training: experiment=demo data.path=…")
    parser.add_argument("--html", type=Path, metavar="FILE", help="where to write the page")
    parser.add_argument("--only", default="", metavar="TEXT", help="items with TEXT in their name")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items")
    parser.add_argument("--roundtrip", action="store_true", help="show clips after the VAE, too")
    parser.add_argument("--prompts", action="store_true", help="print the final captions and stop")
    return parser.parse_intermixed_args()


def _model(config: Config, required: bool) -> Model | None:
    """The configured model, or None with a remark where there is none yet."""
    try:
        return find_model(model_paths(config.model), config.model.variant)
    except ModelError as missing:
        if required:
            raise
        print(f"tokens     are not counted: {missing}", file=sys.stderr)
        return None


def _tokens(entries: Sequence[Entry], model: Model | None) -> dict[str, int]:
    """How many tokens each final prompt has, the end token among them."""
    prompts = list(dict.fromkeys(text for e in entries for text in final_prompts(e.item)))
    if model is None or not prompts:
        return {}
    ids = load_tokenizer(model)(prompts)["input_ids"]
    return {prompt: len(row) for prompt, row in zip(prompts, ids, strict=True)}


def _photographed(
    entries: Sequence[Entry], config: Config, model: Model | None, progress: Progress
) -> list[Entry]:
    """The entries with their shots; with a model, also through its VAE."""
    chosen = [_spread(len(entry.clips)) for entry in entries]
    clips = [entry.clips[i] for entry, picks in zip(entries, chosen, strict=True) for i in picks]
    workers = config.data.workers
    shots: Sequence[Shot] = take_shots(clips, workers, progress)
    if model is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae = load_vae(model, getattr(torch, config.data.vae_dtype), device)
        shots = add_round_trips(shots, vae, workers, progress)
    taken = iter(shots)
    return [
        replace(entry, shots=tuple(next(taken) for _ in picks))
        for entry, picks in zip(entries, chosen, strict=True)
    ]


def _spread(count: int) -> list[int]:
    """At most SHOWN_WINDOWS of `count` places, evenly spread."""
    shown = min(count, SHOWN_WINDOWS)
    return [place * count // shown for place in range(shown)]


def _print_table(page: Page, most: int) -> None:
    print(f"{page.title}: {page.subtitle}")
    print("summary    " + ", ".join(f"{label} {figure}" for label, figure in page.summary))
    for row in page.buckets:
        print(f"shape      {row.bucket}: {row.clips} clips, {row.batches} batches")
    for group in page.groups[:most]:
        print(f"duplicates {group.kind}: {_printable(', '.join(group.names))}")
    for note in page.notes[:most]:
        print(f"note       {_printable(note)}")
    print(f"\n{'':<11}{'shape':<14}{'crop':>5}{'tokens':>8}  name")
    worst_first = sorted(page.items, key=lambda item: (item.state != "dropped", not item.warnings))
    for item in worst_first[:most]:
        print(_row(item))
    if len(page.items) > most:
        print(f"... and {len(page.items) - most:,} more: see the page, or set --limit")


def _row(item: PageItem) -> str:
    facts = dict(item.facts)
    tokens = max((c.tokens for c in item.captions if c.tokens is not None), default="")
    remarks = "; ".join(remark for remark in (item.reason, *item.warnings) if remark)
    text = f"{item.name}: {remarks}" if remarks else item.name
    return (
        f"{STATE_WORDS[item.state]:<11}{facts.get('shape', ''):<14}{facts.get('crop', ''):>5}"
        f"{tokens:>8}  {_printable(text)}"
    )


def _printable(text: str) -> str:
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


if __name__ == "__main__":
    main()
