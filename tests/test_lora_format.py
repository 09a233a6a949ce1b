import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import ALPHA, FFN, INFO, RANK, WIDTH, random_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.headers import ModelError
from wan.lora_format import export_adapter, read_adapter, to_comfy
from wan.safetensors_writer import write_safetensors

Q = "blocks.0.attn1.to_q"
OFFICIAL_Q = "diffusion_model.blocks.0.self_attn.q"


def without_key(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != key}


# Writing


def test_the_scale_is_folded_into_b_in_fp32_before_the_cast() -> None:
    state = random_state(1)
    tensors = to_comfy(state, 0.3, RANK, torch.bfloat16)
    assert len(tensors) == len(state) == 40
    a, b = tensors[f"{OFFICIAL_Q}.lora_A.weight"], tensors[f"{OFFICIAL_Q}.lora_B.weight"]
    assert torch.equal(a, state[f"{Q}.lora_A.weight"].bfloat16())
    assert torch.equal(b, (state[f"{Q}.lora_B.weight"] * 0.3).bfloat16())
    assert not torch.equal(b, state[f"{Q}.lora_B.weight"].bfloat16() * 0.3)


def test_tensors_are_plain_and_their_own() -> None:
    state = {name: tensor.T.contiguous().T for name, tensor in random_state(1).items()}
    tensors = to_comfy(state, 1.0, RANK, torch.float32).values()
    assert all(t.is_contiguous() and t.device.type == "cpu" and t.ndim == 2 for t in tensors)
    pointers = {t.untyped_storage().data_ptr() for t in tensors}
    assert len(pointers) == len(tensors)
    assert not pointers & {t.untyped_storage().data_ptr() for t in state.values()}


def test_mixed_ranks_are_padded_with_zeros_which_changes_no_product() -> None:
    state = random_state(1)
    state[f"{Q}.lora_A.weight"] = state[f"{Q}.lora_A.weight"][:2]
    state[f"{Q}.lora_B.weight"] = state[f"{Q}.lora_B.weight"][:, :2]
    tensors = to_comfy(state, 0.5, 6, torch.float32)
    assert {t.shape[0] if "lora_A" in name else t.shape[1] for name, t in tensors.items()} == {6}
    a, b = tensors[f"{OFFICIAL_Q}.lora_A.weight"], tensors[f"{OFFICIAL_Q}.lora_B.weight"]
    product = 0.5 * state[f"{Q}.lora_B.weight"] @ state[f"{Q}.lora_A.weight"]
    torch.testing.assert_close(b @ a, product)
    assert not a[2:].any()
    assert not b[:, 2:].any()


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (f"{Q}.lora_A.weight", torch.full((RANK, WIDTH), torch.nan), "NaN or infinite"),
        (f"{Q}.lora_B.weight", torch.full((WIDTH, RANK), torch.inf), "NaN or infinite"),
        (f"{Q}.lora_A.weight", torch.ones(RANK + 1, WIDTH), r"\(5, 24\).*\(24, 4\).*expected"),
        (f"{Q}.lora_A.weight", torch.ones(RANK, WIDTH, 1), "expected"),
        (f"{Q}.lora_A.weight", torch.ones(RANK, FFN), r"\(24, 40\), in other blocks \(24, 24\)"),
        (f"{Q}.lora_magnitude_vector", torch.ones(WIDTH), "no part of a plain LoRA"),
        (f"{Q}.alpha", torch.tensor(4.0), "no part of a plain LoRA"),
        ("patch_embedding.lora_A.weight", torch.ones(4, 16, 1, 2, 2), "for patch_embedding, which"),
        ("proj_out.lora_A.weight", torch.ones(4, WIDTH), "for proj_out, which loaders refuse"),
        ("blocks.0.attn3.to_q.lora_A.weight", torch.ones(4, WIDTH), "for blocks.0.attn3.to_q"),
    ],
)
def test_adapters_that_loaders_trip_over_are_refused(
    key: str, tensor: Tensor, message: str
) -> None:
    state = random_state(1)
    state[key] = tensor
    state = dict(reversed(state.items()))  # the odd one is not always last
    with pytest.raises(ModelError, match=message):
        to_comfy(state, 1.0, RANK, torch.bfloat16)


def test_half_a_pair_a_wrong_scale_rank_or_dtype_and_nothing_are_refused() -> None:
    state = random_state(1)
    with pytest.raises(ModelError, match=f"{Q} needs both lora_A.weight and lora_B.weight"):
        to_comfy(without_key(state, f"{Q}.lora_B.weight"), 1.0, RANK, torch.bfloat16)
    for scale in (0.0, -0.5, float("inf"), float("nan")):
        with pytest.raises(ModelError, match="must be positive"):
            to_comfy(state, scale, RANK, torch.bfloat16)
    with pytest.raises(ModelError, match="has rank 4, above the adapter's rank 3"):
        to_comfy(state, 1.0, 3, torch.bfloat16)
    with pytest.raises(ModelError, match="bf16, fp16 or fp32"):
        to_comfy(state, 1.0, RANK, torch.float64)
    with pytest.raises(ModelError, match="empty"):
        to_comfy({}, 1.0, RANK, torch.bfloat16)


def test_fp16_is_refused_where_it_would_overflow_or_lose_digits() -> None:
    state = random_state(1)
    assert (
        to_comfy(state, 1.0, RANK, torch.float16)[f"{OFFICIAL_Q}.lora_A.weight"].dtype
        == torch.float16
    )
    large = {name: 3e5 * t if "ffn.net.2.lora_B" in name else t for name, t in state.items()}
    with pytest.raises(ModelError, match=r"does not fit into fp16.*at most 65504.*bf16 or fp32"):
        to_comfy(large, 1.0, RANK, torch.float16)
    with pytest.raises(ModelError, match=r"50\.0% of its values are below 6e-05"):
        to_comfy(state, 1e-6, RANK, torch.float16)
    assert to_comfy(large, 1.0, RANK, torch.bfloat16)


def test_an_untrained_adapter_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    state = random_state(1)
    with caplog.at_level(logging.WARNING):
        to_comfy(state, 1.0, RANK, torch.bfloat16)
        one_block = {n: 0 * t if "blocks.0." in n else t for n, t in state.items()}
        to_comfy(one_block, 1.0, RANK, torch.bfloat16)
    assert not caplog.records
    no_queries = {n: 0 * t if "to_q.lora_B" in n else t for n, t in state.items()}
    to_comfy(no_queries, 1.0, RANK, torch.bfloat16)
    nothing = {n: 0 * t if "lora_B" in n else t for n, t in state.items()}
    to_comfy(nothing, 1.0, RANK, torch.bfloat16)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("cross_attn.q, self_attn.q has no effect")
    assert second.startswith("the adapter has no effect")


# Files


def test_an_exported_file_is_named_hashed_and_measured(tmp_path: Path) -> None:
    high = export_adapter(tmp_path / "new", "fox", random_state(1), INFO, torch.bfloat16)
    low = export_adapter(
        tmp_path / "new", "fox", random_state(2), replace(INFO, expert="low"), torch.bfloat16
    )
    names = {"fox_high_noise.safetensors", "fox_low_noise.safetensors"}
    assert (
        {path.name for path in (tmp_path / "new").iterdir()}
        == names
        == {high.path.name, low.path.name}
    )
    assert high.size_bytes == len(high.path.read_bytes())
    (_, rank_high, of_high), (_, rank_low, of_low) = read_adapter(high.path), read_adapter(low.path)
    assert of_high["sshs_model_hash"][:12] == high.autov3 != low.autov3
    assert high.sha256[:10] == high.autov2
    assert load_file(high.path).keys() == load_file(low.path).keys()
    assert rank_high == rank_low == RANK
    assert of_high["wan_lora.pair_id"] == of_low["wan_lora.pair_id"] == "0123abcd"
    assert (of_high["wan_lora.expert"], of_low["wan_lora.expert"]) == ("high", "low")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_read_back_gives_the_same_file_again(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_state(1, blocks=12)
    file = export_adapter(tmp_path, "fox", state, INFO, dtype)
    back, rank, _ = read_adapter(file.path)
    assert rank == RANK
    assert back.keys() == state.keys()
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    again = to_comfy(back, 1.0, rank, dtype)
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(file.path).items())
    limit = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    product = ALPHA / RANK * state[f"{Q}.lora_B.weight"] @ state[f"{Q}.lora_A.weight"]
    error = back[f"{Q}.lora_B.weight"] @ back[f"{Q}.lora_A.weight"] - product
    assert error.norm() < limit * product.norm()


@pytest.mark.parametrize(
    "name",
    ["my_Checkpoint-3", "optimizer", "fox-scheduler", "a/b", "..\\fox", "", ".fox", "fox?", "a:b"],
)
def test_file_names_that_get_lost_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=re.escape(repr(name))):
        export_adapter(tmp_path / "new", name, random_state(1), INFO, torch.bfloat16)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", ["cross_attn.k_img", "text_embedding.0"])
def test_linears_that_wan_2_2_or_most_loaders_do_not_take_are_refused(
    tmp_path: Path, module: str
) -> None:
    path = tmp_path / "foreign.safetensors"
    name = f"blocks.0.{module}" if "attn" in module else module
    stem = f"diffusion_model.{name}.lora_"
    extra = {f"{stem}A.weight": torch.ones(4, WIDTH), f"{stem}B.weight": torch.ones(WIDTH, 4)}
    save_file(to_comfy(random_state(1), 1.0, RANK, torch.float32) | extra, path)
    with pytest.raises(ModelError, match=f"foreign.safetensors has weights for {name}, which"):
        read_adapter(path)


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_distilled_adapters_are_read_with_their_scale(tmp_path: Path, prefix: str) -> None:
    ours, path = to_comfy(random_state(1), 1.0, RANK, torch.float32), tmp_path / "four.safetensors"
    theirs = {}
    for name, tensor in ours.items():
        stem = prefix + name.removeprefix("diffusion_model.")
        stem = stem.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        theirs[stem] = tensor
        theirs[f"{stem.rsplit('.lora_', 1)[0]}.alpha"] = torch.tensor(RANK / 2)
    save_file(theirs, path)
    state, rank, _ = read_adapter(path)
    assert rank == RANK
    for name, tensor in random_state(1).items():
        scale = 0.5 if "lora_B" in name else 1.0
        torch.testing.assert_close(state[name], scale * tensor.float())


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (-1.0, r"is -1\.0; expected a number"),
        (4.0, "needs both lora_A and lora_B .* one is missing"),
    ],
)
def test_an_alpha_that_means_nothing_is_refused(tmp_path: Path, alpha: float, message: str) -> None:
    path = tmp_path / "odd.safetensors"
    whole = to_comfy(random_state(1), 1.0, RANK, torch.float32)
    if alpha > 0:
        whole = without_key(whole, f"{OFFICIAL_Q}.lora_B.weight")
    save_file(whole | {f"{OFFICIAL_Q}.alpha": torch.tensor(alpha)}, path)
    with pytest.raises(ModelError, match=message):
        read_adapter(path)


def test_a_file_of_mixed_ranks_is_read_with_its_largest(tmp_path: Path) -> None:
    whole = to_comfy(random_state(1), 1.0, RANK, torch.float32)
    a, b = f"{OFFICIAL_Q}.lora_A.weight", f"{OFFICIAL_Q}.lora_B.weight"
    path = tmp_path / "mixed.safetensors"
    save_file(whole | {a: torch.ones(2, WIDTH), b: torch.ones(WIDTH, 2)}, path)
    state, rank, _ = read_adapter(path)
    assert rank == RANK
    assert state[f"{Q}.lora_A.weight"].shape == (2, WIDTH)


def test_a_file_with_half_a_pair_integers_or_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    whole = to_comfy(random_state(1), 1.0, RANK, torch.float32)
    a, b = f"{OFFICIAL_Q}.lora_A.weight", f"{OFFICIAL_Q}.lora_B.weight"
    for tensors, message in (
        (without_key(whole, b), "odd.safetensors needs both"),
        (whole | {a: torch.ones(RANK, WIDTH, dtype=torch.int32)}, "holds torch.int32"),
        ({}, "empty"),
    ):
        save_file(tensors, path)
        with pytest.raises(ModelError, match=message):
            read_adapter(path)


def test_a_file_of_another_trainer_is_read_whatever_hash_it_claims(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    wrong = {"format": "pt", "sshs_model_hash": "e3b0c44298fc"}  # ai-toolkit issue 130
    write_safetensors(path, to_comfy(random_state(1), 1.0, RANK, torch.float32), wrong)
    assert read_adapter(path)[2] == wrong


def broken_files(good: bytes) -> dict[str, bytes]:
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length]
    shifted = header.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    return {
        "empty": b"",
        "length only": good[:8],
        "cut in the header": good[: length // 2],
        "cut in the data": good[:-100],
        "longer than told": good + b"more",
        "huge header": (1 << 62).to_bytes(8, "little") + good[8:],
        "no JSON": good[:8] + b"#" * length + good[8 + length :],
        "overlapping": good[:8] + shifted + good[8 + length :],
        "zip": b"PK\x03\x04" + good,
        "bit flipped": good[:-1000] + bytes([good[-1000] ^ 1]) + good[-999:],
    }


@pytest.mark.parametrize("kind", broken_files(bytes(2000)))
def test_a_broken_file_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    file = export_adapter(tmp_path, "fox", random_state(1), INFO, torch.bfloat16)
    file.path.write_bytes(broken_files(file.path.read_bytes())[kind])
    with pytest.raises(ModelError, match=r"fox_high_noise.safetensors is (damaged|not a whole)"):
        read_adapter(file.path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.safetensors is missing"):
        read_adapter(tmp_path / "nowhere.safetensors")


def test_flipped_bits_anywhere_give_the_adapter_or_one_clear_error(tmp_path: Path) -> None:
    file = export_adapter(tmp_path, "fox", random_state(1, blocks=1), INFO, torch.bfloat16)
    good, whole = file.path.read_bytes(), read_adapter(file.path)[0]
    refused = 0
    for place in torch.randint(
        len(good), (300,), generator=torch.Generator().manual_seed(0)
    ).tolist():
        file.path.write_bytes(
            good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]
        )
        try:
            state = read_adapter(file.path)[0]
        except ModelError:
            refused += 1
        else:  # a flip in the metadata or the padding
            assert all(torch.equal(whole[name], tensor) for name, tensor in state.items())
    assert refused > 200
