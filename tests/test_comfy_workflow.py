"""Workflows for ComfyUI: right by its nodes' signatures, split at its own noise levels."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.comfy_check import NODES_FILE, problems, read_signatures
from tools.comfy_graph import Node, editor_format, server_format
from tools.comfy_workflow import (
    SAMPLER,
    SCHEDULER,
    TRANSFORMERS,
    Scene,
    comfy_sigmas,
    comfy_split,
    make_workflow,
)
from wan.flow import steps_of_experts
from wan.sample_settings import SampleSettings
from wan.variants import VARIANTS, Expert

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = list(TRANSFORMERS)


def scene_of(name: str, from_image: bool = False, only: tuple[str, ...] = ()) -> Scene:
    facts = VARIANTS[name]
    settings = SampleSettings(
        steps=facts.sample_steps,
        shift=facts.sample_shift,
        guidance=facts.guidance,
        frames=facts.frames,
        height=facts.height,
        width=facts.width,
    )
    experts: list[Expert] = [e for e in facts.experts if not only or e in only]
    adapters: dict[Expert, tuple[str, float]] = {
        e: (f"fox_{e}.safetensors", 0.5 + i) for i, e in enumerate(experts)
    }
    from_image = from_image or name == "i2v_a14b"
    return Scene("fox", 'a "blue" fox 狐', facts.negative_prompt, 7, from_image, settings, adapters)


def graph_of(name: str, **choices: Any) -> tuple[str, dict[str, Any]]:
    nodes = make_workflow(scene_of(name, **choices), VARIANTS[name])
    text = editor_format(nodes)
    return text, json.loads(text)


def kind(graph: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [node for node in graph["nodes"] if node["type"] == name]


def values(node: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(read_signatures()[node["type"]].widgets, node["widgets_values"], strict=True))


@pytest.mark.parametrize("from_image", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_a_workflow_that_comfyui_takes(name: str, from_image: bool) -> None:
    text, graph = graph_of(name, from_image=from_image and name != "t2v_a14b")
    assert problems(text) == []
    assert len(kind(graph, "UNETLoader")) == len(VARIANTS[name].experts)
    assert len(kind(graph, "SaveVideo")) == 1
    texts = [values(node)["text"] for node in kind(graph, "CLIPTextEncode")]
    assert texts == ['a "blue" fox 狐', VARIANTS[name].negative_prompt]


@pytest.mark.parametrize(("name", "split"), [("t2v_a14b", 26), ("i2v_a14b", 15)])
def test_the_pair_hands_over_at_the_boundary(name: str, split: int) -> None:
    _, graph = graph_of(name)
    high, low = kind(graph, "KSamplerAdvanced")
    facts = VARIANTS[name]
    assert values(high) == {
        "add_noise": "enable", "noise_seed": 7, "control_after_generate": "fixed", "steps": 40,
        "cfg": facts.guidance.high, "sampler_name": SAMPLER, "scheduler": SCHEDULER,
        "start_at_step": 0, "end_at_step": split, "return_with_leftover_noise": "enable",
    }  # fmt: skip
    assert values(low) == values(high) | {
        "add_noise": "disable", "noise_seed": 0, "cfg": facts.guidance.low,
        "start_at_step": split, "end_at_step": 40, "return_with_leftover_noise": "disable",
    }  # fmt: skip
    links = {link[0]: link for link in graph["links"]}
    assert links[low["inputs"][3]["link"]][1] == high["id"]


@pytest.mark.parametrize("name", NAMES)
def test_each_sampler_has_the_chain_of_its_expert(name: str) -> None:
    _, graph = graph_of(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    samplers = kind(graph, "KSamplerAdvanced") + kind(graph, "KSampler")
    for place, (expert, sampler) in enumerate(zip(VARIANTS[name].experts, samplers, strict=True)):
        chain = [sampler]
        while chain[-1]["type"] != "UNETLoader":
            chain.append(nodes[links[chain[-1]["inputs"][0]["link"]][1]])
        _, shift, lora, model = chain
        assert values(shift)["shift"] == VARIANTS[name].sample_shift
        assert lora["widgets_values"] == [f"fox_{expert}.safetensors", 0.5 + place]
        assert values(model)["unet_name"] == TRANSFORMERS[name][expert]
        assert model["properties"]["models"][0]["name"] == TRANSFORMERS[name][expert]


def test_an_expert_that_was_not_trained_goes_without_adapter() -> None:
    text, graph = graph_of("t2v_a14b", only=("low",))
    assert problems(text) == []
    (lora,) = kind(graph, "LoraLoaderModelOnly")
    assert values(lora)["lora_name"] == "fox_low.safetensors"
    assert len(kind(graph, "ModelSamplingSD3")) == 2


def test_the_split_is_that_of_comfyuis_own_levels() -> None:
    assert comfy_sigmas(4, 5.0) == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    assert comfy_sigmas(3, 1.0) == pytest.approx([1.0, 0.667, 0.334])  # rounded down to thousandths
    # At shift 3 a step of ComfyUI lies on the boundary itself; none of official UniPC does.
    assert comfy_split(40, 3.0, 0.9) == 11
    assert steps_of_experts(40, 3.0, 0.9)["high"] == 10
    for name in ("t2v_a14b", "i2v_a14b"):
        facts = VARIANTS[name]
        assert facts.boundary is not None
        official = steps_of_experts(40, facts.sample_shift, facts.boundary)["high"]
        assert comfy_split(40, facts.sample_shift, facts.boundary) == official


def test_the_servers_format_says_the_same() -> None:
    nodes = make_workflow(scene_of("i2v_a14b"), VARIANTS["i2v_a14b"])
    graph, prompt = json.loads(editor_format(nodes)), json.loads(server_format(nodes))
    assert list(prompt) == [str(node["id"]) for node in graph["nodes"]]
    links = {link[0]: link for link in graph["links"]}
    for node in graph["nodes"]:
        given = prompt[str(node["id"])]
        assert given["class_type"] == node["type"]
        expected = {
            socket["name"]: [str(links[socket["link"]][1]), links[socket["link"]][2]]
            for socket in node["inputs"]
            if socket["link"] is not None
        }
        hidden = {"control_after_generate", "upload"}
        expected |= {key: value for key, value in values(node).items() if key not in hidden}
        assert given["inputs"] == expected


def test_the_sampler_ends_nearer_to_official_unipc_than_euler() -> None:
    recorded = load_file(FIXTURES / "solver_toy_40_shift12.safetensors")
    official = recorded["x_final_unipc"]
    split = comfy_split(40, 12.0, 0.875)
    ends = {
        name: _solve(recorded["x_init"], recorded["mu"], order, split)
        for name, order in (("euler", 1), ("dpmpp_2m", 2))
    }
    errors = {name: ((x - official).norm() / official.norm()).item() for name, x in ends.items()}
    assert errors["euler"] == pytest.approx(0.043, abs=0.002)
    assert errors[SAMPLER] == pytest.approx(0.010, abs=0.002)


def _solve(x: Tensor, mu: Tensor, order: int, split: int) -> Tensor:
    """The toy of golden.json with ComfyUI's levels; the second sampler starts without a past."""
    sigmas = [*comfy_sigmas(40, 12.0), 0.0]
    before: Tensor | None = None
    for step, (s, t) in enumerate(itertools.pairwise(sigmas)):
        a = 1 - s
        clean = x - s * (x - (torch.tanh(x * a / (a**2 + s**2 + 1e-3)) + 0.1 * mu)) / max(s, 1e-3)
        guess = clean
        if order == 2 and before is not None and step != split and t > 0:
            ratio = math.log(sigmas[step - 1] / s) / math.log(s / t)
            guess = clean + (clean - before) / (2 * ratio)
        x = t / s * x + (1 - t / s) * guess
        before = clean
    return x


def _drop_link(graph: dict[str, Any]) -> None:
    graph["links"].pop()


def _ghost(graph: dict[str, Any]) -> None:
    graph["links"][0][1] = 99


def _swap_order(graph: dict[str, Any]) -> None:
    graph["nodes"][0]["order"], graph["nodes"][1]["order"] = 1, 0


def _set(change: dict[str, Any], node: int = 1) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["nodes"][node].update(change)


def _value(place: int, value: object, node: int = 1) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["nodes"][node]["widgets_values"].__setitem__(place, value)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_set({"id": 1}), "two nodes have the id 1"),
        (lambda graph: graph["links"][1].__setitem__(0, 1), "two links have the id 1"),
        (lambda graph: graph.update(last_link_id=2), "last_link_id is below"),
        (_set({"type": "LoraLoaderKaput"}), "ComfyUI has no such node"),
        (lambda graph: graph["nodes"][1]["inputs"][0].update(name="modle"), "its inputs are"),
        (lambda graph: graph["nodes"][1]["inputs"][0].update(type="CLIP"), "it carries MODEL"),
        (lambda graph: graph["nodes"][1]["inputs"][0].update(link=None), "model is not connected"),
        (lambda graph: graph["nodes"][1]["outputs"].clear(), "its outputs are"),
        (lambda graph: graph["nodes"][1]["outputs"][0].update(links=[]), "its output MODEL names"),
        (lambda graph: graph["nodes"][1]["widgets_values"].append(1), "3 values for the 2 fields"),
        (_value(0, ""), "lora_name is empty"),
        (_value(1, "1.0"), "is '1.0', no FLOAT"),
        (_value(1, True), "is True, no FLOAT"),
        (_value(1, 101.0), "is 101.0, beyond -100.0 to 100.0"),
        (_value(1, math.nan), "is nan, beyond"),
        (_value(1, "fp7", node=0), "weight_dtype is 'fp7', none of"),
        (_drop_link, "names link"),
        (_ghost, "it hangs in the air: there is no node 99"),
        (lambda graph: graph["links"][0].__setitem__(2, 5), "node 1 has no output 5"),
        (lambda graph: graph["links"][0].__setitem__(5, "CLIP"), "it carries CLIP, but"),
        (_swap_order, "node 2 comes before node 1, which it needs"),
    ],
)
def test_what_comfyui_would_refuse_is_named(
    break_it: Callable[[dict[str, Any]], None], message: str
) -> None:
    _, graph = graph_of("t2v_a14b")
    break_it(graph)
    assert message in "\n".join(problems(json.dumps(graph)))


def test_lengths_that_the_editor_would_round_are_named() -> None:
    _, graph = graph_of("t2v_a14b")
    (size,) = kind(graph, "EmptyHunyuanLatentVideo")
    size["widgets_values"][2] = 80
    assert f"node {size['id']} (EmptyHunyuanLatentVideo): its length is 80, not 1 + 4n" in problems(
        json.dumps(graph)
    )


def test_the_signatures_say_of_which_comfyui_they_are() -> None:
    source = json.loads(NODES_FILE.read_text())["source"]
    assert source["version"] == "0.38.1"
    assert all(len(commit) == 40 for commit in source["commits"].values())
    used = {node.type for name in NAMES for node in make_workflow(scene_of(name), VARIANTS[name])}
    assert used == read_signatures().keys()


def test_nodes_do_not_lie_on_each_other() -> None:
    for name in NAMES:
        boxes = [
            (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
            for node in graph_of(name, from_image=name != "t2v_a14b")[1]["nodes"]
        ]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] + 24 <= b[1] or b[3] + 24 <= a[1]
                assert apart, (name, a, b)


def test_a_node_whose_inputs_stay_open_is_named() -> None:
    lonely = [Node("VAEDecode", "Decode", (0, 0))]
    nodes = [*make_workflow(scene_of("ti2v_5b"), VARIANTS["ti2v_5b"]), *lonely]
    assert problems(editor_format(nodes)) == [
        f"node {len(nodes)} (VAEDecode): its input {name} is not connected"
        for name in ("samples", "vae")
    ]
