"""Previews at strengths, with few steps, with too little memory or time; training goes on."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import resumable_runs
from tests.toy_runs import make_image, silent
from train.compose import compose
from train.config import PreviewConfig
from train.few_step import FEW_STEP, at_strengths
from train.preview import render, save_samples
from train.preview_plan import PreviewPlan, Shot, few_step_files, plan_previews
from train.rules import ConfigError
from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model, load_vae
from wan.experts import Experts, load_experts
from wan.lora import ADAPTER, adapter_layers, adapter_parameters, attach, lora_layers
from wan.sample_settings import distilled
from wan.strengths import adapter_strengths
from wan.variants import EXPERTS, Expert, variant

TINY = variant("tiny")
CPU = torch.device("cpu")


@pytest.fixture
def experts(toy_model: Path) -> Experts:
    """Both with an adapter that does something, of an alpha that divides badly."""
    loaded = load_experts(find_model(ModelPaths(str(toy_model)), "tiny"), torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    for expert in EXPERTS:
        attach(loaded[expert], 5, 3.0, target_modules("attention"), 0.0, 1)
        with torch.no_grad():
            for parameter in adapter_parameters(loaded[expert]):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return loaded


@pytest.fixture(scope="module")
def vae(toy_model: Path) -> AutoencoderKLWan:
    return load_vae(find_model(ModelPaths(str(toy_model)), "tiny"), torch.float32, CPU)


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 32, generator=generator) for name in ("a ball", "")}


def plan_of(**changes: object) -> PreviewPlan:
    small = {
        "steps": 3, "frames": 5, "height": 32, "width": 48, "prompts": ["a ball"],
        "negative_prompt": "",
    }  # fmt: skip
    preview = PreviewConfig(**(small | changes))  # pyright: ignore[reportArgumentType]
    return plan_previews(preview, TINY, 2)


def few_step_pair(folder: Path, width: int = 24) -> dict[Expert, Path]:
    """Two distilled adapters on one linear, as Lightning's are named."""
    paths: dict[Expert, Path] = {}
    for seed, expert in enumerate(EXPERTS):
        generator = torch.Generator().manual_seed(seed)
        stem = "diffusion_model.blocks.0.self_attn.q"
        tensors = {
            f"{stem}.lora_down.weight": torch.randn(2, width, generator=generator),
            f"{stem}.lora_up.weight": torch.randn(width, 2, generator=generator),
        }
        paths[expert] = folder / f"steps4_{expert}_noise.safetensors"
        save_file(tensors, paths[expert])
    return paths


def state(experts: Experts) -> dict[str, object]:
    """All that training depends on, to the bit."""
    found: dict[str, object] = {}
    for expert in EXPERTS:
        for name, parameter in experts[expert].named_parameters():
            found[f"{expert} {name}"] = (parameter.requires_grad, parameter.tolist())
        for name, layer in lora_layers(experts[expert]).items():
            if ADAPTER in layer.scaling:
                found[f"{expert} {name} scale"] = layer.scaling[ADAPTER]
                found[f"{expert} {name} works"] = ADAPTER in layer.active_adapters
    return found


@contextmanager
def memory_for(experts: Experts, rows: int) -> Iterator[None]:
    """As if the device could hold so many samples in a forward pass, and no more."""

    def check(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("no room")

    hooks = [experts[e].patch_embedding.register_forward_pre_hook(check) for e in EXPERTS]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_strengths_change_the_video_and_leave_no_trace(
    experts: Experts, vae: AutoencoderKLWan, text: Mapping[str, Tensor]
) -> None:
    before, videos = state(experts), []
    chosen: list[dict[Expert, float]] = [
        {}, {"high": 1.0}, {"low": 1.0}, {"high": 1.0, "low": 1.0}, {"high": 0.4, "low": 1.2},
    ]  # fmt: skip
    for strengths in chosen:
        with at_strengths(experts, strengths, {}):
            videos += render(plan_of(), TINY, experts, vae, text, silent, print)
    assert len({video.tobytes() for video in videos}) == 5
    assert state(experts) == before
    plain = render(plan_of(), TINY, experts, vae, text, silent, print)
    assert np.array_equal(plain[0], videos[3])


def test_an_error_on_the_way_leaves_no_trace_either(experts: Experts, tmp_path: Path) -> None:
    before, files = state(experts), few_step_pair(tmp_path)
    with pytest.raises(KeyboardInterrupt), at_strengths(experts, {"low": 0.5}, files):
        raise KeyboardInterrupt
    assert state(experts) == before
    assert all(set(adapter_strengths(experts[e])) == {ADAPTER} for e in EXPERTS)


def test_distilled_adapters_work_beside_ours_and_go(
    experts: Experts, vae: AutoencoderKLWan, text: Mapping[str, Tensor], tmp_path: Path
) -> None:
    before, files = state(experts), few_step_pair(tmp_path)
    plan = plan_of(steps=None, distilled=[str(files["low"])])
    assert plan.few_step == files
    assert plan.settings == distilled(plan_of(steps=None).settings)
    videos = []
    for few_step in (plan.few_step, {}):
        with at_strengths(experts, {"high": 1.0, "low": 1.0}, few_step):
            for expert in few_step:
                assert adapter_strengths(experts[expert]) == {ADAPTER: 1.0, FEW_STEP: 1.0}
                assert len(adapter_layers(experts[expert], FEW_STEP)) == 1
            videos += render(plan, TINY, experts, vae, text, silent, print)
    assert not np.array_equal(*videos)
    assert state(experts) == before


def test_files_that_cannot_be_used_are_told(experts: Experts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preview\.distilled.*no\.safetensors is no file"):
        few_step_files([str(tmp_path / "no.safetensors")], TINY)
    files = few_step_pair(tmp_path, width=32)
    with pytest.raises(ConfigError, match=r"named for the high expert.*has single"):
        few_step_files([str(files["high"])], variant("ti2v_5b"))
    with (
        pytest.raises(ConfigError, match=r"steps4_high_noise.*is not for the high expert"),
        at_strengths(experts, {}, files),
    ):
        pass
    alone = tmp_path / "fast.safetensors"
    files["low"].rename(alone)
    assert few_step_files([str(alone)], TINY) == dict.fromkeys(EXPERTS, alone)


def test_without_memory_for_all_at_once_samples_are_made_one_by_one(
    experts: Experts, vae: AutoencoderKLWan, text: Mapping[str, Tensor]
) -> None:
    plan, said = plan_of(seeds=[0, 1], guidance_high=3.0, guidance_low=2.0), []
    usual = render(plan, TINY, experts, vae, text, silent, said.append)
    assert said == []
    with memory_for(experts, 1):
        small = render(plan, TINY, experts, vae, text, silent, said.append)
    assert len(said) == 1
    assert "not enough memory" in said[0]
    for one, other in zip(usual, small, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2  # rounding
    for expert in EXPERTS:
        experts[expert].train()
    with memory_for(experts, 0), pytest.raises(torch.OutOfMemoryError):
        render(plan, TINY, experts, vae, text, silent, said.append)
    assert all(experts[expert].training for expert in EXPERTS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["eval.early_stop=true", "eval.every=0"], "nothing is measured on the way"),
        (["preview.distilled=[a]", "preview.shift=4"], "preview.shift is 4, which has no effect"),
        (["experts=[low]", "preview.grid=true"], "one expert alone is trained"),
    ],
)
def test_settings_without_effect_are_told(settings: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        compose(["experiment=demo", *settings])


def test_a_grid_has_each_adapter_alone_beside_base_and_both(tmp_path: Path) -> None:
    plan = plan_of()
    videos = [[np.full((5, 32, 48, 3), light, np.uint8)] for light in (0, 80, 160, 240)]
    alone: dict[Expert, list[np.ndarray]] = {"high": videos[1], "low": videos[2]}
    (compared,) = save_samples(tmp_path, plan, videos[0], videos[3], 8, alone)
    assert compared.name == "00_grid.mp4"
    names = {"adapters", "base_and_adapters", "high_only", "low_only", "grid"}
    assert {path.stem for path in tmp_path.glob("*.mp4")} == {f"00_{name}" for name in names}
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)[-100]
    assert [pixels[width][0] for width in range(10, sheet.width, sheet.width // 4)] == [
        0, 80, 160, 240,
    ]  # fmt: skip


def test_a_sheet_shows_the_image_that_a_video_starts_from(tmp_path: Path) -> None:
    image = make_image(tmp_path / "first.png", 0, "", (64, 96))
    plan = replace(plan_of(), shots=[Shot("a ball", 0, image)])
    videos = [[np.full((5, 32, 48, 3), light, np.uint8)] for light in (0, 240)]
    save_samples(tmp_path / "out", plan, videos[0], videos[1], 8, {})
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        pixels = np.asarray(sheet)[-100]
    third = sheet.width // 3
    assert len(np.unique(pixels[:third])) > 50  # the noise of the image
    assert pixels[third + 10][0] == 0
    assert pixels[2 * third + 10][0] == 240


def test_previews_beyond_the_budget_are_left_out_but_the_last_is_made(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = resumable_runs.make_data(tmp_path)
    often = ["steps=2", "turn_steps=1", "preview.every=1", "preview.budget=0.0001", "eval.every=0"]
    folder = resumable_runs.run(resumable_runs.config_of(home, toy_model, "thrifty", *often))
    assert [path.name for path in folder.glob("samples/step_*")] == ["step_000004"]
    said = capsys.readouterr().out
    assert said.count("samples    left out after") == 3
    assert "of the time, preview.budget is 0%" in said
    assert "rendering has taken" in said.split("step_000004/sheet.png")[1]
    assert re.search(r"time       \d+ s: .*rendering \d+ s \(\d+%\)", said)


def test_a_run_with_no_memory_for_previews_trains_on(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are trained on, and a video of two latent frames is too much."""
    home = resumable_runs.make_data(tmp_path)
    own = ["steps=1", "optim.warmup_steps=0", "accumulate=1", "preview.frames=5"]

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        patches = isinstance(module, nn.Conv3d) and module.kernel_size == (1, 2, 2)
        if patches and inputs[0].shape[2] > 1:
            raise torch.OutOfMemoryError("no room")

    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        folder = resumable_runs.run(resumable_runs.config_of(home, toy_model, "full", *own))
    finally:
        hook.remove()
    assert not list(folder.glob("samples/step_*"))
    assert "left out: not enough memory even for one" in capsys.readouterr().out
    assert (folder / "summary.json").is_file()
