"""A folder ready to upload, from the folder of a finished run.

    python -m tools.lora publish outputs/anna --out anna_upload

The same run gives the same bytes. `docs/publish.md` says what lies in the folder.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

from tools.civitai_form import civitai_form
from tools.comfy_check import problems
from tools.comfy_graph import editor_format, server_format
from tools.comfy_workflow import TRANSFORMERS, Scene, make_workflow
from tools.finished_run import FinishedRun, read_run, recommended_strengths
from tools.model_card import model_card
from train.rules import ConfigError
from wan.variants import Expert

MOST_STRENGTH = 100


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand `publish` of tools.lora."""
    parser = subparsers.add_parser("publish", help="a folder ready to upload, from a run")
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="folder to write; RUN/publish if not given")
    parser.add_argument(
        "--strength",
        action="append",
        default=[],
        metavar="EXPERT=NUMBER",
        help="recommended strength of an expert's adapter, such as high=0.8; if not given, what "
        "tools.evaluate --sweep recommends, or 1",
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> None:
    """Publish a run as the command line says, and list what was written."""
    run = read_run(args.folder)
    hashes: dict[Expert, str] = {e: found.hashes.sha256 for e, found in run.adapters.items()}
    swept = recommended_strengths(args.folder, hashes)
    strengths = read_strengths(args.strength, run, swept)
    written = publish(run, args.out or args.folder / "publish", strengths)
    print("\n".join(map(str, written)))
    if swept:
        told = ", ".join(f"{expert} {strength:g}" for expert, strength in swept.items())
        print(f"strengths that the sweep of these files recommends: {told}")
    print(f"CivitAI: base model {run.facts.base_model!r}, one version for each adapter")
    if run.facts.name not in TRANSFORMERS:
        print(f"no workflow: ComfyUI does not know {run.facts.title}")
    if not run.videos:
        print("no samples: the run has rendered no previews")


def read_strengths(
    given: list[str], run: FinishedRun, swept: Mapping[Expert, float]
) -> dict[Expert, float]:
    """The strength of each adapter: as given, else as `swept`, else 1; `ConfigError` if odd."""
    strengths: dict[Expert, float] = {e: swept.get(e, 1.0) for e in run.adapters}
    expert_of: dict[str, Expert] = {str(expert): expert for expert in run.adapters}
    for text in given:
        name, _, number = text.partition("=")
        try:
            strengths[expert_of[name]] = float(number)
        except (KeyError, ValueError):
            known = " or ".join(f"{expert}=0.8" for expert in run.adapters)
            raise ConfigError(
                f"--strength {text} is not for an adapter of this run; write {known}"
            ) from None
    for expert, strength in strengths.items():
        if not abs(strength) <= MOST_STRENGTH:
            raise ConfigError(
                f"--strength {expert}={strength:g} is beyond what ComfyUI takes, "
                f"-{MOST_STRENGTH} to {MOST_STRENGTH}; 1 is as trained"
            )
    return strengths


def publish(run: FinishedRun, out: Path, strengths: Mapping[Expert, float]) -> list[Path]:
    """Write the folder; the paths of its files. `ConfigError` if it holds anything else."""
    name = run.config.name
    scene = make_scene(run, strengths)
    copies = {adapter.path.name: adapter.path for adapter in run.adapters.values()}
    copies |= {f"{name}_sample_{i:02d}.mp4": video for i, video in enumerate(run.videos)}
    if run.sheet is not None:
        copies[f"{name}_samples.png"] = run.sheet
    texts = {
        "README.md": model_card(run, scene, list(copies)),
        "civitai.json": civitai_form(run, scene),
    }
    if run.facts.name in TRANSFORMERS:
        nodes = make_workflow(scene, run.facts)
        texts |= {
            f"{name}_comfyui.json": editor_format(nodes),
            f"{name}_comfyui_api.json": server_format(nodes),
        }
        wrong = problems(texts[f"{name}_comfyui.json"])
        assert not wrong, wrong
    _make_folder(out, {*copies, *texts})
    for file, source in copies.items():
        shutil.copyfile(source, out / file)
    for file, text in texts.items():
        (out / file).write_text(text, encoding="utf-8")
    return [out / file for file in sorted({*copies, *texts})]


def make_scene(run: FinishedRun, strengths: Mapping[Expert, float]) -> Scene:
    """The first sample of the run, or what its trigger gives if there were no previews."""
    shot = run.previews.shots[0] if run.previews.shots else None
    return Scene(
        name=run.config.name,
        prompt=shot.prompt if shot else run.config.data.trigger or "",
        negative_prompt=run.previews.negative_prompt,
        seed=shot.seed if shot else 0,
        from_image=run.facts.conditioning == "channels" or bool(run.config.preview.images),
        settings=run.previews.settings,
        adapters={
            expert: (adapter.path.name, strengths[expert])
            for expert, adapter in run.adapters.items()
        },
    )


def _make_folder(out: Path, names: set[str]) -> None:
    """An empty folder, or one with nothing but an earlier version of the same files."""
    if out.is_dir():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in names)
        if foreign:
            raise ConfigError(
                f"{out} holds {foreign[0]}, which is no part of what is published; empty it, or "
                "choose another folder with --out"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be made ({error.strerror}); choose another --out"
        ) from None
