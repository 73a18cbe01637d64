"""Scenes of the sticker world: their factors, their captions and their rendering.

Every word of a caption corresponds to something drawn. What captions never mention (place, tilt,
mirroring, perspective, light direction, shadow, texture) is drawn at random; it does not belong to the
subject.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from customize.errors import UserError
from customize.stickers.backgrounds import BACKGROUNDS, draw_background
from customize.stickers.world import Drawing, World

SIDE = 128  # pixels of an image's side
TINTS = {
    "red": (235, 60, 50),
    "blue": (60, 110, 235),
    "green": (60, 180, 75),
    "purple": (150, 70, 200),
    "golden": (240, 190, 50),
    "gray": (150, 150, 150),
}
SIZES = {"tiny": (0.3, 0.38), "": (0.62, 0.82), "huge": (0.98, 1.12)}  # of the image's side
ORIENTATIONS = {"": 0, "upside down": 180, "lying sideways": 90}  # degrees, counter-clockwise
LIGHTS = {
    "": (1.0, 1.0, 1.0),
    "in dim light": (0.5, 0.5, 0.55),
    "in warm light": (1.1, 0.88, 0.6),
}  # factors of red, green, blue
WEATHERS = ("", "in the rain", "in fog")
BORDERS = ("", "with a white border")
FRAMES = ("", "in a wooden frame")
COUNTS = {1: "", 2: "two copies of ", 3: "three copies of "}
FACTORS: dict[str, tuple] = {  # what captions speak of: fields of a scene, and what they can be
    "background": tuple(BACKGROUNDS),
    "tint": ("", *TINTS),
    "size": tuple(SIZES),
    "orientation": tuple(ORIENTATIONS),
    "light": tuple(LIGHTS),
    "weather": WEATHERS,
    "border": BORDERS,
    "frame": FRAMES,
    "count": tuple(COUNTS),
}
ARRANGEMENTS = (
    "beside",
    "above",
    "over",
)  # of the subject and its companion; captions do not tell them apart
PREFIXES = ("", "", "", "a photo of ", "a picture of ", "a sticker of ")


@dataclass(frozen=True)
class Pose:
    """What a caption never mentions; lengths are in sides of the image, angles in degrees."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 0.5  # from 0 to 1 within the range of the size word
    angle: float = 0.0
    mirror: bool = False
    lean: tuple[float, float] = (0.0, 0.0)  # perspective, horizontally and vertically
    shade: float = 0.0  # darkening towards one side, its sign says which
    shadow: float = 0.0  # opacity of the shadow on the ground


@dataclass(frozen=True)
class Scene:
    """One image: the words of its caption, and the pose and texture seed that complete it."""

    subject: Drawing
    background: str = "white"
    tint: str = ""
    size: str = ""
    orientation: str = ""
    light: str = ""
    weather: str = ""
    border: str = ""
    frame: str = ""
    count: int = 1
    companion: Drawing | None = None
    pose: Pose = Pose()
    seed: int = 0
    arrangement: str = "beside"

    def __post_init__(self) -> None:
        for name, known in FACTORS.items():
            if (value := getattr(self, name)) not in known:
                told = ", ".join(repr(choice) for choice in known)
                raise UserError(f"Scene: there is no {name} {value!r}; choose {told}.")


def draw_pose(rng: np.random.Generator, spread: float = 1.0) -> Pose:
    """A random pose; `spread` scales its range, 0 is upright in the middle."""
    u = rng.uniform(-1, 1, 7) * spread
    mirror, shadow = rng.random() < 0.5 * min(spread, 1.0), (rng.random() < 0.5) * 0.35
    return Pose(
        0.09 * u[0],
        0.07 * u[1],
        0.5 + 0.5 * u[2],
        14 * u[3],
        bool(mirror),
        (0.18 * u[4], 0.18 * u[5]),
        0.22 * u[6],
        shadow,
    )


def draw_factors(
    rng: np.random.Generator, world: World, subjects: list[Drawing], extras: float = 0.4, spread: float = 1.0
) -> Scene:
    """A random scene of one of `subjects`; with probability `extras` it has a factor beyond subject and
    background."""
    subject = subjects[rng.integers(len(subjects))]
    scene = Scene(
        subject,
        list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        pose=draw_pose(rng, spread),
        seed=int(rng.integers(2**31)),
    )
    while rng.random() < extras:
        scene = replace(scene, **draw_extra(rng, subjects))
        extras /= 2
    return scene


def draw_extra(rng: np.random.Generator, companions: list[Drawing]) -> dict:
    """One factor at random, as a field of `Scene` and its value."""

    def one_of(values):
        values = [v for v in values if v]
        return values[rng.integers(len(values))]

    field = one_of(
        [
            "tint",
            "tint",
            "size",
            "size",
            "orientation",
            "light",
            "weather",
            "border",
            "frame",
            "count",
            "companion",
        ]
    )
    if field == "count":
        return {"count": int(rng.integers(2, 4)), "companion": None}
    if field == "companion":
        return {"companion": companions[rng.integers(len(companions))], "count": 1}
    return {field: one_of(FACTORS[field])}


def caption(
    scene: Scene,
    subject: str | None = None,
    prefix: str = "",
    style: bool = True,
    setting: bool = True,
    companion: str | None = None,
) -> str:
    """The sentence for a scene. `subject` replaces the noun and its style word ("<s> fox"), `companion` those
    of the drawing beside it; `style` and `setting` say whether the studio and the background are mentioned.
    """
    noun = subject or (str(scene.subject) if style else scene.subject.word)
    article = COUNTS[scene.count] + "a"
    words = [prefix + article, scene.size, scene.tint, noun, scene.orientation, scene.border]
    if scene.companion is not None:
        words.append(f"next to a {companion or (scene.companion if style else scene.companion.word)}")
    if setting:
        words.append(BACKGROUNDS[scene.background])
    return " ".join(w for w in (*words, scene.light, scene.weather, scene.frame) if w)


def draw_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A caption as people write them: the style is named half of the time, the background mostly, with a
    prefix or without."""
    return caption(
        scene, None, PREFIXES[rng.integers(len(PREFIXES))], rng.random() < 0.6, rng.random() < 0.92
    )


def draw_scene(
    scene: Scene, world: World, size: int = SIDE, mask_companion: bool = False
) -> tuple[Image.Image, Image.Image]:
    """The image (RGB) and the subject's mask (L, 255 where the subject covers the background), squares of
    `size` pixels; with `mask_companion` it also covers the companion."""
    rng = np.random.default_rng(scene.seed)
    image = draw_background(scene.background, rng, size)
    mask = Image.new("L", (size, size))
    for drawing, place, is_subject in _placements(scene, rng):
        sprite = _tinted(world.sprite(drawing), scene.tint) if is_subject else world.sprite(drawing)
        layer = _placed(sprite, place, ORIENTATIONS[scene.orientation] if is_subject else 0, size)
        if scene.border and is_subject:
            layer = _bordered(layer, size)
        if scene.pose.shadow:
            image.paste((0, 0, 0), (0, 0), _shadow(layer, scene.pose.shadow, size))
        image.paste(layer, (0, 0), layer)
        alpha = layer.getchannel("A")
        mask.paste(255 if is_subject or mask_companion else 0, (0, 0), alpha)
    return _finished(image, scene, rng, size), mask


def _placements(scene: Scene, rng: np.random.Generator) -> list[tuple[Drawing, Pose, bool]]:
    """Which drawing goes where: the subject, its copies side by side, or the subject beside its companion."""
    low, high = SIZES[scene.size]
    pose, scale = scene.pose, low + (high - low) * scene.pose.scale
    if scene.companion is not None and scene.arrangement != "beside":
        return _arranged(scene, scene.companion, rng)
    if scene.companion is not None:
        side = 1 if rng.random() < 0.5 else -1
        subject = replace(pose, x=pose.x / 2 - 0.24 * side, scale=min(0.72 * scale, 0.55))
        other = replace(draw_pose(rng), x=0.24 * side, y=pose.y, scale=0.48, shade=pose.shade)
        return [(scene.companion, other, False), (scene.subject, subject, True)]
    if scene.count == 1:
        return [(scene.subject, replace(pose, scale=scale), True)]
    small = min(1.05 / scene.count, 0.62) * min(scale, 0.72)
    small = small / 0.72
    step = 0.94 / scene.count
    return [
        (scene.subject, replace(pose, x=pose.x / 3 + (i - (scene.count - 1) / 2) * step, scale=small), True)
        for i in range(scene.count)
    ]


def _arranged(scene: Scene, companion: Drawing, rng: np.random.Generator) -> list[tuple[Drawing, Pose, bool]]:
    """The subject above or below its companion, or partly over it, of sizes of their own."""
    pose, sign = scene.pose, 1 if rng.random() < 0.5 else -1
    x, y = (0.08, 0.23) if scene.arrangement == "above" else (0.17, 0.1)
    large, small = rng.uniform(0.42, 0.54), rng.uniform(0.38, 0.5)
    side = sign if rng.random() < 0.5 else -sign
    subject = replace(pose, x=pose.x / 3 + x * side, y=pose.y / 3 + y * sign, scale=large)
    other = replace(draw_pose(rng), x=-x * side, y=-y * sign, scale=small, shade=pose.shade)
    return [(companion, other, False), (scene.subject, subject, True)]


def _tinted(sprite: np.ndarray, tint: str) -> np.ndarray:
    """The drawing in shades of one colour; its lightness pattern stays."""
    if not tint:
        return sprite
    light = sprite[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    colour = np.array(TINTS[tint], np.float32)
    ramp = light[..., None]
    shaded = np.where(
        ramp < 0.6, colour * (0.25 + 0.75 * ramp / 0.6), colour + (255 - colour) * (ramp - 0.6) / 0.55
    )
    return np.concatenate([shaded.clip(0, 255).astype(np.uint8), sprite[..., 3:]], -1)


def _placed(sprite: np.ndarray, pose: Pose, turn: float, size: int) -> Image.Image:
    """The sprite on an empty canvas of the image's size, under the pose."""
    image = Image.fromarray(sprite)
    if pose.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(4, round(pose.scale * size))
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    a = np.deg2rad(pose.angle + turn)
    # from canvas pixels to sprite pixels: centre, rotate back, undo the perspective, centre in the sprite
    to_centre = np.array([[1, 0, -(0.5 + pose.x) * size], [0, 1, -(0.52 + pose.y) * size], [0, 0, 1]])
    rotate = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    lean = np.array([[1, 0, 0], [0, 1, 0], [pose.lean[0] / side, pose.lean[1] / side, 1]])
    to_sprite = np.array([[1, 0, side / 2], [0, 1, side / 2], [0, 0, 1]])
    m = to_sprite @ lean @ rotate @ to_centre
    m = m / m[2, 2]
    layer = image.transform(
        (size, size), Image.Transform.PERSPECTIVE, m.flatten()[:8], Image.Resampling.BICUBIC
    )
    return _shaded(layer, pose.shade, size) if pose.shade else layer


def _shaded(layer: Image.Image, shade: float, size: int) -> Image.Image:
    """Light from one side: up to `shade` darker towards the other."""
    pixels = np.array(layer)
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    ramp = 1 - abs(shade) * (ramp if shade > 0 else 1 - ramp)
    pixels[..., :3] = pixels[..., :3] * ramp[None, :, None]
    return Image.fromarray(pixels)


def _bordered(layer: Image.Image, size: int) -> Image.Image:
    """A white outline around the drawing, as die-cut stickers have."""
    width = 2 * round(size / 32) + 1
    outline = (
        layer.getchannel("A").filter(ImageFilter.MaxFilter(width)).filter(ImageFilter.BoxBlur(size / 160))
    )
    white = Image.merge("RGBA", [Image.new("L", layer.size, 255)] * 3 + [outline])
    return Image.alpha_composite(white, layer)


def _shadow(layer: Image.Image, opacity: float, size: int) -> Image.Image:
    """The opacity of a soft shadow, thrown to the lower right."""
    alpha = layer.getchannel("A").point(lambda a: int(a * opacity))
    thrown = Image.new("L", layer.size)
    thrown.paste(alpha, (round(0.03 * size), round(0.04 * size)))
    return thrown.filter(ImageFilter.BoxBlur(size / 48))


def _finished(image: Image.Image, scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """Light, weather and frame, which lie over everything."""
    if not (scene.light or scene.weather or scene.frame):
        return image
    pixels = np.asarray(image, np.float32) * np.array(LIGHTS[scene.light], np.float32)
    if scene.weather == "in fog":
        haze = np.linspace(0.75, 0.45, size, dtype=np.float32)[:, None, None]
        pixels = pixels * (1 - haze) + 225 * haze
    if scene.weather == "in the rain":
        pixels = _rained_on(pixels * 0.85, rng, size)
    if scene.frame:
        width = round(size * 0.08)
        inner = pixels[width:-width, width:-width].copy()
        pixels[:] = (140, 90, 50)
        pixels[: width // 2 + 1] += 25
        pixels[width:-width, width:-width] = inner
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _rained_on(pixels: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Forty-two slanted light streaks."""
    length, width = size // 8, max(size // 64, 1)
    for x, y in zip(rng.integers(0, size, 42), rng.integers(0, size - length, 42), strict=True):
        for i in range(length):
            columns = (x - i // 3 + np.arange(width)) % size
            pixels[y + i, columns] = 0.4 * pixels[y + i, columns] + 0.6 * np.array((190, 215, 245))
    return pixels
