"""The small world of the embedded model: what can be seen in it, said about it, and drawn of it.

A scene is six named attributes (colour, shape, action, setting, light, camera) and a few numbers
that no caption tells (size, place, phase). `caption` says it, `render` draws it by signed distance
functions on any device, thousands of clips a second on a GPU.

The zorbi, the concept that the demo teaches, is drawn here too but is in no caption of the world.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "yellow": (0.98, 0.86, 0.12),
    "blue": (0.12, 0.26, 0.90),
    "purple": (0.62, 0.16, 0.78),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.08),
}
SHAPES = ("ball", "box", "cone", "star", "ring")
ZORBI = len(SHAPES)  # the shape index of the concept, which the base world never shows
ACTIONS = ("rolling", "bouncing", "spinning", "floating", "sliding", "growing")
SETTINGS = ("a green hill", "a sandy beach", "a grey street", "a wooden floor")
LIGHTS = ("on a sunny day", "at sunset", "at night")
CAMERAS = ("static camera", "slow zoom in", "slow pan")
STYLE = "flat cartoon style"
PREPOSITION = {
    "rolling": "across",
    "bouncing": "on",
    "spinning": "on",
    "floating": "over",
    "sliding": "across",
    "growing": "on",
}
NUMBERS = ((0.38, 0.46), (-1.0, 1.0), (0.0, 1.0))  # ranges of radius, place and phase
HELDOUT_SHARE = 0.1  # of the combinations of colour, shape, action, setting and light


@dataclass(frozen=True)
class Scene:
    """One clip of the world, by index into the lists above and by numbers that no caption tells."""

    colour: int
    shape: int
    action: int
    setting: int
    light: int
    camera: int
    radius: float  # of the subject, in half sides of the picture
    place: float  # -1..1: where along its way the subject is
    phase: float  # 0..1

    def key(self) -> tuple[int, int, int, int, int]:
        """What makes a combination held out or not."""
        return (self.colour, self.shape, self.action, self.setting, self.light)


def subject_phrase(scene: Scene, concept: str | None = None) -> str:
    """Subject, action and setting in words: 'A red ball rolling down a green hill'."""
    action, setting = ACTIONS[scene.action], SETTINGS[scene.setting]
    preposition = PREPOSITION[action]
    if action == "rolling" and setting == "a green hill":
        preposition = "down"
    subject = concept or f"{list(COLOURS)[scene.colour]} {SHAPES[scene.shape]}"
    return f"A {subject} {action} {preposition} {setting}"


def caption(scene: Scene, detail: int = 2, concept: str | None = None) -> str:
    """The caption: subject, action, setting, light, then (detail 1) camera and (detail 2) style."""
    parts = [f"{subject_phrase(scene, concept)} {LIGHTS[scene.light]}"]
    if detail >= 1 or scene.camera != 0:
        parts.append(CAMERAS[scene.camera])
    if detail >= 2:
        parts.append(STYLE)
    return ", ".join(parts) + "."


def _key_is_heldout(key: tuple[int, ...]) -> bool:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def is_heldout(scene: Scene) -> bool:
    """Whether this combination is kept away from all training of the base model."""
    return _key_is_heldout(scene.key())


def heldout_table() -> Tensor:
    """(6, 6, 6, 4, 3), true if held out: by colour, shape (zorbi last), action, setting, light."""
    sizes = (len(COLOURS), len(SHAPES) + 1, len(ACTIONS), len(SETTINGS), len(LIGHTS))
    keys = itertools.product(*(range(size) for size in sizes))
    return torch.tensor([_key_is_heldout(key) for key in keys]).view(sizes)


def scenes(count: int, seed: int, heldout: bool | None = None) -> list[Scene]:
    """`count` random scenes; with `heldout` only those on that side of the split."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(
        [len(COLOURS), len(SHAPES), len(ACTIONS), len(SETTINGS), len(LIGHTS), len(CAMERAS)]
    )
    found: list[Scene] = []
    while len(found) < count:
        numbers = torch.rand(6, generator=generator)
        index = (numbers * sizes).long().tolist()
        draws = torch.rand(3, generator=generator).tolist()
        radius, place, phase = (
            low + u * (high - low) for u, (low, high) in zip(draws, NUMBERS, strict=True)
        )
        scene = Scene(*index, radius=radius, place=place, phase=phase)
        if heldout is None or is_heldout(scene) == heldout:
            found.append(scene)
    return found


def scene_tensor(batch: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """(B, 9) numbers of the scenes, the form that `render` takes."""
    rows = [
        (s.colour, s.shape, s.action, s.setting, s.light, s.camera, s.radius, s.place, s.phase)
        for s in batch
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)


# --- drawing: on (B, T, H, W) grids, with colours (B, 3, 1, 1, 1) or (B, 3, T, H, W) ---


def _pick(table: Sequence[Sequence[float]], index: Tensor) -> Tensor:
    """Rows of a table of colours by index: (B, 3, 1, 1, 1)."""
    colours = torch.tensor(table, device=index.device)
    return colours[index.long()][:, :, None, None, None]


def _blend(below: Tensor, above: Tensor, alpha: Tensor) -> Tensor:
    return below + (above - below) * alpha[:, None]


def _cover(distance: Tensor, edge: float | Tensor) -> Tensor:
    """Signed distance (negative inside) to coverage in 0..1, over an edge of that width."""
    return (0.5 - distance / edge).clamp(0, 1)


SKY = ((0.55, 0.78, 0.98), (0.98, 0.62, 0.40), (0.08, 0.09, 0.26))
WALL = ((0.93, 0.86, 0.72), (0.90, 0.70, 0.52), (0.34, 0.30, 0.38))
GROUND_LIGHT = ((1.0, 1.0, 1.0), (1.0, 0.84, 0.68), (0.42, 0.46, 0.62))
SUBJECT_LIGHT = ((1.0, 1.0, 1.0), (1.0, 0.93, 0.86), (0.74, 0.76, 0.86))
GROUND = ((0.30, 0.56, 0.22), (0.86, 0.76, 0.54), (0.50, 0.50, 0.52), (0.60, 0.40, 0.22))
SUN = ((1.0, 0.95, 0.55), (1.0, 0.85, 0.45), (0.92, 0.93, 0.98))
SEA = (0.16, 0.48, 0.66)
HILL_SLOPE = 0.35
HORIZON = 0.42


def ground_height(u: Tensor, setting: Tensor) -> Tensor:
    """Height (y, downwards) of the ground at the place u: a slope on the hill, level elsewhere."""
    return torch.where(setting == 0, HORIZON + HILL_SLOPE * (u - 0.1), torch.full_like(u, HORIZON))


def _background(u: Tensor, v: Tensor, scene: Tensor, edge: float) -> Tensor:
    """(B, 3, T, H, W) picture without subject at world coordinates u (right) and v (down)."""
    setting = scene[:, 3].view(-1, 1, 1, 1)
    light = scene[:, 4]
    indoors = (setting == 3).float()
    sky = _pick(SKY, light) + 0.10 * (v[:, None] + 0.3)
    wall = _pick(WALL, light) + 0.02 * torch.sin(18 * u)[:, None]
    picture = sky + (wall - sky) * indoors[:, None]
    sun_x = torch.where(light == 2, -0.62, 0.62).view(-1, 1, 1, 1)
    sun = _cover(torch.hypot(u - sun_x, v + 0.64) - 0.17, edge) * (1 - indoors)
    picture = _blend(picture, _pick(SUN, light).expand_as(picture), sun)
    sea = _cover((v - 0.20).abs() - 0.24, edge) * (setting == 1).float()
    lit_sea = torch.tensor(SEA, device=u.device).view(1, 3, 1, 1, 1) * _pick(GROUND_LIGHT, light)
    picture = _blend(picture, lit_sea.expand_as(picture), sea)
    houses = _cover((torch.remainder(u + 0.35, 0.7) - 0.35).abs() - 0.24, edge)
    houses = houses * _cover(-0.15 - v, edge) * (setting == 2).float()
    brick = 0.55 * _pick(GROUND, torch.full_like(light, 2)) * _pick(GROUND_LIGHT, light)
    picture = _blend(picture, brick.expand_as(picture), houses)
    ground = _pick(GROUND, scene[:, 3]) * _pick(GROUND_LIGHT, light)
    ground = ground * (1 + 0.06 * torch.sin(7 * u + 11 * v))[:, None]
    return _blend(picture, ground, _cover(ground_height(u, setting) - v, edge))


def _path(scene: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, y, angle and size factor of the subject, each (B, T, 1, 1), at times 0..1."""
    action = scene[:, 2].view(-1, 1, 1, 1)
    setting = scene[:, 3].view(-1, 1, 1, 1)
    radius, place, phase = (scene[:, i].view(-1, 1, 1, 1) for i in (6, 7, 8))
    t = time.view(1, -1, 1, 1)
    turn = 2 * math.pi
    x = torch.where(action == 0, -0.52 + 1.04 * t + 0.06 * place, 0.45 * place + 0 * t)
    x = torch.where(action == 4, 0.52 - 1.04 * t + 0.06 * place, x)
    x = torch.where(action == 3, 0.40 * place + 0.14 * torch.sin(turn * (t + phase)), x)
    size = torch.where(action == 5, 0.62 + 0.5 * t, torch.ones_like(t))
    y = ground_height(x, setting) - 0.92 * radius * size + 0.08
    hop = (torch.sin(math.pi * (2 * t + phase))).abs()
    y = torch.where(action == 1, y - 0.42 * hop, y)
    y = torch.where(action == 3, 0.12 - 0.40 * t + 0.05 * torch.cos(turn * t), y)
    angle = torch.where(action == 0, (x + 0.52) / radius, 0.25 * place + 0 * t)
    angle = torch.where(action == 2, turn * (1.1 * t + phase), angle)
    return x, y, angle, size


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector
    length = torch.hypot(x, y)
    along, across = length * torch.cos(angle), length * torch.sin(angle).abs()
    inner = 0.52
    normal = torch.tensor([inner * math.sin(sector), 1.0 - inner * math.cos(sector)])
    normal = normal / normal.norm()
    return (along - 1.0) * normal[0].item() + across * normal[1].item()


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance, at local coordinates, of the shape with this index; radius about 1."""
    length = torch.hypot(x, y)
    cone = torch.maximum(y - 0.72, 0.894 * x.abs() - 0.447 * y - 0.447)
    by_shape: tuple[Tensor, ...] = (
        length - 0.92,
        torch.maximum(x.abs(), y.abs()) - 0.78,
        cone,
        _star(x, y),
        (length - 0.66).abs() - 0.26,
    )
    distance = by_shape[0]
    for index in range(1, len(by_shape)):
        distance = torch.where(shape == index, by_shape[index], distance)
    return distance


def _draw_shape(picture: Tensor, scene: Tensor, x: Tensor, y: Tensor, edge: Tensor) -> Tensor:
    shape = scene[:, 1].view(-1, 1, 1, 1)
    colour = _pick(list(COLOURS.values()), scene[:, 0]) * _pick(SUBJECT_LIGHT, scene[:, 4])
    shade = 1 - 0.20 * _cover(-x - 0.1, edge)  # one half darker, so that turning is seen
    alpha = _cover(_distance(shape, x, y), edge) * (shape != ZORBI).float()
    return _blend(picture, colour * shade[:, None], alpha)


# Bold parts in saturated colours: the autoencoder, which never saw one, keeps these (26 dB) and
# smears eyes and a belly (21 dB).
ZORBI_PARTS: tuple[tuple[tuple[float, float, float], Callable[[Tensor, Tensor], Tensor]], ...] = (
    ((0.86, 0.10, 0.12), lambda x, y: torch.hypot(x.abs() - 0.64, y + 0.70) - 0.44),  # ears
    ((0.98, 0.86, 0.12), lambda x, y: torch.hypot(x, y - 0.15) - 0.84),  # body
)


def _draw_zorbi(picture: Tensor, scene: Tensor, x: Tensor, y: Tensor, edge: Tensor) -> Tensor:
    present = (scene[:, 1] == ZORBI).view(-1, 1, 1, 1).float()
    light = _pick(SUBJECT_LIGHT, scene[:, 4])
    for colour, distance in ZORBI_PARTS:
        paint = torch.tensor(colour, device=x.device).view(1, 3, 1, 1, 1) * light
        picture = _blend(picture, paint.expand_as(picture), _cover(distance(x, y), edge) * present)
    return picture


def render(scene: Tensor, frames: int, size: int) -> Tensor:
    """Draw scenes (B, 9) as videos (B, 3, T, size, size) in [-1, 1]; one frame is of mid-time."""
    device = scene.device
    time = (
        torch.linspace(0, 1, frames, device=device)
        if frames > 1
        else torch.full((1,), 0.5, device=device)
    )
    axis = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    camera = scene[:, 5].view(-1, 1, 1, 1)
    t = time.view(1, -1, 1, 1)
    zoom = torch.where(camera == 1, 1.08 - 0.30 * t, torch.ones_like(t))
    pan = torch.where(camera == 2, -0.26 + 0.52 * t, torch.zeros_like(t))
    u = u * zoom + pan  # (B, T, H, W)
    v = v * zoom
    edge = 2.6 / size
    picture = _background(u, v, scene, edge)
    x, y, angle, growth = _path(scene, time)
    radius = scene[:, 6].view(-1, 1, 1, 1) * growth
    dx, dy = (u - x) / radius, (v - y) / radius
    cosine, sine = torch.cos(angle), torch.sin(angle)
    local_x, local_y = cosine * dx + sine * dy, cosine * dy - sine * dx
    local_edge = edge / radius
    picture = _draw_shape(picture, scene, local_x, local_y, local_edge)
    if bool((scene[:, 1] == ZORBI).any()):
        picture = _draw_zorbi(picture, scene, local_x, local_y, local_edge)
    return picture.clamp(0, 1) * 2 - 1
