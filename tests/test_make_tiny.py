"""The training of the embedded model, at a size that takes seconds."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tools import judge, make_tiny, tiny_denoiser, tiny_vae, world
from wan.checkpoints import ModelPaths, find_model, load_transformer

CPU = torch.device("cpu")


def test_whole_clips_equal_the_cached_chunks_of_the_library() -> None:
    torch.manual_seed(0)
    vae = tiny_vae.new_vae().eval()
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            torch.nn.init.normal_(parameter, 1, 0.2)
    video = torch.rand(2, 3, 13, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video, return_dict=False)[0].mode()
        decoded = vae.decode(latents, return_dict=False)[0]
        tiny_vae.run_whole_clips(vae)
        ours = tiny_vae.encode_whole(vae, video)
        redecoded = vae.decoder(vae.post_quant_conv(latents)).clamp(-1, 1)
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(redecoded, decoded, atol=1e-4, rtol=1e-3)


def test_text_padding_and_masking_equal_the_library() -> None:
    torch.manual_seed(0)
    tokenizer = tiny_denoiser.new_tokenizer()
    encoder = tiny_denoiser.new_text_encoder(len(tokenizer)).eval()
    tokens, mask = tiny_denoiser.tokens_of(tokenizer, ["A red ball at night.", ""])
    with torch.no_grad():
        ours = tiny_denoiser.embed(encoder, tokens, mask)
        theirs = encoder(input_ids=tokens, attention_mask=mask)[0] * mask[..., None]
    torch.testing.assert_close(ours[:, : tokens.shape[1]], theirs)
    assert not ours[0, int(mask[0].sum()) :].any()


def test_one_row_for_all_padding_equals_512_rows_of_text() -> None:
    torch.manual_seed(0)
    denoiser = tiny_denoiser.new_denoiser().eval()
    text = torch.randn(2, tiny_denoiser.TOKENS + 1, tiny_denoiser.TEXT_WIDTH)
    text[0, 5:], text[1, -1] = 0, 0
    x, timestep = torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 20.0])
    with torch.no_grad():
        padded = F.pad(text, (0, 0, 0, 512 - text.shape[1]))
        library = denoiser(x, timestep, padded, return_dict=False)[0]
        tiny_denoiser.merge_pads(denoiser)
        merged = denoiser(x, timestep, text, return_dict=False)[0]
    torch.testing.assert_close(merged, library, atol=1e-5, rtol=1e-4)


def test_words_of_the_world_are_tokens_and_others_are_spelled() -> None:
    tokenizer = tiny_denoiser.new_tokenizer()
    for scene in world.scenes(100, 9):
        ids = tokenizer(world.caption(scene))["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= tiny_denoiser.TOKENS
    spelled = tokenizer.tokenize("A zorbi")
    assert spelled[-5:] == list("zorbi")


def test_stages_hand_over_and_assemble_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    build, target = tmp_path / "build", tmp_path / "tiny"
    vae = tiny_vae.new_vae()
    make_tiny.keep(vae, build / "vae.safetensors")
    statistics = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    (build / "vae.json").write_text(json.dumps(statistics))
    make_tiny.keep(judge.Judge(), build / "judge.safetensors")
    monkeypatch.setattr(make_tiny, "BANK_CLIPS", 64)
    monkeypatch.setattr(make_tiny, "BANK_PICTURES", 64)
    make_tiny.stage_denoisers(build, seconds=2, device=CPU, scale=4)
    make_tiny.stage_assemble(build, target, judge_path=tmp_path / "judge.safetensors")
    folder = find_model(ModelPaths(str(target)), "tiny")
    high = load_transformer(folder, "high", torch.float32, "cpu").state_dict()
    low = load_transformer(folder, "low", torch.float32, "cpu").state_dict()
    joint = load_file(build / "joint.safetensors")
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(high[name], low[name])
    assert (high[name] - joint[name]).abs().max() < 0.2
