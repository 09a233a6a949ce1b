"""Make the data file of the study from the demo's dataset, with the trainer's own encoders."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data.batches import EncodedClips
from tools import world
from tools.learning_data import StudyData
from tools.make_demo_data import HELDOUT, SIZE, TRIGGER, VIDEOS, zorbi
from train.compose import compose
from train.dataset import plan_dataset
from train.encode import encode_dataset, model_paths
from train.tracking import progress_bar
from wan.checkpoints import Model, find_model, load_text_encoder, load_tokenizer, load_vae
from wan.latents import encode_video
from wan.text import encode_prompts
from wan.variants import VARIANTS

CONCEPT_CLIPS, WORLD_PROMPTS = 21, 24  # rendered held-out clips beside the demo's three; prompts
FIRST_NUMBER = 200  # of what no caption tells in them; the demo's own have smaller ones
CPU = torch.device("cpu")


def prepare_data() -> StudyData:
    """Encode the demo's clips, further held-out scenes of its concept, and the prompts."""
    config = compose(["experiment=demo"])
    facts = VARIANTS[config.model.variant]
    model = find_model(model_paths(config.model), facts.name)
    clips = plan_dataset(config.data, facts, progress_bar(True))
    dataset = encode_dataset(clips, [], config, model, CPU, progress_bar(True), print)
    pairs, heldout = _pairs(dataset.train), _pairs(dataset.heldout)
    videos = [pair for pair in pairs if pair[0].shape[1] > 1]
    images = [pair for pair in pairs if pair[0].shape[1] == 1]
    scenes = unseen_scenes()
    rendered = scenes[:: max(1, len(scenes) // CONCEPT_CLIPS)][:CONCEPT_CLIPS]
    drawn = _encoded(model, rendered, facts.frames, facts.height)
    captions = [world.caption(scene, 0, TRIGGER) for scene in scenes]
    asked = world.scenes(WORLD_PROMPTS, seed=5, heldout=True)
    table = _Texts(model, facts.text_len)
    return StudyData(
        videos=torch.stack([latents for latents, _ in videos]),
        video_texts=table.rows([text for _, text in videos]),
        images=torch.stack([latents for latents, _ in images]),
        image_texts=table.rows([text for _, text in images]),
        heldout=torch.cat([torch.stack([latents for latents, _ in heldout]), drawn]),
        heldout_texts=torch.cat(
            [
                table.rows([text for _, text in heldout]),
                table.prompts([world.caption(scene, 0, TRIGGER) for scene in rendered]),
            ]
        ),
        concept_prompts=table.prompts(captions),
        world_prompts=table.prompts([world.caption(scene, 0) for scene in asked]),
        world_wanted=torch.tensor([(scene.colour, scene.shape) for scene in asked]),
        texts=table.padded(),
    )


def unseen_scenes() -> list[world.Scene]:
    """The concept in each action, setting and light that no clip of the demo shows."""
    shown = {*VIDEOS, *HELDOUT}
    every = [(a, s, light) for a in range(6) for s in range(4) for light in range(2)]
    unseen = [triple for triple in every if triple not in shown]
    return [zorbi(*triple, FIRST_NUMBER + number) for number, triple in enumerate(unseen)]


def _pairs(clips: EncodedClips) -> list[tuple[Tensor, Tensor]]:
    """Latents (C, F, h, w) and text (L, D) of each clip."""
    return [
        (clips.pictures.latents.read(clip.latents), clips.text.read(clip.captions[0]))
        for clip in clips.clips
    ]


def _encoded(model: Model, scenes: list[world.Scene], frames: int, size: int) -> Tensor:
    """Latents (n, C, F, h, w) of scenes drawn at the demo's size and scaled down as its files."""
    vae = load_vae(model, torch.float32, CPU)
    latents = []
    for scene in scenes:
        drawn = world.render(world.scene_tensor([scene]), frames, SIZE)[0].transpose(0, 1)
        small = interpolate(drawn, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        latents.append(encode_video(vae, small.transpose(0, 1)[None]))
    return torch.cat(latents)


class _Texts:
    """A table of embeddings, each once; row 0 is that of no caption."""

    def __init__(self, model: Model, text_len: int) -> None:
        encoder = load_text_encoder(model, torch.float32, CPU)
        tokenizer = load_tokenizer(model)
        self._encode = lambda prompts: encode_prompts(prompts, tokenizer, encoder, text_len)
        self._embeddings: list[Tensor] = self._encode([""])

    def prompts(self, prompts: list[str]) -> Tensor:
        """Rows (n,) of prompts."""
        return self.rows(self._encode(prompts))

    def rows(self, embeddings: list[Tensor]) -> Tensor:
        """Rows (n,) of embeddings (L, D)."""
        return torch.tensor([self._row(embedding) for embedding in embeddings])

    def _row(self, embedding: Tensor) -> int:
        for row, known in enumerate(self._embeddings):
            if known.shape == embedding.shape and torch.equal(known, embedding):
                return row
        self._embeddings.append(embedding)
        return len(self._embeddings) - 1

    def padded(self) -> Tensor:
        """(n, L, D) with rows of zeros, L that of the longest."""
        return torch.nn.utils.rnn.pad_sequence(self._embeddings, batch_first=True)
