"""Hostile adapter files through `read_any`: an adapter that is right, or a `ModelError`."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from adapter_files import adapter, kohya
from fuzzing import answer_or, cases, damaged, files_below
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from wan.adapter_layouts import DIFFUSERS_CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, AdapterFile, read_any
from wan.headers import ModelError
from wan.lora_metadata import OURS

LINEARS = ["self_attn.q", "ffn.0"]
PART = ("lora_A.weight", "lora_B.weight", "alpha", "lokr_w1", "lokr_w2", "lokr_w2_a", "hada_w1_a")
PARTS = (*PART, "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1_b", "lora_mid.weight", "dora_scale")
NUMBERS = (0.0, 1.0, -1.0, 2, 10**400, float("nan"), float("inf"), None, "4", [4], {"r": 4}, True)


def small(style: str, metadata: dict[str, str]) -> bytes:
    made = kohya if style == "kohya" else adapter
    if style == "kohya":
        return save(made(2.0, blocks=[0], linears=LINEARS, rank=1), metadata)
    return save(adapter(style, blocks=[0], linears=LINEARS, rank=1), metadata)


ORIGINALS = (
    small("comfy", {"format": "pt"}),
    small("kohya", {f"{OURS}format_version": "1", "sshs_model_hash": "0"}),
    small("diffusers", {DIFFUSERS_CONFIG: '{"transformer.lora_alpha": 4, "transformer.r": 1}'}),
)


@st.composite
def adapters(draw: st.DrawFn) -> bytes:
    """Parts of adapters of all kinds and shapes, some beside others that they do not go with."""
    tensors: dict[str, torch.Tensor] = {}
    for _ in range(draw(st.integers(0, 5))):
        linear = draw(st.sampled_from(["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.x.ffn.0"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 2, 4, 4, 24]), max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]))
        value = draw(st.sampled_from([0.0, 1.0, 1e38, float("nan"), float("inf")]))
        part = draw(st.sampled_from(PARTS))
        tensor = torch.full(shape, value).nan_to_num() if dtype != torch.float32 else None
        tensor = torch.full(shape, value) if tensor is None else tensor.to(dtype)
        tensors[f"diffusion_model.{linear}.{part}"] = tensor
    return save(tensors, draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3))))


@st.composite
def configurations(draw: st.DrawFn) -> bytes:
    """An adapter_config.json, whatever it says."""
    keys = ["lora_alpha", "use_rslora", "use_dora", "peft_type", "alpha_pattern", "r"]
    values = st.one_of(
        st.sampled_from(NUMBERS), st.dictionaries(st.text(max_size=4), st.sampled_from(NUMBERS))
    )
    content = draw(st.dictionaries(st.sampled_from(keys), values))
    content.setdefault("lora_alpha", draw(st.sampled_from(NUMBERS)))
    text = json.dumps(content).encode()
    return draw(st.one_of(st.just(text), damaged(text), st.just(b"[" * 100_000)))


def read_right(path: Path) -> AdapterFile:
    """The adapter, whose factors fit each other; their values stay on disk, unread."""
    file = read_any(path)
    assert file.modules
    for factors in file.modules.values():
        assert factors.a.shape[0] == factors.b.shape[1] == factors.rank > 0
        assert 0 < factors.scale < float("inf")
        assert (factors.b.double() @ factors.a.double()).shape == (len(factors.b), len(factors.a.T))
    return file


def check(files: dict[str, bytes], name: str) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        for written, content in files.items():
            (folder / written).write_bytes(content)
        answer_or(ModelError, lambda: read_right(folder / name))
        assert files_below(folder) == {folder / written for written in files}


@cases(0.4)
@given(damaged(*ORIGINALS))
def test_damaged_adapters(content: bytes) -> None:
    check({"a.safetensors": content}, "a.safetensors")


@cases(0.4)
@given(adapters())
def test_parts_that_do_not_go_together(content: bytes) -> None:
    check({"a.safetensors": content}, "a.safetensors")


@cases(0.2)
@given(configurations())
def test_hostile_configurations_of_peft(content: bytes) -> None:
    check({PEFT_WEIGHTS: small("peft", {}), PEFT_CONFIG: content}, PEFT_WEIGHTS)


def test_the_undamaged_files_are_read(tmp_path: Path) -> None:
    for index in (0, 2):
        (tmp_path / "a.safetensors").write_bytes(ORIGINALS[index])
        assert len(read_right(tmp_path / "a.safetensors").modules) == len(LINEARS)
