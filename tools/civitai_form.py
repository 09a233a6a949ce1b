"""civitai.json: what the forms of CivitAI ask for, and how each adapter was trained."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from tools.comfy_workflow import Scene, comfy_split
from tools.finished_run import Adapter, FinishedRun
from wan.lora_metadata import OURS
from wan.variants import Expert

# What of the metadata says how an adapter was trained, and in which words.
SETTINGS = {
    "rank": "ss_network_dim",
    "alpha": f"{OURS}original_alpha",
    "steps": "ss_steps",
    "learning rate": "ss_learning_rate",
    "schedule": "ss_lr_scheduler",
    "warm-up steps": "ss_lr_warmup_steps",
    "optimizer": "ss_optimizer",
    "gradient accumulation": "ss_gradient_accumulation_steps",
    "mixed precision": "ss_mixed_precision",
    "seed": "ss_seed",
    "clips": "ss_num_train_items",
    "resolution": "modelspec.resolution",
    "timestep shift": f"{OURS}shift",
    "timestep law": f"{OURS}timestep_law",
    "finished": "modelspec.date",
    "base model hash": f"{OURS}base_model_hash",
    "dataset hash": f"{OURS}dataset_hash",
    "pair": f"{OURS}pair_id",
}


def training_settings(metadata: Mapping[str, str]) -> dict[str, str]:
    """How an adapter was trained, in words, from the metadata of its file."""
    settings = {name: metadata[key] for name, key in SETTINGS.items() if key in metadata}
    return {"layers": json.loads(metadata["ss_network_args"])["targets"], **settings}


def civitai_form(run: FinishedRun, scene: Scene) -> str:
    """The text of civitai.json: one version for each file, as files of one version conflict."""
    trigger = run.config.data.trigger
    form = {
        "name": run.title,
        "type": "LORA",
        "base_model": run.facts.base_model,
        "trained_words": [trigger] if trigger else [],
        "versions": [
            _version(run, expert, adapter, scene.adapters[expert][1])
            for expert, adapter in run.adapters.items()
        ],
        "sampling": _sampling(run, scene),
    }
    return json.dumps(form, indent=2, ensure_ascii=False) + "\n"


def _version(
    run: FinishedRun, expert: Expert, adapter: Adapter, strength: float
) -> dict[str, object]:
    return {
        "name": run.title if expert == "single" else f"{run.title} ({expert} noise)",
        "expert": expert,
        "file": adapter.path.name,
        "size_bytes": adapter.size_bytes,
        "recommended_strength": strength,
        "hashes": {
            "SHA256": adapter.hashes.sha256.upper(),
            "AutoV2": adapter.hashes.autov2.upper(),
            "AutoV3": adapter.hashes.autov3.upper(),
        },
        "training": training_settings(adapter.metadata),
        "heldout_loss": asdict(run.losses[expert]),
    }


def _sampling(run: FinishedRun, scene: Scene) -> dict[str, object]:
    facts, settings = run.facts, scene.settings
    sampling: dict[str, object] = {
        "seed": scene.seed,
        "steps": settings.steps,
        "shift": settings.shift,
        "guidance": {expert: settings.guidance.of(expert) for expert in facts.experts},
        "frames": settings.frames,
        "fps": facts.fps,
        "width": settings.width,
        "height": settings.height,
    }
    if facts.boundary is not None:
        split = comfy_split(settings.steps, settings.shift, facts.boundary)
        sampling["steps_in_comfyui"] = {"high": split, "low": settings.steps - split}
    return sampling
