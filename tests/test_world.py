"""The small world: captions say what is drawn, and nothing held out is ever trained on."""

import dataclasses

import torch

from tools import make_demo_data, tiny_vae, world


def test_a_caption_follows_the_structure_of_the_issue() -> None:
    scene = world.Scene(0, 0, 0, 0, 0, 0, radius=0.4, place=0.0, phase=0.0)
    assert world.caption(scene, 0) == "A red ball rolling down a green hill on a sunny day."
    assert world.caption(scene, 2) == (
        "A red ball rolling down a green hill on a sunny day, static camera, flat cartoon style."
    )
    assert "slow pan" in world.caption(dataclasses.replace(scene, camera=2), 0)


def test_scenes_keep_to_their_side_of_the_split() -> None:
    assert not any(world.is_heldout(scene) for scene in world.scenes(200, 0, heldout=False))
    assert all(world.is_heldout(scene) for scene in world.scenes(50, 0, heldout=True))
    share = world.heldout_table()[:, : len(world.SHAPES)].float().mean().item()
    assert 0.07 < share < 0.13


def test_scenes_for_training_hold_no_held_out_combination() -> None:
    torch.manual_seed(0)
    index = tiny_vae.random_scenes(4000, torch.device("cpu"))[:, :5].long()
    assert not world.heldout_table()[tuple(index.T)].any()
    assert (index[:, 1] != world.ZORBI).all()


def test_pictures_show_the_colour_at_the_subject() -> None:
    for colour, rgb in enumerate(world.COLOURS.values()):
        scene = world.Scene(colour, 1, 5, 2, 0, 0, radius=0.46, place=0.0, phase=0.0)
        picture = world.render(world.scene_tensor([scene]), 13, 64)[0, :, 12]  # (3, H, W)
        near = ((picture + 1) / 2 - torch.tensor(rgb).view(3, 1, 1)).abs().amax(0) < 0.03
        assert near.sum() > 100


def test_the_subject_moves_as_the_action_says() -> None:
    def centre(action: int, frame: int) -> float:
        scene = world.Scene(0, 0, action, 3, 0, 0, radius=0.4, place=0.0, phase=0.0)
        video = world.render(world.scene_tensor([scene]), 13, 64)[0]
        red = (video[0] > 0.3) & (video[1] < -0.6)  # (T, H, W)
        return (
            red[frame].float().mean(0).mul(torch.arange(64)).sum()
            / red[frame].float().mean(0).sum()
        )

    assert centre(0, 12) - centre(0, 0) > 20  # rolling: to the right
    assert centre(4, 12) - centre(4, 0) < -20  # sliding: to the left
    assert abs(centre(1, 12) - centre(1, 0)) < 2  # bouncing: on the spot


def test_the_zorbi_is_in_no_caption_of_the_world_and_looks_like_nothing_in_it() -> None:
    words = " ".join(world.caption(scene) for scene in world.scenes(300, 3))
    assert make_demo_data.TRIGGER not in words
    scene = world.Scene(0, world.ZORBI, 5, 0, 0, 0, radius=0.45, place=0.0, phase=0.0)
    ball = dataclasses.replace(scene, shape=0)
    zorbi, plain = (world.render(world.scene_tensor([s]), 13, 64) for s in (scene, ball))
    assert (zorbi - plain).abs().mean() > 0.02


def test_held_out_demo_clips_are_combinations_of_their_own() -> None:
    assert not set(make_demo_data.HELDOUT) & set(make_demo_data.VIDEOS)
