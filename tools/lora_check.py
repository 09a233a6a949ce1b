"""What is in adapter files, what is wrong with them, and which programs will load them.

    python -m tools.lora check fox_high_noise.safetensors fox_low_noise.safetensors
    python -m tools.lora check FILE... --json

Exit status: 0 if no error was found, 1 if one was, 2 if a file cannot be read.
"""

import argparse
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path

from wan.adapter_check import (
    Check,
    Finding,
    check_adapter,
    dead_modules,
    kinds_of_norms,
    linears_by_block,
)
from wan.adapter_choices import BLOCK_LINEARS
from wan.adapter_keys import Style
from wan.adapter_pair import pair_findings, pairs_among
from wan.adapter_stream import short
from wan.headers import ModelError
from wan.lora_metadata import OURS
from wan.variants import VARIANTS

WIDTH = 100  # of the report

LAYOUTS: dict[Style, str] = {
    "comfy": "comfy: diffusion_model. and official names",
    "kohya": "kohya: lora_unet_ and official names",
    "diffusers": "diffusers: transformer. and names of diffusers",
    "official": "official names without a prefix",
    "peft": "PEFT's own: base_model.model.",
    "fun": "Wan-Fun: lora_unet__ and official names",
    "comfy_diffusers": "diffusion_model. and names of diffusers",
    "transformer_2": "transformer_2. and names of diffusers",
    "stages": "diffusion_model.transformer_1. or 2. and official names",
}
SHOWN_ENTRIES = {  # metadata -> what it is called in the report
    "modelspec.title": "title",
    f"{OURS}pair_id": "pair",
    "modelspec.trigger_phrase": "trigger",
    "ss_steps": "steps",
    f"{OURS}weights": "weights",
    f"{OURS}heldout_loss": "held-out loss",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `check` to the program."""
    parser = subparsers.add_parser(
        "check", help="what is in adapter files, what is wrong, which programs load them"
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the files one by one, and as pairs; leaves with the exit status."""
    checks: list[Check] = []
    unreadable: dict[str, str] = {}
    for path in dict.fromkeys(args.files):
        try:
            checks.append(check_adapter(path))
        except ModelError as error:
            unreadable[str(path)] = str(error)
    pairs = [(one, other, pair_findings(one, other)) for one, other in pairs_among(checks)]
    if args.json:
        print(json.dumps(_as_json(checks, pairs, unreadable), indent=2))
    else:
        report = [_report(check) for check in checks]
        report += [_pair_report(one, other, found) for one, other, found in pairs]
        print("\n\n".join("\n".join(lines) for lines in report))
        for message in unreadable.values():
            sys.stderr.write(f"error: {message}\n")
    if unreadable:
        raise SystemExit(2)
    broken_pair = any(finding.level == "error" for *_, found in pairs for finding in found)
    raise SystemExit(int(broken_pair or any(check.has_errors for check in checks)))


def _report(check: Check) -> list[str]:
    contents = check.contents
    dtypes = " and ".join(contents.dtypes) or "no data"
    size = f"{contents.size / 1e6:.1f} MB, {contents.tensors} tensors, {dtypes}"
    facts = {
        "layout": "; ".join(LAYOUTS[style] for style in contents.styles) or "none that is known",
        "model": _model(check),
        "expert": _expert(check),
        "modules": _modules(check),
        "rank": _rank(check),
        "scale": _scale(check),
        "change": _change(check),
        "hashes": f"AutoV2 {contents.file_sha256[:10]}, AutoV3 {contents.data_sha256[:12]}",
        "made": _made(check),
    }
    lines = [f"{contents.path.name}  ({size})"]
    lines += [f"  {name:<9} {text}" for name, text in facts.items() if text]
    return lines + _loader_lines(check) + _finding_lines(check.findings)


def _loader_lines(check: Check) -> list[str]:
    """One line for all programs that load it without a word, one for each of the others."""
    well = [verdict.loader for verdict in check.verdicts if not verdict.reason]
    lines = textwrap.wrap(
        ", ".join(well) or "nothing without a remark",
        width=WIDTH,
        initial_indent="  loads in  ",
        subsequent_indent=" " * 12,
        break_on_hyphens=False,
    )
    others = [verdict for verdict in check.verdicts if verdict.reason]
    lines += [f"    {v.loader:<21} {v.outcome:<14}  {v.reason}" for v in others]
    return lines


def _finding_lines(findings: tuple[Finding, ...] | list[Finding]) -> list[str]:
    return [f"  {finding.level}: {finding.text}" for finding in findings] or ["  nothing is wrong"]


def _model(check: Check) -> str:
    if check.fit is None:
        return "none that is known"
    told = check.contents.metadata.get(f"{OURS}variant")
    by_metadata = f"; {VARIANTS[told].title} by its metadata" if told in VARIANTS else ""
    return check.fit.title + (by_metadata if len(check.fit.variants) > 1 else "")


def _expert(check: Check) -> str:
    by_metadata, by_name = check.expert_by_metadata, check.expert_by_name
    if by_metadata and by_name and by_metadata != by_name:
        return f"{by_metadata} by its metadata, {by_name} by its name"
    sources = {"metadata": by_metadata, "name": by_name}
    told = " and ".join(source for source, expert in sources.items() if expert)
    return f"{check.expert}, by its {told}" if told else "not told"


def _modules(check: Check) -> str:
    modules = check.contents.modules
    counts = [len(found) for found in linears_by_block(modules).values()]
    per_block = (
        f"{min(counts)} to {max(counts)}" if len({*counts}) > 1 else f"{max(counts, default=0)}"
    )
    layers = f" of {check.fit.family.facts.layers}" if check.fit else ""
    text = f"{per_block} of {len(BLOCK_LINEARS)} linears in each of {len(counts)}{layers} blocks"
    outside = len(modules) - sum(counts)
    others = [part for part in check.contents.parts if part not in ("a", "b", "alpha")]
    also = [f"{outside} other modules"] * bool(outside) + sorted(others)
    return text + (f"; also {', '.join(also)}" if also else "")


def _rank(check: Check) -> str:
    ranks = Counter(module.rank for module in check.contents.modules.values())
    if len(ranks) == 1:
        return str(next(iter(ranks)))
    return ", ".join(f"{rank} in {count} modules" for rank, count in sorted(ranks.items()))


def _scale(check: Check) -> str:
    modules = check.contents.modules.values()
    scales = sorted({module.scale for module in modules})
    if not scales:
        return ""
    alphas = sorted({module.alpha for module in modules if module.alpha is not None})
    span = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    if not alphas:
        return f"{span} (no alpha)"
    return f"{span} (alpha {alphas[0]:g}{f' to {alphas[-1]:g}' if len(alphas) > 1 else ''})"


def _change(check: Check) -> str:
    norms = kinds_of_norms(check.contents)
    if not norms:
        return ""
    dead = len(dead_modules(check.contents))
    parts = ", ".join(f"{part} {norm:.4g}" for part, norm in norms.items())
    return f"norm of {parts}" + (f"; 0 in {dead} modules" if dead else "")


def _made(check: Check) -> str:
    entries = check.contents.metadata
    told = [
        f"{name} {short(entries[key])[1:-1]}"
        for key, name in SHOWN_ENTRIES.items()
        if key in entries
    ]
    return ", ".join(told)


def _pair_report(one: Check, other: Check, findings: list[Finding]) -> list[str]:
    names = f"{one.contents.path.name} and {other.contents.path.name}"
    if findings:
        return [f"pair: {names}", *_finding_lines(findings)]
    return [f"pair: {names}", "  one training, one file for each expert"]


def _as_json(
    checks: list[Check],
    pairs: list[tuple[Check, Check, list[Finding]]],
    unreadable: dict[str, str],
) -> dict[str, object]:
    return {
        "files": [_file_as_json(check) for check in checks],
        "pairs": [
            {
                "files": [str(one.contents.path), str(other.contents.path)],
                "findings": [vars(finding) for finding in findings],
            }
            for one, other, findings in pairs
        ],
        "unreadable": unreadable,
    }


def _file_as_json(check: Check) -> dict[str, object]:
    contents = check.contents
    modules = contents.modules
    return {
        "path": str(contents.path),
        "size": contents.size,
        "layouts": dict(contents.styles),
        "model": check.fit.title if check.fit else None,
        "expert_by_metadata": check.expert_by_metadata,
        "expert_by_name": check.expert_by_name,
        "dtypes": dict(contents.dtypes),
        "ranks": dict(Counter(module.rank for module in modules.values())),
        "linears_by_block": [len(found) for found in linears_by_block(modules).values()],
        "modules": {
            name: {
                "rank": m.rank,
                "alpha": _finite(m.alpha),
                "scale": _finite(m.scale),
                "norm": m.norm,
            }
            for name, m in modules.items()
        },
        "dead": dead_modules(contents),
        "not_finite": contents.not_finite,
        "unknown": contents.unknown,
        "orphans": contents.orphans,
        "misshapen": contents.misshapen,
        "sha256": contents.file_sha256,
        "data_sha256": contents.data_sha256,
        "metadata": contents.metadata,
        "findings": [vars(finding) for finding in check.findings],
        "loaders": [vars(verdict) for verdict in check.verdicts],
        "has_errors": check.has_errors,
    }


def _finite(number: float | None) -> float | None:
    """JSON has no NaN."""
    return number if number is not None and abs(number) < float("inf") else None
