"""A base of which each process holds a share: the numbers of one process, less memory."""

from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tests.block_examples import loss_and_gradients, same, streaming_transformer, velocity
from tests.conftest import toy_transformer
from tests.processes import run_processes
from wan.checkpoints import ModelPaths, find_model
from wan.experts import load_experts
from wan.lora import (
    adapter_parameters,
    adapter_state,
    attach,
    load_adapter_state,
    named_adapter_parameters,
)
from wan.quantise import quantise_blocks
from wan.sharding import passes_with, shard_blocks
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import Keep
from wan.transformer import TEXT_LEN, predict_velocity

KEPT: tuple[Keep, ...] = ("everything", "attention", "nothing", "host")  # by block


def prepared() -> WanTransformer3DModel:
    """A bf16 base, some of it in fp32 as loaders leave it, and an adapter in fp32."""
    transformer = streaming_transformer()
    adapter = {id(p) for p in named_adapter_parameters(transformer).values()}
    for name, parameter in transformer.named_parameters():
        if id(parameter) not in adapter and "norm2" not in name:
            parameter.data = parameter.data.bfloat16()
    prepare_blocks(transformer, KEPT, compiled=False, device=torch.device("cpu"))
    return transformer


def frozen(transformer: WanTransformer3DModel) -> list[Tensor]:
    return [
        p for block in blocks_of(transformer) for p in block.parameters() if not p.requires_grad
    ]


def bytes_here(parameter: Tensor) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes


def share_and_compare() -> dict[str, Tensor]:
    """What a process sees with the whole base, then with its share: on an input of its own."""
    frames = 1 + distributed.get_rank()
    transformer = prepared()
    expected = loss_and_gradients(transformer, frames)
    whole_bytes = sum(map(bytes_here, frozen(transformer)))
    with torch.no_grad():
        expected_sample = velocity(transformer, frames)

    shard_blocks(blocks_of(transformer), init_device_mesh("cpu", (distributed.get_world_size(),)))
    before = sum(map(bytes_here, frozen(transformer)))
    steps = [same(loss_and_gradients(transformer, frames), expected) for _ in range(2)]
    after_step = sum(map(bytes_here, frozen(transformer)))
    with torch.no_grad():
        sampled = torch.equal(velocity(transformer, frames), expected_sample)
    after_sample = sum(map(bytes_here, frozen(transformer)))
    state = adapter_state(transformer)
    load_adapter_state(transformer, {name: 2 * value for name, value in state.items()})
    moved = not same(loss_and_gradients(transformer, frames), expected)
    return {
        "whole": torch.tensor(whole_bytes),
        "shares": torch.tensor([before, after_step, after_sample]),
        "same": torch.tensor([*steps, sampled]),
        "moved": torch.tensor(moved),
        "adapter_is_whole": torch.tensor(not any(isinstance(v, DTensor) for v in state.values())),
        "all_sharded": torch.tensor(all(isinstance(p, DTensor) for p in frozen(transformer))),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return run_processes(share_and_compare, 2, tmp_path_factory.mktemp("sharding"))


def test_steps_and_samples_are_the_same_bit_for_bit(seen: list[dict[str, Tensor]]) -> None:
    assert all(process["same"].all() for process in seen)


def test_each_process_holds_its_share_between_passes(seen: list[dict[str, Tensor]]) -> None:
    whole = seen[0]["whole"].item()
    assert all(process["all_sharded"] for process in seen)
    for shares in zip(*(process["shares"].tolist() for process in seen), strict=True):
        assert sum(shares) == whole
        assert max(shares) < 0.51 * whole


def test_adapters_are_whole_on_each_process(seen: list[dict[str, Tensor]]) -> None:
    """Saved and loaded as on one."""
    assert all(process["adapter_is_whole"] and process["moved"] for process in seen)


def load_and_compare(folder: Path) -> dict[str, Tensor]:
    """A pair that is read into shares, and its adapter attached to these, beside a whole one."""
    model = find_model(ModelPaths(str(folder)), "tiny")
    cpu = torch.device("cpu")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    whole = load_experts(model, torch.float32, cpu)
    shared = load_experts(model, torch.float32, cpu, "shard", mesh=mesh)
    outputs, shares, together = [], [], []
    for experts in (whole, shared):
        low = experts["low"]
        attach(low, 2, 2.0, ["attn1.to_q", "ffn.net.2"], 0.0, 0)
        for parameter in adapter_parameters(low):
            torch.nn.init.constant_(parameter, 0.1)
        prepare_blocks(low, ("nothing",) * len(blocks_of(low)), compiled=False, device=cpu)
        outputs.append(toy_output(low))
        shares.append(torch.tensor([sum(map(bytes_here, frozen(experts[e]))) for e in experts]))
        others = passes_with(low)
        together.append(torch.tensor(1 if others is None else others.size))
    return {
        "same": torch.tensor(torch.equal(*outputs)),
        "shares": torch.stack(shares),
        "together": torch.stack(together),
    }


def toy_output(transformer: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 1, 4, 6, generator=generator)
    text = torch.randn(1, TEXT_LEN, transformer.config["text_dim"], generator=generator)
    with torch.no_grad():
        return predict_velocity(transformer, x, torch.tensor([500.0]), text)


def test_a_pair_is_read_into_shares(toy_model: Path, tmp_path: Path) -> None:
    seen = run_processes(partial(load_and_compare, toy_model), 2, tmp_path)
    for process in seen:
        assert process["same"]
        assert process["together"].tolist() == [1, 2]
        whole, share = process["shares"]
        assert (share < 0.55 * whole).all()
    assert torch.equal(seen[0]["shares"][1] + seen[1]["shares"][1], seen[0]["shares"][0])


def test_a_packed_base_is_refused() -> None:
    transformer = toy_transformer()
    quantise_blocks(transformer, "int8")
    with pytest.raises(ValueError, match="fewer bits cannot be sharded"):
        shard_blocks(blocks_of(transformer), cast("DeviceMesh", None))
