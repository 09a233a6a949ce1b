"""A LoRA from CivitAI or Hugging Face, both files of a pair, checked on arrival.

    python -m tools.lora fetch "https://civitai.com/models/123?modelVersionId=456"
    python -m tools.lora fetch urn:air:wanvideo-22-t2v-a14b:lora:civitai:123@456
    python -m tools.lora fetch hf://owner/name/fox_high_noise.safetensors --to adapters

Tokens come from the environment alone: CIVITAI_TOKEN, HF_TOKEN. A transfer that broke off goes on
where it stopped when the command is given again.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

from tools.adapter_sources import CIVITAI, HUGGING_FACE, find_adapter
from tools.download import (
    RemoteFile,
    check_size,
    check_space,
    downloaded,
    is_there,
    still_needed,
)
from tools.public_web import Patience, Site
from wan.adapter_check import Check, check_adapter
from wan.adapter_pair import pair_findings
from wan.headers import ModelError

FOLDER = Path("outputs/fetched")  # ignored by git


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `fetch` to the program."""
    parser = subparsers.add_parser("fetch", help="a LoRA from CivitAI or Hugging Face")
    parser.add_argument(
        "source", metavar="SOURCE", help="an address, an AIR, hf://owner/name/FILE or owner/name"
    )
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="DIR", help=f"{FOLDER}")
    parser.add_argument("--max-gb", type=_positive, default=2.0, help="of one file; 2")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fetch what the command line names and say what it is."""
    try:
        fetch(args.source, args.to, int(args.max_gb * 1e9), Patience(), CIVITAI, HUGGING_FACE)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from there\n")
        raise SystemExit(130) from None


def fetch(
    source: str,
    folder: Path,
    most_bytes: int,
    patience: Patience,
    civitai: Site,
    hugging_face: Site,
) -> list[Path]:
    """Bring the file or the pair into `folder`; `ModelError` with nothing half done under a name.

    Everything that can be known before a transfer is checked before the first one.
    """
    found = find_adapter(source, patience, civitai, hugging_face)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder} cannot be made ({error.strerror})") from None
    targets = {folder / remote.name: remote for remote in found.files}
    missing = {target: remote for target, remote in targets.items() if not is_there(target, remote)}
    for remote in missing.values():
        check_size(remote, remote.size or 0, most_bytes)
    check_space(folder, sum(still_needed(*entry) for entry in missing.items()))
    checks: list[Check] = []
    for target, remote in targets.items():
        if target not in missing:
            print(f"{target} is there already")
            checks.append(check_adapter(target))
            continue
        with downloaded(remote, target, found.site, most_bytes, patience) as file:
            checks.append(_checked(file, remote))
        print(f"{target}")
        print(f"  {_description(checks[-1], remote)}")
    if len(checks) == 2:
        for finding in pair_findings(*checks):
            print(f"{finding.level}: as a pair, {finding.text}")
    print(f"{shlex.join(['python', '-m', 'tools.lora', 'check', *map(str, targets)])} tells more")
    return [*targets]


def _checked(file: Path, remote: RemoteFile) -> Check:
    """What has arrived; `ModelError` if it is no adapter, as far as can be told."""
    try:
        check = check_adapter(file)
    except ModelError as error:
        text = str(error).removeprefix(f"{file} ")
        raise ModelError(f"{remote.name} {text}; what had arrived was removed") from None
    if not check.contents.parts:
        raise ModelError(
            f"{remote.name} holds {check.contents.tensors} tensors and no adapter for Wan among "
            "them: what had arrived was removed"
        )
    return check


def _description(check: Check, remote: RemoteFile) -> str:
    """Model, expert, rank, size and whether the hash was told."""
    ranks = sorted({module.rank for module in check.contents.modules.values()})
    span = " to ".join(map(str, ranks if len(ranks) < 2 else (ranks[0], ranks[-1])))
    rank = f"rank {span}" if ranks else "no plain LoRA"
    model = check.fit.title if check.fit else "for no model that is known"
    expert = f"{check.expert} expert" if check.expert else "expert not told"
    size = f"{check.contents.size / 1e6:.1f} MB"
    sha256 = "as the site tells" if remote.sha256 else "which the site does not tell"
    return f"{model}, {expert}, {rank}, {size}, SHA256 {check.contents.file_sha256}, {sha256}"


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number
