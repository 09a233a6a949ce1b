"""`info`, `convert` and `export` of tools.lora: what a file is, and the same in another layout.

One expert's file is in memory at a time.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from wan.adapter_layouts import PEFT_WEIGHTS, AdapterFile, pair_of, read_any, write_layout
from wan.adapter_names import Layout, block_linear
from wan.adapter_values import Factors
from wan.checkpoints import ModelError
from wan.lora_format import SUFFIX_OF_EXPERT, checked_name, exported_file
from wan.lora_metadata import OURS
from wan.recognise import expert_by_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS = {"modelspec.": "ModelSpec", "ss_": "training, as kohya writes it", OURS: "wan-lora"}
LONGEST = 100  # letters of a value of the metadata that are shown

# Who passes over an adapter on linears outside the blocks (lora_formats.md sections 2.A and 2.F).
SKIP_OUTSIDE = "InvokeAI skips them, WanVideoWrapper skips the head, diffusers < 0.34 fails"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `info`, `convert` and `export` to tools.lora."""
    info = subparsers.add_parser("info", help="what a file is and what it says about itself")
    info.add_argument("files", nargs="+", type=Path, metavar="FILE")
    info.add_argument("--pair", action="store_true", help="also the other expert's file of each")
    _add_alpha(info)
    info.set_defaults(run=show)

    converting = subparsers.add_parser("convert", help="the same adapter in another layout")
    converting.add_argument("files", nargs="+", type=Path, metavar="FILE")
    converting.add_argument("--to", required=True, choices=get_args(Layout), dest="layout")
    converting.add_argument(
        "--pair", action="store_true", help="also the other expert's file of each"
    )
    converting.add_argument("--dtype", choices=DTYPES, help="that of the file, if not given")
    converting.add_argument("--out", required=True, type=Path, metavar="DIR")
    converting.add_argument(
        "--outside-blocks",
        action="store_true",
        help="keep adapters on text, time and head linears, which some loaders skip",
    )
    _add_alpha(converting)
    converting.set_defaults(run=convert)

    exporting = subparsers.add_parser("export", help="the files of a run, in any layout")
    exporting.add_argument("folder", type=Path, metavar="RUN", help="outputs/NAME")
    exporting.add_argument("--step", type=int, help="of a checkpoint; the finished run by default")
    exporting.add_argument("--layout", choices=get_args(Layout), default="comfy")
    exporting.add_argument("--dtype", choices=DTYPES, help="that of the run's files by default")
    exporting.add_argument("--out", required=True, type=Path, metavar="DIR")
    exporting.set_defaults(run=export)


def show(args: argparse.Namespace) -> None:
    """Print what each file is."""
    for number, path in enumerate(_with_pairs(args.files, args.pair)):
        print(("\n" if number else "") + "\n".join(description(read_any(path, args.alpha))))


def convert(args: argparse.Namespace) -> None:
    """Write each file in another layout and say how to load it."""
    files = (read_any(path, args.alpha) for path in _with_pairs(args.files, args.pair))
    _write_all(files, args, args.outside_blocks)


def export(args: argparse.Namespace) -> None:
    """Write the files of a run, finished or after a step, and say how to load them."""
    files = (read_any(path) for path in run_files(args.folder, args.step))
    _write_all(files, args, outside_blocks=False)


def _write_all(
    files: Iterator[AdapterFile], args: argparse.Namespace, outside_blocks: bool
) -> None:
    dtype = DTYPES[args.dtype] if args.dtype else None
    written, base_model = [], ""
    for file in files:
        written.append(convert_file(file, args.out, args.layout, dtype, outside_blocks))
        base_model = file.metadata.get("ss_base_model_version", "")
    print("\n".join(how_to_load(written, args.layout, base_model)))


def convert_file(
    file: AdapterFile, folder: Path, layout: Layout, dtype: torch.dtype | None, outside_blocks: bool
) -> Path:
    """Write an adapter into `folder` under its name; returns the file.

    PEFT gets a folder of that name. `dtype` None keeps the file's, fp32 if it has several.
    `ModelError` if a file is in the way, or some linears are not of blocks and nobody asked.
    """
    outside = [module for module in file.modules if block_linear(module) is None]
    if outside and not outside_blocks:
        raise ModelError(
            f"{file.path} has weights for {len(outside)} linears outside the ten of Wan 2.2's "
            f"blocks ({outside[0]}, …): {SKIP_OUTSIDE}. Give --outside-blocks to keep them"
        )
    name, expert = _name(file.path), expert_by_name(file.path) or "single"
    name += "" if expert_by_name(Path(name)) else SUFFIX_OF_EXPERT[expert]
    target = folder / name / PEFT_WEIGHTS if layout == "peft" else folder / f"{name}.safetensors"
    if target.exists():
        raise ModelError(f"{target} exists; choose another folder with --out")
    kinds = _dtypes(file.modules)
    kept = kinds.pop() if len(kinds) == 1 else torch.float32  # bf16 and fp16 hold not each other's
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_layout(target, file.modules, layout, dtype or kept, file.metadata)
    except OSError as error:
        raise ModelError(f"{target} cannot be written ({error.strerror or error})") from None
    return target


def run_files(folder: Path, step: int | None) -> list[Path]:
    """The adapter files of a run, high first; `ModelError` if it has none (after that step)."""
    try:
        name = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "name")
    except (OSError, YAMLError) as error:
        name, found = None, str(error)
    else:
        found = "its config.yaml has no name"
    if not isinstance(name, str):
        raise ModelError(f"{folder} is not the folder of a run, outputs/NAME ({found})")
    checkpoints = folder / "checkpoints"
    stem = checkpoints / f"{name}_{step:09d}" if step is not None else folder / name
    files = [stem.with_name(f"{stem.name}{end}.safetensors") for end in SUFFIX_OF_EXPERT.values()]
    found = [file for file in files if file.is_file()]
    if not found:
        steps = sorted(_steps(checkpoints, name))
        known = f"there are checkpoints after --step {', '.join(map(str, steps))}"
        raise ModelError(
            f"{folder} has no {files[0].relative_to(folder)}; "
            + (known if steps else "the run has written no adapter yet")
        )
    return found


def description(file: AdapterFile) -> list[str]:
    """Lines about a file: what is in it, what identifies it, what it says about itself."""
    expert = _expert(file)
    facts = exported_file(file.path)
    ranks = Counter(factors.rank for factors in file.modules.values())
    scales = Counter(f"{factors.scale:g}" for factors in file.modules.values())
    blocks = {place[0] for module in file.modules if (place := block_linear(module))}
    dtypes = sorted(str(kind).removeprefix("torch.") for kind in _dtypes(file.modules))
    lines = [
        f"{file.path}",
        f"  layout     {file.layout}",
        f"  expert     {expert}",
        f"  modules    {len(file.modules)} in {len(blocks)} blocks",
        f"  rank       {_counts(ranks)}",
        f"  scale      {_counts(scales)}",
        f"  dtype      {', '.join(dtypes)}",
        f"  size       {facts.size_bytes:,} bytes ({facts.size_bytes / 1e6:.1f} MB)",
        f"  SHA256     {facts.sha256}",
        f"  AutoV2     {facts.autov2}   AutoV3 {facts.autov3}",
    ]
    return lines + _metadata_lines(file.metadata)


def how_to_load(files: Sequence[Path], layout: Layout, base_model: str) -> list[str]:
    """What was written, and how programs load it."""
    lines: list[str] = []
    for file in map(exported_file, files):
        lines.append(
            f"{file.path}\n  {file.size_bytes / 1e6:.1f} MB, scale 1, SHA256 {file.sha256}, "
            f"AutoV2 {file.autov2}, AutoV3 {file.autov3}"
        )
    if layout == "peft":
        return [
            *lines,
            "PEFT       PeftModel.from_pretrained(model, FOLDER); not for sharing",
        ]
    if layout in ("comfy", "kohya"):
        lines.append("ComfyUI    into models/loras; one LoraLoaderModelOnly for each expert")
    if layout == "official":
        lines.append("read by WanVideoWrapper, DiffSynth-Studio, LightX2V and Wan2GP alone")
    else:
        for file in files:
            option = ", load_into_transformer_2=True" if expert_by_name(file) == "low" else ""
            lines.append(f'diffusers  pipe.load_lora_weights("{file}"{option})')
    if layout == "comfy" and base_model:
        two = "; upload high and low as two versions of one model" if len(files) > 1 else ""
        lines.append(f"CivitAI    base model {base_model!r}{two}")
    return lines


def _name(path: Path) -> str:
    """What an adapter is called: PEFT's files all have one name, their folders tell."""
    named = path.absolute().parent if path.name == PEFT_WEIGHTS else path.with_suffix("")
    return checked_name(named.name)


def _add_alpha(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alpha", type=float, help="of a PEFT file whose adapter_config.json is lost"
    )


def _with_pairs(files: Sequence[Path], pair: bool) -> Iterator[Path]:
    """The files, each once; with `pair` each with its sibling."""
    for path in files:
        if pair and len(pair_of(path)) < 2:
            raise ModelError(
                f"{path}: the other expert's file is not beside it; expected names that differ in "
                "high_noise and low_noise alone. Name both files, without --pair"
            )
    both = (found for path in files for found in (pair_of(path).values() if pair else (path,)))
    yield from dict.fromkeys(both)


def _expert(file: AdapterFile) -> str:
    """What the metadata say, else the name; both where they differ."""
    by_name, told = expert_by_name(file.path), file.metadata.get(f"{OURS}expert")
    if told and by_name not in (None, told):
        return f"{told}, though the name says {by_name}: were the two files swapped?"
    return told or (f"{by_name}, by its name" if by_name else "not told")


def _dtypes(modules: Mapping[str, Factors]) -> set[torch.dtype]:
    return {tensor.dtype for factors in modules.values() for tensor in (factors.a, factors.b)}


def _counts(values: "Counter[int] | Counter[str]") -> str:
    """ "16", or "16 (100 modules), 8 (20 modules)"."""
    if len(values) == 1:
        return str(next(iter(values)))
    return ", ".join(f"{value} ({count} modules)" for value, count in values.most_common())


def _metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    if not metadata:
        return ["  metadata   none"]
    lines: list[str] = []
    rest = dict(sorted(metadata.items()))
    for prefix, title in GROUPS.items():
        own = {name: rest.pop(name) for name in [*rest] if name.startswith(prefix)}
        if own:
            lines += ["", f"  {title}", *(_entry(name, value) for name, value in own.items())]
    return lines + (["", "  others", *(_entry(*entry) for entry in rest.items())] if rest else [])


def _entry(name: str, value: str) -> str:
    """One line, whatever a stranger's file holds: control characters would reach the terminal."""
    shown = value if len(value) <= LONGEST else f"{value[:LONGEST]}… ({len(value):,} letters)"
    plain = "".join(letter if letter.isprintable() else "·" for letter in f"{name}  {shown}")
    return f"    {plain}"


def _steps(checkpoints: Path, name: str) -> set[int]:
    digits = (file.name.removeprefix(f"{name}_")[:9] for file in checkpoints.glob(f"{name}_*"))
    return {int(text) for text in digits if text.isdigit()}
