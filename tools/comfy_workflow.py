"""The ComfyUI workflow that renders with a run's adapters as its previews were rendered.

Native nodes only. The steps of the two experts are split where ComfyUI's own noise levels cross the
boundary of the model; `docs/publish.md` says how they differ from the official ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tools.comfy_graph import Link, Node
from wan.flow import expert_for, shift_sigma
from wan.sample_settings import SampleSettings
from wan.variants import TRAIN_TIMESTEPS, Expert, Variant

# Of the two that keep to the noise levels of "simple", the one that ends nearer to official UniPC
# (tests/test_comfy_workflow.py measures it). ComfyUI's own uni_pc takes other noise levels.
SAMPLER, SCHEDULER = "dpmpp_2m", "simple"

HUB = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
TRANSFORMERS: dict[str, dict[Expert, str]] = {
    "t2v_a14b": {
        "high": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "low": "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    },
    "i2v_a14b": {
        "high": "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "low": "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    },
    "ti2v_5b": {"single": "wan2.2_ti2v_5B_fp16.safetensors"},
}
VAES = {
    "t2v_a14b": "wan_2.1_vae.safetensors",
    "i2v_a14b": "wan_2.1_vae.safetensors",
    "ti2v_5b": "wan2.2_vae.safetensors",
}

COLUMN = 400  # pixels from one column of nodes to the next
ROW = {"high": 0, "single": 0, "low": 220}  # where the chains of the experts run


@dataclass(frozen=True)
class Scene:
    """What the workflow renders, and with which adapters."""

    name: str  # of the video that ComfyUI saves
    prompt: str
    negative_prompt: str
    seed: int
    from_image: bool
    settings: SampleSettings
    adapters: Mapping[Expert, tuple[str, float]]  # file name and strength of what was trained


def comfy_sigmas(steps: int, shift: float) -> list[float]:
    """The noise level at which each step starts: the scheduler "simple" after ModelSamplingSD3.

    It takes every (1000 / steps)-th, rounded down, of 1000 shifted levels (comfy/samplers.py).
    """
    spacing = TRAIN_TIMESTEPS / steps
    levels = [1 - int(step * spacing) / TRAIN_TIMESTEPS for step in range(steps)]
    return [shift_sigma(level, shift) for level in levels]


def comfy_split(steps: int, shift: float, boundary: float) -> int:
    """How many of ComfyUI's steps the high-noise expert does; the low-noise one does the rest."""
    turns = [expert_for(TRAIN_TIMESTEPS * s, boundary) for s in comfy_sigmas(steps, shift)]
    return turns.count("high")


def needed_files(facts: Variant) -> list[tuple[str, str]]:
    """Folder of `models/` and name of each file of the model that the workflow loads."""
    names = TRANSFORMERS[facts.name].values()
    return [
        *(("diffusion_models", name) for name in names),
        ("text_encoders", TEXT_ENCODER),
        ("vae", VAES[facts.name]),
    ]


def make_workflow(scene: Scene, facts: Variant) -> list[Node]:
    """The graph of a variant that ComfyUI knows: T2V-A14B, I2V-A14B or TI2V-5B."""
    nodes: list[Node] = []
    models: dict[Expert, Link] = {
        expert: _model(nodes, expert, scene, facts) for expert in facts.experts
    }
    vae = _add(
        nodes,
        Node(
            "VAELoader", "VAE", (0, 620), widgets={"vae_name": VAES[facts.name]},
            models=[_download("vae", VAES[facts.name])],
        ),
    )  # fmt: skip
    start = _conditioning(nodes, scene, facts, vae)
    if facts.boundary is None:
        latents = _sample_single(nodes, models["single"], start, scene)
    else:
        latents = _sample_pair(nodes, models, start, scene, facts.boundary)
    _save(nodes, latents, vae, scene, facts)
    return nodes


def _add(nodes: list[Node], node: Node) -> Link:
    """The first output of `node`, which becomes the last of the list."""
    nodes.append(node)
    return len(nodes), 0


def _download(folder: str, name: str) -> dict[str, str]:
    return {"name": name, "url": f"{HUB}/{folder}/{name}", "directory": folder}


def _model(nodes: list[Node], expert: Expert, scene: Scene, facts: Variant) -> Link:
    """A transformer with its adapter, if it has one, and the shift."""
    name, row = TRANSFORMERS[facts.name][expert], ROW[expert]
    said = "" if expert == "single" else f" ({expert} noise)"
    model = _add(
        nodes,
        Node(
            "UNETLoader", f"Model{said}", (0, row),
            widgets={"unet_name": name, "weight_dtype": "default"},
            models=[_download("diffusion_models", name)],
        ),
    )  # fmt: skip
    if expert in scene.adapters:
        file, strength = scene.adapters[expert]
        widgets = {"lora_name": file, "strength_model": strength}
        model = _add(
            nodes,
            Node("LoraLoaderModelOnly", f"LoRA{said}", (COLUMN, row), {"model": model}, widgets),
        )
    shift = {"shift": scene.settings.shift}
    place = (2 * COLUMN, row)
    return _add(nodes, Node("ModelSamplingSD3", f"Shift{said}", place, {"model": model}, shift))


def _conditioning(nodes: list[Node], scene: Scene, facts: Variant, vae: Link) -> dict[str, Link]:
    """What a sampler takes beside a model: the two texts, and latents to start from."""
    clip = _add(
        nodes,
        Node(
            "CLIPLoader", "Text encoder", (0, 440),
            widgets={"clip_name": TEXT_ENCODER, "type": "wan", "device": "default"},
            models=[_download("text_encoders", TEXT_ENCODER)],
        ),
    )  # fmt: skip
    texts = {"positive": scene.prompt, "negative": scene.negative_prompt}
    given = {
        name: _add(
            nodes,
            Node(
                "CLIPTextEncode", name.capitalize(), (COLUMN, top), {"clip": clip}, {"text": text}
            ),
        )
        for (name, text), top in zip(texts.items(), (440, 710), strict=True)
    }
    image = {}
    if scene.from_image:
        widgets = {"image": "first_frame.png", "upload": "image"}
        image["start_image"] = _add(
            nodes, Node("LoadImage", "First frame: choose one", (0, 740), widgets=widgets)
        )
    size = {
        "width": scene.settings.width,
        "height": scene.settings.height,
        "length": scene.settings.frames,
        "batch_size": 1,
    }
    place = (2 * COLUMN, 440)
    if facts.conditioning == "channels":
        links = {**given, "vae": vae, **image}
        _add(nodes, Node("WanImageToVideo", "Size and first frame", place, links, size))
        names = ("positive", "negative", "latent_image")
        return {name: (len(nodes), output) for output, name in enumerate(names)}
    if facts.conditioning == "first_frame":
        node = Node("Wan22ImageToVideoLatent", "Size", place, {"vae": vae, **image}, size)
    else:
        node = Node("EmptyHunyuanLatentVideo", "Size", place, widgets=size)
    return {**given, "latent_image": _add(nodes, node)}


def _sample_pair(
    nodes: list[Node],
    models: Mapping[Expert, Link],
    start: Mapping[str, Link],
    scene: Scene,
    boundary: float,
) -> Link:
    """The high-noise expert makes the first steps and hands its noisy latents to the other."""
    settings = scene.settings
    split = comfy_split(settings.steps, settings.shift, boundary)
    common = {
        "control_after_generate": "fixed",
        "steps": settings.steps,
        "sampler_name": SAMPLER,
        "scheduler": SCHEDULER,
    }
    high = {
        "add_noise": "enable",
        "noise_seed": scene.seed,
        "cfg": settings.guidance.high,
        "start_at_step": 0,
        "end_at_step": split,
        "return_with_leftover_noise": "enable",
    }
    low = {
        "add_noise": "disable",
        "noise_seed": 0,
        "cfg": settings.guidance.low,
        "start_at_step": split,
        "end_at_step": settings.steps,
        "return_with_leftover_noise": "disable",
    }
    kind, left = "KSamplerAdvanced", 3 * COLUMN
    links = {**start, "model": models["high"]}
    noisy = _add(nodes, Node(kind, "High noise", (left, 0), links, common | high))
    links = {**start, "model": models["low"], "latent_image": noisy}
    return _add(nodes, Node(kind, "Low noise", (left, 440), links, common | low))


def _sample_single(nodes: list[Node], model: Link, start: Mapping[str, Link], scene: Scene) -> Link:
    widgets = {
        "seed": scene.seed,
        "control_after_generate": "fixed",
        "steps": scene.settings.steps,
        "cfg": scene.settings.guidance.of("single"),
        "sampler_name": SAMPLER,
        "scheduler": SCHEDULER,
        "denoise": 1.0,
    }
    links = {**start, "model": model}
    return _add(nodes, Node("KSampler", "Sampler", (3 * COLUMN, 0), links, widgets))


def _save(nodes: list[Node], latents: Link, vae: Link, scene: Scene, facts: Variant) -> None:
    left = 4 * COLUMN
    links = {"samples": latents, "vae": vae}
    images = _add(nodes, Node("VAEDecode", "Decode", (left, 0), links))
    fps = {"fps": float(facts.fps), "bit_depth": "auto", "color_space": "sRGB", "codec": "none"}
    video = _add(nodes, Node("CreateVideo", "Video", (left, 140), {"images": images}, fps))
    # "codec" is what "format.codec" was called in older versions, which need it.
    widgets = {
        "filename_prefix": f"video/{scene.name}",
        "format": "auto",
        "format.codec": "auto",
        "codec": "auto",
    }
    _add(nodes, Node("SaveVideo", "Save", (left, 400), {"video": video}, widgets))
