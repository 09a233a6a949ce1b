"""README.md of a folder to upload: what the adapters are, how to use them, how they were trained.

Its facts come from the adapters' metadata, the summary of the run and its settings. It names no
folder, no user and no caption; the first preview prompt is in it, as an example.
"""

import json
from collections.abc import Sequence

from tools.civitai_form import training_settings
from tools.comfy_workflow import Scene
from tools.finished_run import FinishedRun
from tools.model_usage import HUB_MODELS, comfyui_section, diffusers_section, render_section


def model_card(run: FinishedRun, scene: Scene, files: Sequence[str]) -> str:
    """The text of README.md, with the head that Hugging Face reads; `files` lie beside it."""
    usage = [render_section(run.facts, scene)]
    if run.facts.name in HUB_MODELS:  # the toy model is known to this project alone
        usage = [comfyui_section(run.facts, scene), diffusers_section(run.facts, scene), *usage]
    parts = [
        _head(run),
        f"# {_line(run.title)}",
        _what(run),
        *_samples(files),
        _files(run, scene),
        *usage,
        _training(run),
        _losses(run),
    ]
    return "\n\n".join(parts) + "\n"


def _head(run: FinishedRun) -> str:
    """The YAML that Hugging Face reads; JSON strings are YAML strings."""
    export, facts = run.config.export, run.facts
    task = "image-to-video" if facts.conditioning == "channels" else "text-to-video"
    known = facts.name in HUB_MODELS
    entries = {
        "base_model": HUB_MODELS.get(facts.name),
        "library_name": "diffusers" if known else None,
        "pipeline_tag": task,
        "instance_prompt": run.config.data.trigger,
        "license": export.license,
        "tags": ["lora", "wan2.2", *(["comfyui"] if known else []), task],
    }
    lines = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in entries.items() if v]
    return "\n".join(["---", *lines, "---"])


def _what(run: FinishedRun) -> str:
    export, facts = run.config.export, run.facts
    pair = "two files, one for each expert" if len(run.adapters) > 1 else "one file"
    whose = f" By {_line(export.author)}." if export.author else ""
    trigger = run.config.data.trigger
    return "\n\n".join(
        line
        for line in (
            export.description or "",
            f"A LoRA for **{facts.title}**: {pair}.{whose} Trained with wan-lora.",
            f"Trigger: `{trigger}`" if trigger else "It has no trigger word.",
        )
        if line
    )


def _samples(files: Sequence[str]) -> list[str]:
    pictures = [f"![samples]({name})" for name in files if name.endswith(".png")]
    videos = [f"[{name}]({name})" for name in files if name.endswith(".mp4")]
    return pictures + ([f"Samples: {', '.join(videos)}"] if videos else [])


def _files(run: FinishedRun, scene: Scene) -> str:
    rows = [
        [
            f"`{adapter.path.name}`",
            "all of it" if expert == "single" else f"{expert} noise",
            f"{scene.adapters[expert][1]:g}",
            f"{adapter.size_bytes / 1e6:.1f} MB",
            adapter.hashes.autov2.upper(),
            adapter.hashes.autov3.upper(),
            adapter.hashes.sha256,
        ]
        for expert, adapter in run.adapters.items()
    ]
    return _table(["file", "for", "strength", "size", "AutoV2", "AutoV3", "SHA256"], rows)


def _training(run: FinishedRun) -> str:
    settings = [training_settings(adapter.metadata) for adapter in run.adapters.values()]
    names = dict.fromkeys(name for found in settings for name in found)
    rows = [[name, *(found.get(name, "") for found in settings)] for name in names]
    return "## Training\n\n" + _table(["", *run.adapters], rows)


def _losses(run: FinishedRun) -> str:
    rows = [
        [
            expert,
            f"{loss.base:.4f}",
            f"{loss.adapted:.4f} ± {loss.standard_error:.4f}",
            f"{loss.adapted / loss.base - 1:+.1%}",
        ]
        for expert, loss in run.losses.items()
    ]
    table = _table(["expert", "base model", "with the adapter", "change"], rows)
    return f"Loss on clips that it was not trained on:\n\n{table}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_line(cell) for cell in line)} |" for line in lines)


def _line(text: str) -> str:
    """On one line, and without what ends a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
