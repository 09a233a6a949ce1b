"""`info` and `convert` of tools.lora: what a file is, and the same in another layout.

One expert's file is in memory at a time.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open

from wan.adapter_layouts import PEFT_WEIGHTS, AdapterFile, pair_of, read_any
from wan.adapter_names import Layout, block_linear
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.headers import ModelError
from wan.loader_rules import LOADERS, Feature, verdict
from wan.lora_format import SUFFIX_OF_EXPERT, checked_name, exported_file
from wan.lora_metadata import OURS
from wan.recognise import expert_by_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS = {"modelspec.": "ModelSpec", "ss_": "training, as kohya writes it", OURS: "wan-lora"}
LONGEST = 100  # letters of a value of the metadata that are shown

NOT_PLAIN: tuple[
    tuple[str, Feature], ...
] = (  # the end of a tensor's name, what it makes of a file
    (".dora_scale", "dora_scale"),
    (".hada_w1_a", "loha"),
    (".lokr_w2_a", "lokr_factored"),
)

# Who passes over an adapter on linears outside the blocks (lora_formats.md sections 2.A and 2.F).
SKIP_OUTSIDE = "InvokeAI skips them, WanVideoWrapper skips the head, diffusers < 0.34 fails"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `info` and `convert` to tools.lora."""
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


def show(args: argparse.Namespace) -> None:
    """Print what each file is."""
    for number, path in enumerate(_with_pairs(args.files, args.pair)):
        lines = description(read_any(path, args.alpha, with_dora=True))
        print(("\n" if number else "") + "\n".join(lines))


def convert(args: argparse.Namespace) -> None:
    """Write each file in another layout and say how to load it."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    written, base_model = [], ""
    for path in _with_pairs(args.files, args.pair):
        file = read_any(path, args.alpha, with_dora=True)
        written.append(convert_file(file, args.out, args.layout, dtype, args.outside_blocks))
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
    target = new_file(folder, name, layout)
    kinds = _dtypes(file.modules)
    kept = kinds.pop() if len(kinds) == 1 else torch.float32  # bf16 and fp16 hold not each other's
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_layout(target, file.modules, layout, dtype or kept, file.metadata, file.dora)
    except OSError as error:
        raise ModelError(f"{target} cannot be written ({error.strerror or error})") from None
    return target


def new_file(folder: Path, name: str, layout: Layout) -> Path:
    """Where an adapter goes, of PEFT into a folder; `ModelError` if something is there already."""
    target = folder / name / PEFT_WEIGHTS if layout == "peft" else folder / f"{name}.safetensors"
    if target.exists():
        raise ModelError(f"{target} exists; choose another folder with --out")
    return target


def description(file: AdapterFile) -> list[str]:
    """Lines about a file: what is in it, what identifies it, what it says about itself."""
    expert = _expert(file)
    facts = exported_file(file.path)
    ranks = Counter(factors.rank for factors in file.modules.values())
    scales = Counter(f"{factors.scale:g}" for factors in file.modules.values())
    blocks = {place[0] for module in file.modules if (place := block_linear(module))}
    dtypes = sorted(str(kind).removeprefix("torch.") for kind in _dtypes(file.modules))
    kind = "DoRA: every row of the weights has a scale of its own" if file.dora else "LoRA"
    lines = [
        f"{file.path}",
        f"  kind       {kind}",
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
    if readers := _readers_of_others(files[0]):
        lines.append(f"this is no plain LoRA: read by {', '.join(readers)} alone")
    elif layout == "official":
        lines.append("read by WanVideoWrapper, DiffSynth-Studio, LightX2V and Wan2GP alone")
    else:
        for file in files:
            option = ", load_into_transformer_2=True" if expert_by_name(file) == "low" else ""
            lines.append(f'diffusers  pipe.load_lora_weights("{file}"{option})')
    if layout == "comfy" and base_model:
        two = "; upload high and low as two versions of one model" if len(files) > 1 else ""
        lines.append(f"CivitAI    base model {base_model!r}{two}")
    return lines


def _readers_of_others(path: Path) -> list[str]:
    """The programs that apply a DoRA, LoHa or LoKr as it was trained; none for a plain LoRA."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    found: list[Feature] = [kind for end, kind in NOT_PLAIN if any(n.endswith(end) for n in names)]
    held: list[Feature] = ["comfy", *found]
    takes = [loader.name for loader in LOADERS if verdict(loader, frozenset(held))[0] == "yes"]
    return takes if found else []


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
