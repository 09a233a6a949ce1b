"""Rebuild the embedded model `tiny`: a Wan 2.2 T2V pair at toy size, trained on a drawn world.

    make tiny                                              # all stages, 20 minutes on one H200
    python -m tools.make_tiny vae --seconds 410            # one stage; results go to build/tiny
    python -m tools.make_tiny vae --seconds 200            # a stage goes on from its own files
    python -m tools.make_tiny judge
    python -m tools.make_tiny denoisers --seconds 320
    python -m tools.make_tiny assemble                     # build/tiny -> wan/tiny

Stages hand over fp32 safetensors in the build folder, so each can run alone.
`tools/measure_tiny.py` measures the result; `wan/tiny/README.md` says what came out.
"""

import argparse
import copy
import json
import logging
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5EncoderModel

from tools import judge as judging
from tools import tiny_denoiser, tiny_vae
from wan import flow, variants

log = logging.getLogger(__name__)

BANK_CLIPS, BANK_PICTURES = 48_000, 12_000
STAGE_NAMES = ("vae", "judge", "denoisers", "assemble")
JUDGE_CLIPS, JUDGE_STEPS = 512, 1000
JOINT_SHARE, HIGH_SHARE = 0.54, 0.18  # of the seconds of the stage `denoisers`


def keep(module: nn.Module, path: Path) -> None:
    """Write the weights of a stage in fp32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # clone: the text encoder knows its embedding by two names
    save_file({k: v.float().cpu().clone() for k, v in module.state_dict().items()}, path)


def note(build: Path, **figures: object) -> None:
    """Add figures of a stage to build/figures.json."""
    path = build / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **figures}, indent=2))
    log.warning("%s", figures)


def stage_vae(build: Path, seconds: float, device: torch.device, scale: int) -> None:
    """Train the autoencoder, or refine the one of an earlier call; measure it in every frame."""
    started = time.monotonic()
    start = built_vae(build, device) if (build / "vae.safetensors").exists() else None
    vae = tiny_vae.finish_vae(tiny_vae.train_vae(seconds, device, scale, start), device)
    keep(vae, build / "vae.safetensors")
    statistics = {key: vae.config[key] for key in ("latents_mean", "latents_std")}
    (build / "vae.json").write_text(json.dumps(statistics))
    psnr = tiny_vae.vae_psnr(vae, 128 // scale + 1, device)
    note(
        build,
        vae_psnr_mean=round(psnr.mean().item(), 2),
        vae_psnr_frames=[round(x, 2) for x in psnr.tolist()],
        vae_seconds=round(time.monotonic() - started),
    )


def built_vae(build: Path, device: torch.device) -> AutoencoderKLWan:
    """The autoencoder of an earlier `vae` stage."""
    statistics = json.loads((build / "vae.json").read_text())
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, num_res_blocks=1, **statistics)
    vae.load_state_dict(load_file(build / "vae.safetensors"))
    vae.to(device)  # pyright: ignore[reportArgumentType] (hidden by a decorator)
    return vae.eval()


def stage_judge(build: Path, seconds: float, device: torch.device, scale: int) -> None:
    """Train the judge, which takes minutes on a CPU too, and state its accuracy."""
    del seconds  # it stops after so many steps, wherever it runs
    vae = built_vae(build, device)
    judge = judging.train_judge(vae, JUDGE_CLIPS // scale, JUDGE_STEPS // scale, device)
    keep(judge, build / "judge.safetensors")
    clips = 256 // scale
    plain = judging.judge_accuracy(judge, None, clips, device)
    through = judging.judge_accuracy(judge, vae, clips, device)
    note(build, judge_accuracy_rendered=plain, judge_accuracy_through_vae=through)


def stage_denoisers(build: Path, seconds: float, device: torch.device, scale: int) -> None:
    """Text encoder and one denoiser on all noise levels, then the experts on their own."""
    started = time.monotonic()
    torch.manual_seed(2)
    vae = built_vae(build, device)
    tokenizer = tiny_denoiser.new_tokenizer()
    encoder = tiny_denoiser.new_text_encoder(len(tokenizer))
    denoiser = tiny_denoiser.new_denoiser()
    encoder.to(device)  # pyright: ignore[reportArgumentType] (hidden by a decorator)
    denoiser.to(device)  # pyright: ignore[reportArgumentType] (the same)
    if (build / "text_encoder.safetensors").exists():  # a second call goes on from the first
        encoder.load_state_dict(load_file(build / "text_encoder.safetensors"))
        denoiser.load_state_dict(load_file(build / "joint.safetensors"))
    clips, pictures = BANK_CLIPS // scale**2, BANK_PICTURES // scale**2
    empty_tokens, empty_mask = tiny_denoiser.tokens_of(tokenizer, [""])
    data = tiny_denoiser.TrainingData(
        videos=tiny_denoiser.fill_bank(vae, tokenizer, clips, tiny_vae.FRAMES, device),
        pictures=tiny_denoiser.fill_bank(vae, tokenizer, pictures, 1, device),
        empty=(empty_tokens[0].to(device), empty_mask[0].to(device)),
    )
    batch = max(4, 384 // scale)
    log.warning("bank ready after %.0f s", time.monotonic() - started)
    seconds -= time.monotonic() - started if device.type == "cuda" else 0
    loss = tiny_denoiser.train_denoiser(
        denoiser,
        encoder,
        data,
        flow.SigmaRange(0.0, 1.0),
        JOINT_SHARE * seconds,
        1.5e-3,
        batch,
    )
    encoder.requires_grad_(False)
    keep(denoiser, build / "joint.safetensors")
    keep(encoder, build / "text_encoder.safetensors")
    note(build, joint_loss=loss)
    boundary = variants.VARIANTS["tiny"].boundary
    shares: dict[variants.Expert, float] = {
        "high": HIGH_SHARE,
        "low": 1 - JOINT_SHARE - HIGH_SHARE,
    }
    for expert, share in shares.items():
        own = copy.deepcopy(denoiser)
        own_range = flow.expert_range(boundary, expert)
        loss = tiny_denoiser.train_denoiser(
            own, encoder, data, own_range, share * seconds, 7e-4, batch
        )
        keep(own, build / f"{expert}.safetensors")
        note(build, **{f"{expert}_loss": loss})
    note(build, denoisers_seconds=round(time.monotonic() - started))


def stage_assemble(build: Path, target: Path, judge_path: Path = judging.WEIGHTS) -> None:
    """The diffusers folder that the trainer, diffusers and everything else load."""
    tiny_vae.save_component(built_vae(build, torch.device("cpu")), target / "vae")
    tokenizer = tiny_denoiser.new_tokenizer()
    tokenizer.save_pretrained(target / "tokenizer")
    encoder = tiny_denoiser.new_text_encoder(len(tokenizer))
    encoder.load_state_dict(load_file(build / "text_encoder.safetensors"))
    tiny_vae.save_component(encoder, target / "text_encoder")
    for expert in variants.EXPERTS:
        folder = variants.FOLDER_OF_EXPERT[expert]
        denoiser = tiny_denoiser.new_denoiser()
        denoiser.load_state_dict(load_file(build / f"{expert}.safetensors"))
        tiny_vae.save_component(denoiser, target / folder)
    facts = variants.VARIANTS["tiny"]
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=facts.sample_shift
    ).save_pretrained(target / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": facts.boundary,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", UMT5EncoderModel.__name__],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", WanTransformer3DModel.__name__],
        "transformer_2": ["diffusers", WanTransformer3DModel.__name__],
        "vae": ["diffusers", AutoencoderKLWan.__name__],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    judge = {k: v.half() for k, v in load_file(build / "judge.safetensors").items()}
    save_file(judge, judge_path)


def main() -> None:
    """Run one stage, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGE_NAMES, "all"])
    parser.add_argument("--seconds", type=float, help="time of the stage (default: see the table)")
    parser.add_argument(
        "--build", type=Path, default=Path("build/tiny"), help="where stages hand over"
    )
    parser.add_argument(
        "--target", type=Path, default=variants.TINY_PATH, help="the finished folder"
    )
    parser.add_argument("--scale", type=int, default=1, help="divide batches: to try it on a CPU")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    args.build.mkdir(parents=True, exist_ok=True)
    if args.stage == "all":  # a stage goes on from files of its own: begin anew
        for path in args.build.glob("*.safetensors"):
            path.unlink()
    # The second turn of the autoencoder refines the first; seconds as the model in git was made.
    turns = ((stage_vae, "vae", 410), (stage_vae, "vae", 200))
    turns += ((stage_judge, "judge", 0), (stage_denoisers, "denoisers", 320))
    if args.stage == "vae":
        turns = turns[:1]
    for stage, name, seconds in turns:
        if args.stage in (name, "all"):
            stage(args.build, args.seconds or seconds, device, args.scale)
    if args.stage in ("assemble", "all"):
        elsewhere = args.target.resolve() != variants.TINY_PATH
        judge_path = args.target / judging.WEIGHTS.name if elsewhere else judging.WEIGHTS
        stage_assemble(args.build, args.target, judge_path)


if __name__ == "__main__":
    main()
