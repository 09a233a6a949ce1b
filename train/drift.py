"""Prior drift: how far an adapter moves what the model does where its concept is not asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from data.buckets import Clip
from train.encode import EncodedDataset
from train.groups import Parts, in_parts
from train.step import predicted_velocity, step_inputs
from train.validate import HeldoutPlan, Progress, fixed_choice, samples_of
from wan import flow
from wan.strengths import without_adapter
from wan.transformer import device_of
from wan.variants import Expert, Variant

CLIPS = 4  # at most
LEVELS = 4  # of noise, one in each quarter of the law


@dataclass(frozen=True)
class DriftPlan:
    """Ordinary clips, or clips of the concept with prompts in which it is not named."""

    samples: HeldoutPlan
    texts: Sequence[Tensor]  # (L, D) each, used in turn; empty = the clips' own captions
    base: dict[tuple[Expert, int], list[Tensor]] = field(
        default_factory=dict
    )  # by clip, once known


def plan_drift(
    checks: HeldoutPlan,
    dataset: EncodedDataset,
    clips: Sequence[Clip],
    prompts: Sequence[str],
    trigger: str | None,
) -> DriftPlan:
    """The regularisation set among the training `clips`, if there is one.

    Else the clips held out, with those of the previews' `prompts` that lack the trigger, or with no
    words at all.
    """
    plan = replace(checks, bins=LEVELS, draws=1)
    if ordinary := [index for index, clip in enumerate(clips) if clip.item.regularisation]:
        return DriftPlan(fixed_choice(plan, dataset.train, ordinary, CLIPS), [])
    chosen = fixed_choice(plan, dataset.heldout, range(len(dataset.heldout)), CLIPS)
    plain = [p for p in dict.fromkeys(prompts) if trigger and trigger.lower() not in p.lower()]
    texts = [dataset.prompts[prompt] for prompt in plain]
    return DriftPlan(chosen, texts or [dataset.heldout.text.read(dataset.heldout.no_caption)])


@torch.no_grad()
def prior_drift(
    transformer: WanTransformer3DModel,
    expert: Expert,
    facts: Variant,
    plan: DriftPlan,
    progress: Progress,
    parts: Parts | None = None,
) -> float:
    """|velocity with the adapter - the base's| over |the base's|, over all samples; 0 = the base.

    Clips, noise and levels are the same each time, so the base is asked once: `plan` keeps what it
    said on the CPU, `LEVELS` velocities in fp32 for each clip. With `parts` the clips are divided
    among the groups of processes, and all have the same result.
    """
    sigma_range = flow.expert_range(facts.boundary, expert)
    was_training = transformer.training
    transformer.eval()

    def squares(clip: int) -> Tensor:
        moved = whole = 0.0
        said = plan.base.setdefault((expert, clip), [])
        samples = samples_of(plan.samples, sigma_range, expert, clip)
        for place, (batch, draw) in enumerate(samples):
            if plan.texts:
                text = plan.texts[clip % len(plan.texts)]
                batch = replace(batch, text=[text] * len(batch.clips))
            asked = step_inputs(batch, draw, facts, device_of(transformer))
            adapted = predicted_velocity(transformer, asked)
            if place == len(said):
                with without_adapter(transformer):
                    said.append(predicted_velocity(transformer, asked).cpu())
            base, weight = said[place].to(adapted.device), asked.weight[:, None]  # (B, 1, F, h, w)
            moved += (weight * (adapted - base).square()).sum().item()
            whole += (weight * base.square()).sum().item()
        return torch.tensor([moved, whole], dtype=torch.float64)

    clips, name = len(plan.samples.clips), f"prior drift, {expert}"
    moved, whole = in_parts(clips, squares, progress, name, parts).sum(dim=0).tolist()
    transformer.train(was_training)
    return (moved / max(whole, 1e-12)) ** 0.5
