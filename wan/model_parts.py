"""Which weights are a part of a model: the user's file, or the one of a folder that can be it.

Nothing is chosen in silence where two would do.
"""

from pathlib import Path

from wan.headers import ModelError
from wan.model_checks import KEY_OF_PART, KIND_OF_PART, NAME_OF_PART, checked, is_other_expert
from wan.model_files import INCOMPLETE, Scan, pickles, read_json, set_of, weight_sets
from wan.recognise import Part, Weights, expert_by_name, recognise
from wan.variants import FOLDER_OF_EXPERT, Variant

FOLDER_OF_PART: dict[Part, str] = {
    **FOLDER_OF_EXPERT,
    "vae": "vae",
    "text_encoder": "text_encoder",
}
MOST_LISTED = 4


def part_of_file(file: Path, part: Part, facts: Variant) -> Weights:
    """The part in a file that the user named, or in it and its other shards."""
    return checked(recognise(set_of(file)), part, facts)


def part_of_diffusers(folder: Path, part: Part, facts: Variant) -> Weights:
    """The part in its own folder of a diffusers folder, which must hold a config.json."""
    inner = folder / FOLDER_OF_PART[part]
    if part == "low" and not inner.is_dir():
        raise ModelError(
            f"{folder} has no {inner.name}: {facts.title} consists of two transformers, this model "
            "of one (as those of Wan 2.1 and TI2V-5B do); give a folder that holds both"
        )
    read_json(inner / "config.json")
    sets = weight_sets(inner)
    if not sets:
        unsafe = "".join(f"; {name} is not read, as it may run code" for name in pickles(inner)[:1])
        raise ModelError(f"{inner} has no safetensors file{unsafe}; {INCOMPLETE}")
    if len(sets) > 1:
        raise _several([files[0] for files in sets], part)
    return checked(recognise(sets[0]), part, facts)


def part_of_scan(scan: Scan, folder: Path, part: Part, facts: Variant, named: bool) -> Weights:
    """The one set of weights in a folder that is this part.

    `named`: the folder was given for this part alone, so an expert need not be told by its name.
    `ModelError` if none fits or if several do.
    """
    fits: list[Weights] = []
    untold: list[Weights] = []
    refused: list[str] = []
    for found in scan.found:
        if found.kind != KIND_OF_PART[part] or is_other_expert(found, part):
            continue
        try:
            weights = checked(found, part, facts)
        except ModelError as error:
            refused.append(str(error))
            continue
        told = part not in ("high", "low") or expert_by_name(found.files[0]) is not None
        (fits if told else untold).append(weights)
    fits = fits or (untold if named else [])
    if len(fits) > 1:
        raise _several([weights.files[0] for weights in fits], part)
    if fits:
        return fits[0]
    unnamed = [weights.files[0] for weights in untold]
    raise _none(folder, part, facts, unnamed, refused or scan.problems)


def _several(files: list[Path], part: Part) -> ModelError:
    listed = ", ".join(map(str, files[:MOST_LISTED])) + (" …" if len(files) > MOST_LISTED else "")
    return ModelError(
        f"{len(files)} files can be the {NAME_OF_PART[part]}: {listed}; say which, with "
        f"{KEY_OF_PART[part]}=…"
    )


def _none(
    folder: Path, part: Part, facts: Variant, untold: list[Path], reasons: list[str]
) -> ModelError:
    missing = f"{folder} has no {NAME_OF_PART[part]} of {facts.title}"
    if untold:
        listed = ", ".join(str(file) for file in untold[:MOST_LISTED])
        return ModelError(
            f"{missing} that says so by its name: nothing tells whether {listed} is of high or "
            "low noise; say it, with model.high=… and model.low=…"
        )
    if reasons:
        return ModelError(f"{missing}: {'; '.join(reasons[:MOST_LISTED])}")
    unsafe = "".join(f" ({name} is not read, as it may run code)" for name in pickles(folder)[:1])
    return ModelError(f"{missing}{unsafe}; {INCOMPLETE}, or set {KEY_OF_PART[part]}=…")
