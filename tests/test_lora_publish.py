"""Folders to upload: whole, the same each time, and with nothing in them that gives a user away."""

import argparse
import ast
import functools
import inspect
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import numpy as np
import pytest
import torch
import yaml
from adapter_examples import INFO, random_state
from PIL import Image

from tools.comfy_check import NODES_FILE, problems
from tools.comfy_workflow import comfy_split
from tools.finished_run import read_run
from tools.lora_publish import add_parser, publish, read_strengths
from tools.render import arguments, plan_takes
from train.compose import compose, resolved_yaml
from train.config import Config
from train.preview import save_samples
from train.preview_plan import PreviewPlan, Shot
from train.rules import ConfigError
from train.run_folder import write_summary
from wan.headers import ModelError
from wan.lora_format import export_adapter
from wan.safetensors_writer import file_hashes
from wan.sample_settings import SampleSettings
from wan.variants import VARIANTS, Guidance

PROMPT = "A 'bluefox' runs | over a wall."
SECRETS = ("alice", "secret", "/home", "/data", "caption of hers")


def config_of(variant: str, folder: Path, *overrides: str) -> Config:
    return compose(
        [
            "name=fox", f"model={variant}", "model.path=/data/secret/models",
            "data.path=/home/alice/secret", "data.cache=/home/alice/cache", f"output_dir={folder}",
            "data.trigger=bluefox", "data.prefix='caption of hers'", *overrides,
        ]
    )  # fmt: skip


def make_run(folder: Path, variant: str = "t2v_a14b", *overrides: str) -> Path:
    """What training would leave, with adapters of toy size."""
    facts = VARIANTS[variant]
    config = config_of(variant, folder, *overrides)
    config.preview.prompts = [PROMPT, "a wall"]
    if facts.conditioning == "channels":
        config.preview.images = ["/home/alice/a.png", "/home/alice/b.png"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    trained = [expert for expert in facts.experts if expert in (config.experts or facts.experts)]
    for seed, expert in enumerate(trained):
        info = replace(INFO, title="fox", variant=facts, expert=expert)
        export_adapter(folder, "fox", random_state(seed), info, torch.bfloat16)
    losses = {expert: {"mean": 0.5, "standard_error": 0.01} for expert in trained}
    better = {expert: {"mean": 0.4, "standard_error": 0.01} for expert in trained}
    write_summary(folder, {"heldout_base": losses, "heldout_adapters": better})
    for step in ("step_000005", "step_000010"):
        (folder / "samples" / step).mkdir(parents=True)
    (folder / "samples" / "step_000005" / "02_adapters.mp4").write_text("older")
    for name, data in samples().items():
        (folder / "samples" / "step_000010" / name).write_bytes(data)
    return folder


@functools.cache
def samples() -> dict[str, bytes]:
    """What a run writes of two shots."""
    shots = [Shot(PROMPT, 0), Shot("a wall", 0)]
    plan = PreviewPlan(shots, SampleSettings(1, 1.0, Guidance(1.0, 1.0), 5, 16, 16), "", 1)
    videos = [np.full((3, 16, 16, 3), light, np.uint8) for light in (0, 200)]
    with TemporaryDirectory() as folder:
        save_samples(Path(folder), plan, videos, videos, 8, {})
        return contents(Path(folder))


def run_cli(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["publish", *map(str, words)])
    args.run(args)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def card_of(folder: Path, run: Path, *words: str) -> str:
    run_cli(run, "--out", folder, *words)
    return (folder / "README.md").read_text()


def test_the_folder_is_whole_and_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    run_cli(run)
    said = capsys.readouterr().out
    first = contents(run / "publish")
    assert sorted(first) == [
        "README.md", "civitai.json", "fox_comfyui.json", "fox_comfyui_api.json",
        "fox_high_noise.safetensors", "fox_low_noise.safetensors", "fox_sample_00.mp4",
        "fox_sample_01.mp4", "fox_samples.png",
    ]  # fmt: skip
    assert all(name in said for name in first)
    assert "base model 'Wan Video 2.2 T2V-A14B'" in said
    last = run / "samples" / "step_000010"
    assert first["fox_sample_01.mp4"] == (last / "01_adapters.mp4").read_bytes()
    assert first["fox_samples.png"] == (last / "sheet.png").read_bytes()
    for name in ("fox_high_noise.safetensors", "fox_low_noise.safetensors"):
        assert first[name] == (run / name).read_bytes()
    run_cli(run)
    assert contents(run / "publish") == first
    moved = run.rename(tmp_path / "elsewhere")
    run_cli(moved, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("variant", ["t2v_a14b", "i2v_a14b", "ti2v_5b", "tiny"])
def test_nothing_gives_the_user_away(tmp_path: Path, variant: str) -> None:
    run_cli(make_run(tmp_path / "run", variant), "--out", tmp_path / "out")
    for name, data in contents(tmp_path / "out").items():
        for secret in (*SECRETS, str(tmp_path)):
            assert secret.encode() not in data, (name, secret)


@pytest.mark.parametrize("variant", ["t2v_a14b", "i2v_a14b", "ti2v_5b"])
def test_the_workflow_renders_the_first_sample(tmp_path: Path, variant: str) -> None:
    run = make_run(tmp_path / "run", variant, "preview.seeds=[11]", "preview.steps=20")
    run_cli(run, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "fox_comfyui.json").read_text()
    assert problems(text) == []
    fields = [value for node in json.loads(text)["nodes"] for value in node["widgets_values"]]
    for value in (PROMPT, 11, 20, VARIANTS[variant].sample_shift, "video/fox"):
        assert value in fields
    prompt = json.loads((tmp_path / "out" / "fox_comfyui_api.json").read_text())
    names = {
        node["inputs"]["lora_name"]
        for node in prompt.values()
        if node["class_type"] == "LoraLoaderModelOnly"
    }
    assert names == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    images = [node for node in prompt.values() if node["class_type"] == "LoadImage"]
    assert len(images) == (variant == "i2v_a14b")


def test_strengths_go_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    card = card_of(tmp_path / "out", run, "--strength", "high=0.8")
    assert 'set_adapters(["high", "low"], [0.8, 1.0])' in card
    assert "--lora=high=fox_high_noise.safetensors:0.8" in card
    form = json.loads((tmp_path / "out" / "civitai.json").read_text())
    assert [version["recommended_strength"] for version in form["versions"]] == [0.8, 1.0]
    assert '"strength_model": 0.8' in (tmp_path / "out" / "fox_comfyui_api.json").read_text()
    for wrong in ("single=1", "high=much", "0.8", "high=nan", "low=101"):
        with pytest.raises(ConfigError, match=re.escape(f"--strength {wrong}")):
            read_strengths([wrong], read_run(run), {})


def test_without_a_word_the_strengths_are_those_of_the_sweep_of_these_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    strengths = run / "evaluation" / "step_000000010" / "sweep" / "strengths.json"
    strengths.parent.mkdir(parents=True)
    hashes = {e: file_hashes(run / f"fox_{e}_noise.safetensors").sha256 for e in ("high", "low")}
    found = {"adapters": {expert: {"sha256": digest} for expert, digest in hashes.items()}}
    strengths.write_text(json.dumps(found | {"recommended": {"high": 0.6, "low": 1.2}}))
    assert '(["high", "low"], [0.6, 1.2])' in card_of(tmp_path / "out", run)
    form = json.loads((tmp_path / "out" / "civitai.json").read_text())
    assert [version["recommended_strength"] for version in form["versions"]] == [0.6, 1.2]
    assert '"strength_model": 1.2' in (tmp_path / "out" / "fox_comfyui_api.json").read_text()
    assert "[0.8, 1.2])" in card_of(tmp_path / "out", run, "--strength", "high=0.8")
    strengths.write_text(json.dumps(found | {"adapters": {}, "recommended": {"high": 0.6}}))
    assert "[1.0, 1.0])" in card_of(tmp_path / "out", run)


def test_the_form_of_civitai(tmp_path: Path) -> None:
    run_cli(make_run(tmp_path / "run"), "--out", tmp_path / "out")
    form = json.loads((tmp_path / "out" / "civitai.json").read_text())
    assert form["base_model"] == "Wan Video 2.2 T2V-A14B"
    assert form["trained_words"] == ["bluefox"]
    assert form["sampling"]["steps_in_comfyui"] == {"high": 26, "low": 14}
    assert form["sampling"]["guidance"] == {"high": 4.0, "low": 3.0}
    for version in form["versions"]:
        hashes = file_hashes(tmp_path / "out" / version["file"])
        assert version["hashes"] == {
            "SHA256": hashes.sha256.upper(),
            "AutoV2": hashes.autov2.upper(),
            "AutoV3": hashes.autov3.upper(),
        }
        assert version["training"]["steps"] == "1500"
        assert version["training"]["alpha"] == "2.0"
        assert version["heldout_loss"] == {"base": 0.5, "adapted": 0.4, "standard_error": 0.01}


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "t2v_a14b", "export.license='a: b # c'", "export.title='T|F'")
    card = card_of(tmp_path / "out", run)
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "instance_prompt": "bluefox",
        "license": "a: b # c",
        "tags": ["lora", "wan2.2", "comfyui", "text-to-video"],
    }
    assert "# T\\|F" in text
    assert "Trigger: `bluefox`" in text
    assert "26 with the high-noise model (cfg 4), 14 with the low-noise model (cfg 3)" in text
    assert "| high | 0.5000 | 0.4000 ± 0.0100 | -20.0% |" in text
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize("variant", ["t2v_a14b", "i2v_a14b", "ti2v_5b"])
def test_the_script_of_the_card_calls_what_diffusers_has(tmp_path: Path, variant: str) -> None:
    card = card_of(tmp_path / "out", make_run(tmp_path / "run", variant))
    (script,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    tree = ast.parse(script)
    image = VARIANTS[variant].conditioning == "channels"
    pipeline = getattr(diffusers, "WanImageToVideoPipeline" if image else "WanPipeline")
    assert pipeline.__name__ in script
    known = inspect.signature(pipeline.__call__).parameters
    (call,) = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"
    ]  # fmt: skip
    given = {str(word.arg): word.value for word in call.keywords}
    assert given.keys() <= known.keys()
    assert ("image" in given) == image
    assert ast.literal_eval(given["prompt"]) == PROMPT
    assert ast.literal_eval(given["guidance_scale"]) == VARIANTS[variant].guidance.high
    assert ("guidance_scale_2" in given) == (variant != "ti2v_5b")
    assert script.count("load_into_transformer_2=True") == (variant != "ti2v_5b")


@pytest.mark.parametrize("variant", ["t2v_a14b", "i2v_a14b", "ti2v_5b", "tiny"])
def test_the_command_of_the_card_renders_the_first_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    card = card_of(tmp_path / "out", make_run(tmp_path / "run", variant))
    (command,) = re.findall(r"```sh\npython -m tools.render (.*?)\n```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    Image.new("RGB", (64, 48)).save("first_frame.png")
    args = arguments(shlex.split(command))
    (take,) = plan_takes(args, VARIANTS[variant])
    assert args.variant == variant
    assert take.shot.prompts == (PROMPT,)
    assert {lora.expert: lora.path.name for lora in take.shot.loras} == {
        expert: f"fox{f'_{expert}_noise' * (expert != 'single')}.safetensors"
        for expert in VARIANTS[variant].experts
    }
    assert take.settings == read_run(tmp_path / "run").previews.settings


def test_a_run_of_one_expert_without_previews(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "t2v_a14b", "experts=[low]")
    for path in (run / "samples").rglob("*.*"):
        path.unlink()
    card = card_of(tmp_path / "out", run)
    assert "one file" in card
    assert 'pipe.set_adapters(["low"], [1.0])' in card
    assert not list((tmp_path / "out").glob("*sample*"))
    assert problems((tmp_path / "out" / "fox_comfyui.json").read_text()) == []


def test_the_toy_model_has_no_workflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(tmp_path / "out", make_run(tmp_path / "run", "tiny"))
    assert "no workflow: ComfyUI does not know tiny" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*comfyui*"))
    assert "ComfyUI" not in card
    assert "diffusers" not in card


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml is missing; expected the folder of a run"):
        read_run(tmp_path)
    run = make_run(tmp_path / "run")
    good = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def broken(name: str, data: bytes | None) -> None:
        (run / name).unlink() if data is None else (run / name).write_bytes(data)

    for name, data, error, message in [
        ("summary.json", None, ConfigError, "the run has not finished"),
        ("summary.json", b"[1]", ConfigError, "is not the summary of a run"),
        ("summary.json", b"{", ConfigError, "is not the summary of a run"),
        ("config.yaml", b"name: [", ConfigError, "not as this version writes it"),
        ("config.yaml", b"- a", ConfigError, "not as this version writes it"),
        ("config.yaml", b"nmae: fox", ConfigError, "not as this version writes it"),
        ("fox_low_noise.safetensors", None, ModelError, "is missing"),
        ("fox_low_noise.safetensors", good["fox_low_noise.safetensors"][:-9], ModelError, "whole"),
        (
            "fox_low_noise.safetensors",
            good["fox_low_noise.safetensors"][:-1] + b"\x01",
            ModelError,
            "is damaged",
        ),
    ]:
        broken(name, data)
        with pytest.raises(error, match=message) as found:
            read_run(run)
        assert "\n" not in str(found.value)
        (run / name).write_bytes(good[name])


def test_swapped_files_are_not_published(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    high, low = run / "fox_high_noise.safetensors", run / "fox_low_noise.safetensors"
    low.write_bytes(high.read_bytes())
    with pytest.raises(ModelError, match=r"low_noise.safetensors says .* t2v_a14b high, expected"):
        read_run(run)


def test_it_never_mixes_with_other_files(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out holds diary.txt, which is no part"):
        run_cli(run, "--out", out)
    assert contents(out) == {"diary.txt": b"mine"}
    with pytest.raises(ConfigError, match="cannot be made"):
        publish(read_run(run), out / "diary.txt", {"high": 1.0, "low": 1.0})


def test_the_page_of_the_docs_names_the_splits_and_the_version() -> None:
    page = (Path(__file__).parent.parent / "docs" / "publish.md").read_text()
    for name in ("t2v_a14b", "i2v_a14b"):
        facts = VARIANTS[name]
        assert facts.boundary is not None
        high = comfy_split(facts.sample_steps, facts.sample_shift, facts.boundary)
        row = f"| {facts.sample_shift:g} | {facts.boundary:.3f} | {high} + {40 - high} |"
        assert row in page
    version = json.loads(NODES_FILE.read_text())["source"]["version"]
    assert f"ComfyUI {version} " in page
