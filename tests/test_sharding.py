"""A base of which each process holds a share: the numbers of one process, less memory."""

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
from wan.lora import adapter_state, load_adapter_state, named_adapter_parameters
from wan.quantise import quantise_blocks
from wan.sharding import shard_blocks
from wan.speed import Keep, blocks_of, prepare_blocks

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


def test_a_packed_base_is_refused() -> None:
    transformer = toy_transformer()
    quantise_blocks(transformer, "int8")
    with pytest.raises(ValueError, match="fewer bits cannot be sharded"):
        shard_blocks(blocks_of(transformer), cast("DeviceMesh", None))
