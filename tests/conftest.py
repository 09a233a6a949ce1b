"""Fixtures that several test files share, and how files are spread over workers."""

import gc
import os
import socket
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan.variants import VARIANTS, VaeFacts, Variant

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]  # ids 0 and 1 as in UMT5
TEXT_DIM = 32
LONGEST = (
    "test_train",
    "test_stopping",
    "test_resume",
    "test_resume_processes",
    "test_killing",
    "test_fuzz_config",
    "test_speed",
    "test_verdict",
    "test_resume_faults",
    "test_render",
    "test_train_kinds",
    "test_evaluate",
    "test_dry_run",
    "test_bench",
    "test_secrets",
)


def pytest_configure() -> None:
    """Beside others (`make test`), a worker keeps to a core, with all that it starts."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that all workers end together."""
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """What is imported stays: to look for garbage in it takes a tenth of the time of a toy run."""
    gc.freeze()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if it asks another machine; processes of this one may talk."""
    connect = socket.socket.connect

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    def connect_here(own: socket.socket, address: str) -> None:
        if own.family != socket.AF_UNIX:
            refuse()
        connect(own, address)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the variant `tiny`, random and smaller still: read it, never write."""
    path = tmp_path_factory.mktemp("toy_model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Annotated with other classes than those of the published Wan 2.2 folders.
        pipeline = WanPipeline(
            tokenizer=toy_tokenizer(),  # pyright: ignore[reportArgumentType]
            text_encoder=toy_text_encoder(),
            vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
            scheduler=toy_scheduler(),  # pyright: ignore[reportArgumentType]
            transformer=toy_transformer(),
            transformer_2=toy_transformer(),
            boundary_ratio=0.875,
        )
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def toy_t2v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of `t2v_a14b` with small random weights: read it, never write."""
    return save_small_model(tmp_path_factory.mktemp("toy_t2v_model"), VARIANTS["t2v_a14b"])


@pytest.fixture(scope="session")
def toy_i2v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of `i2v_a14b`."""
    return save_small_model(tmp_path_factory.mktemp("toy_i2v_model"), VARIANTS["i2v_a14b"])


@pytest.fixture(scope="session")
def toy_ti2v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of `ti2v_5b`: one transformer and the VAE 2.2."""
    return save_small_model(tmp_path_factory.mktemp("toy_ti2v_model"), VARIANTS["ti2v_5b"])


def save_small_model(path: Path, variant: Variant) -> Path:
    """A real variant's channels, VAE and boundary at toy width, as its diffusers repository is."""
    kind = WanImageToVideoPipeline if variant.conditioning == "channels" else WanPipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline = kind(
            tokenizer=toy_tokenizer(),  # pyright: ignore[reportArgumentType]
            text_encoder=toy_text_encoder(),
            vae=small_vae(variant.vae),
            scheduler=toy_scheduler(),  # pyright: ignore[reportArgumentType]
            transformer=small_transformer(variant),
            transformer_2=small_transformer(variant) if len(variant.experts) == 2 else None,
            boundary_ratio=variant.boundary,
            expand_timesteps=variant.conditioning == "first_frame",
        )
    pipeline.save_pretrained(path)
    return path


def small_transformer(variant: Variant) -> WanTransformer3DModel:
    """Two heads of 128 as in every Wan, so that its settings can be told from its shapes."""
    return WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=variant.in_channels,
        out_channels=variant.geometry.channels,
        ffn_dim=512,
        freq_dim=32,
        text_dim=TEXT_DIM,
    )


def small_vae(facts: VaeFacts) -> AutoencoderKLWan:
    """The VAE of these facts with few channels."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8 if facts.decoder_base_dim else None,
        z_dim=facts.z_dim,
        is_residual=facts.is_residual,
        in_channels=facts.pixel_channels,
        out_channels=facts.pixel_channels,
        patch_size=facts.patch_size,
        scale_factor_spatial=16 if facts.patch_size else 8,
        latents_mean=list(facts.latents_mean),
        latents_std=list(facts.latents_std),
    )


def toy_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def toy_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=48,
        freq_dim=32,
        text_dim=TEXT_DIM,
        rope_max_seq_len=64,
    )


def toy_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=272,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, then the end token: no two prompts are the same to it."""
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
