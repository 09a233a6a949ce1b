"""The embedded model as it lies in git: small enough, loadable by anyone, and trained."""

import json

import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from tools import measure_tiny, tiny_vae, world
from tools.judge import load_judge, verdict
from wan.checkpoints import ModelPaths, find_model, load_tokenizer
from wan.variants import TINY_PATH, VARIANTS

MAX_BYTES = 24e6
CPU = torch.device("cpu")


def test_the_model_is_small_enough_for_git() -> None:
    files = [path for path in TINY_PATH.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_diffusers_loads_it_and_reads_prompts_as_we_do() -> None:
    pipeline = WanPipeline.from_pretrained(TINY_PATH, local_files_only=True)
    facts = VARIANTS["tiny"]
    assert pipeline.config["boundary_ratio"] == facts.boundary
    assert pipeline.scheduler.config["flow_shift"] == facts.sample_shift
    ours = load_tokenizer(find_model(ModelPaths(str(TINY_PATH)), "tiny"))
    prompts = [world.caption(scene) for scene in world.scenes(20, 4)]
    for prompt in [*prompts, "A zorbi rolling, 2 times!", ""]:
        assert pipeline.tokenizer(prompt).input_ids == ours(prompt)["input_ids"]


def test_its_architecture_is_the_real_one() -> None:
    config = json.loads((TINY_PATH / "vae" / "config.json").read_text())
    assert (config["z_dim"], config["scale_factor_temporal"]) == (16, 4)
    assert config["scale_factor_spatial"] == 8
    for folder in ("transformer", "transformer_2"):
        config = json.loads((TINY_PATH / folder / "config.json").read_text())
        assert config["_class_name"] == "WanTransformer3DModel"
        assert config["qk_norm"] == "rms_norm_across_heads"
    config = json.loads((TINY_PATH / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["UMT5EncoderModel"]


def test_it_is_trained_and_not_random() -> None:
    """A few clips and prompts; `python -m tools.measure_tiny` measures hundreds."""
    studio = measure_tiny.Studio(CPU, steps=12)
    psnr = tiny_vae.vae_psnr(studio.vae, 16, CPU)
    assert psnr.mean() > 28
    assert psnr.min() > 26
    asked = world.scenes(8, 5, heldout=True)
    videos = studio.videos([world.caption(scene, 0) for scene in asked], "test")
    colour, _ = verdict(load_judge(), videos)
    wanted = world.scene_tensor(asked)[:, 0]
    assert (
        colour.argmax(-1) == wanted
    ).sum() >= 6  # by chance: 8 prompts of 6 colours, 1 in 20,000
