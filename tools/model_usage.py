"""How to use adapters in ComfyUI, diffusers and tools.render: the sections of a model card."""

import json
import shlex

from tools.comfy_workflow import HUB, Scene, comfy_split, needed_files
from wan.variants import Variant

HUB_MODELS = {
    "t2v_a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "i2v_a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "ti2v_5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}


def comfyui_section(facts: Variant, scene: Scene) -> str:
    """Where the files go, and what the workflow does."""
    settings = scene.settings
    how = (
        f"{settings.frames} frames of {settings.width}x{settings.height} in "
        f"{settings.steps} steps, shift {settings.shift:g}"
    )
    if facts.boundary is not None:
        split = comfy_split(settings.steps, settings.shift, facts.boundary)
        how += (
            f": {split} with the high-noise model (cfg {settings.guidance.high:g}), "
            f"{settings.steps - split} with the low-noise model (cfg {settings.guidance.low:g})"
        )
    image = " Choose an image in its Load Image node." if scene.from_image else ""
    needed = "\n".join(
        f"- [`{name}`]({HUB}/{folder}/{name}) into `models/{folder}`"
        for folder, name in needed_files(facts)
    )
    return (
        "## ComfyUI\n\nPut the adapters into `ComfyUI/models/loras` and drop "
        f"`{scene.name}_comfyui.json` into the window.{image} It renders {how}. "
        f"It needs\n\n{needed}"
    )


def diffusers_section(facts: Variant, scene: Scene) -> str:
    """A script that renders the scene."""
    settings = scene.settings
    pipeline = "WanImageToVideoPipeline" if scene.from_image else "WanPipeline"
    loads = [
        f'pipe.load_lora_weights(".", weight_name={_text(file)}, adapter_name="{expert}"'
        + (", load_into_transformer_2=True)" if expert == "low" else ")")
        for expert, (file, _) in scene.adapters.items()
    ]
    strengths = [strength for _, strength in scene.adapters.values()]
    guidance = (
        [f"guidance_scale={settings.guidance.of('single')}"]
        if facts.boundary is None
        else [
            f"guidance_scale={settings.guidance.high}",
            f"guidance_scale_2={settings.guidance.low}",
        ]
    )
    arguments = [
        *(['image=load_image("first_frame.png")'] if scene.from_image else []),
        f"prompt={_text(scene.prompt)}",
        f"negative_prompt={_text(scene.negative_prompt)}",
        f"height={settings.height}",
        f"width={settings.width}",
        f"num_frames={settings.frames}",
        f"num_inference_steps={settings.steps}",
        *guidance,
        f"generator=torch.Generator().manual_seed({scene.seed})",
    ]
    lines = [
        "import torch",
        f"from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, {pipeline}",
        "from diffusers.utils import export_to_video, load_image",
        "",
        f"base = {_text(HUB_MODELS[facts.name])}",
        'vae = AutoencoderKLWan.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)',
        f"pipe = {pipeline}.from_pretrained(base, vae=vae, torch_dtype=torch.bfloat16)",
        "pipe.scheduler = UniPCMultistepScheduler.from_config(",
        f"    pipe.scheduler.config, flow_shift={settings.shift}",
        ")",
        *loads,
        f"pipe.set_adapters({json.dumps(list(scene.adapters))}, {strengths})",
        "pipe.enable_model_cpu_offload()",
        "video = pipe(",
        *(f"    {argument}," for argument in arguments),
        ").frames[0]",
        f'export_to_video(video, "video.mp4", fps={facts.fps})',
    ]
    return "\n".join(["## diffusers", "", "```python", *lines, "```"])


def render_section(facts: Variant, scene: Scene) -> str:
    """The command of this project that renders the scene by the official pipeline."""
    settings = scene.settings
    model = [] if facts.name == "tiny" else [f"--variant={facts.name}", "--model=DIR"]
    command = [
        *model,
        *(
            f"--lora={expert}={file}:{weight:g}"
            for expert, (file, weight) in scene.adapters.items()
        ),
        *(["--image=first_frame.png"] if scene.from_image else []),
        f"--frames={settings.frames}",
        f"--height={settings.height}",
        f"--width={settings.width}",
        f"--steps={settings.steps}",
        f"--shift={settings.shift:g}",
        f"--guidance-high={settings.guidance.high:g}",
        f"--guidance-low={settings.guidance.low:g}",
        f"--seeds={scene.seed}",
        "--",
        scene.prompt,
    ]
    return f"## wan-lora\n\n```sh\npython -m tools.render {shlex.join(command)}\n```"


def _text(value: str) -> str:
    """`value` as a string of Python."""
    return json.dumps(value, ensure_ascii=False)
