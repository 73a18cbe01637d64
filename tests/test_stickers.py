"""The sticker world: every word of a caption is answered by something drawn, and held-out drawings stay held
out."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from customize.errors import UserError
from customize.stickers import BACKGROUNDS, Drawing, Scene, World, caption, draw_scene
from customize.stickers.measure import masked_correlation
from customize.stickers.scene import (
    BORDERS,
    COUNTS,
    FRAMES,
    LIGHTS,
    ORIENTATIONS,
    SIZES,
    TINTS,
    WEATHERS,
    Pose,
    draw_factors,
    draw_pose,
)

WORLD = World()
FOX = Drawing("fox", "3d")
VALUES = {
    "background": [b for b in BACKGROUNDS if b != "white"],
    "tint": [t for t in TINTS if t],
    "size": [s for s in SIZES if s],
    "orientation": [o for o in ORIENTATIONS if o],
    "light": [v for v in LIGHTS if v],
    "weather": [w for w in WEATHERS if w],
    "border": [b for b in BORDERS if b],
    "frame": [f for f in FRAMES if f],
    "count": [c for c in COUNTS if c > 1],
    "companion": [Drawing("pizza", "cartoon")],
}


def pixels(scene: Scene, size: int = 64) -> np.ndarray:
    return np.asarray(draw_scene(scene, WORLD, size)[0], np.float32)


@pytest.mark.parametrize(("factor", "value"), [(f, v) for f, values in VALUES.items() for v in values])
def test_every_factor_changes_caption_and_image(factor, value):
    plain, varied = Scene(FOX), replace(Scene(FOX), **{factor: value})
    assert caption(varied) != caption(plain)
    changed = np.abs(pixels(varied) - pixels(plain)).max(-1) > 12
    assert changed.mean() > 0.02


def test_captions_read_as_sentences():
    scene = Scene(
        FOX,
        "beach",
        tint="red",
        size="tiny",
        orientation="upside down",
        light="in dim light",
        weather="in the rain",
    )
    said = "a tiny red 3d fox upside down on the beach in dim light in the rain"
    assert caption(scene) == said
    assert caption(scene, "<s> fox") == said.replace("3d fox", "<s> fox")
    assert caption(Scene(FOX, count=2), style=False, setting=False) == "two copies of a fox"
    assert caption(Scene(FOX, companion=Drawing("pizza", "flat")), prefix="a photo of ") == (
        "a photo of a 3d fox next to a flat pizza on a white background"
    )


def test_scenes_depend_on_their_fields_alone():
    scene = draw_factors(np.random.default_rng(3), WORLD, [FOX])
    first, again = draw_scene(scene, WORLD), draw_scene(scene, WORLD)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


@pytest.mark.parametrize("size", [64, 128])
def test_mask_is_where_the_subject_is(size):
    """On plain white without shadow, pixels differ from the background exactly where the mask says."""
    image, mask = draw_scene(Scene(FOX, pose=Pose(x=0.1, angle=10)), WORLD, size)
    far = np.abs(np.asarray(image, np.float32) - 248).max(-1) > 40
    covered = np.asarray(mask) > 127
    assert image.size == mask.size == (size, size)
    assert (far & ~covered).mean() < 0.01
    assert 0.1 < covered.mean() < 0.6


def test_mask_leaves_out_the_companion():
    alone = np.asarray(draw_scene(Scene(FOX, count=1), WORLD)[1]) > 127
    beside = np.asarray(draw_scene(Scene(FOX, companion=Drawing("pizza", "flat")), WORLD)[1]) > 127
    columns = np.where(beside.any(0))[0]
    assert beside.sum() < alone.sum()
    assert columns.max() - columns.min() < 90


def test_mask_covers_the_companion_where_that_is_asked_for():
    scene = Scene(FOX, companion=Drawing("pizza", "flat"))
    beside, both = (
        np.asarray(draw_scene(scene, WORLD, mask_companion=asked)[1]) > 127 for asked in (False, True)
    )
    assert (both >= beside).all()
    columns = np.where((both & ~beside).any(0))[0]
    assert columns.max() - columns.min() > 15
    assert both.mean() < 0.6


def test_held_out_lists():
    """60 drawings whose class another studio still teaches, 30 classes that nobody teaches; none is offered
    by default."""
    held_out = WORLD.drawings(held_out=True)
    unknown = {d.word for d in held_out if WORLD.is_unknown(d.word)}
    known = [d for d in held_out if not WORLD.is_unknown(d.word)]
    assert len(unknown) == 30
    assert len(known) == 60
    assert not set(held_out) & set(WORLD.drawings())
    assert all(any(o.word == d.word for o in WORLD.drawings()) for d in known)
    assert len(WORLD.drawings(core=True)) == 149 * 3 - 60


def test_correlation_finds_the_drawing():
    """High for scenes of the drawing in any pose, clearly lower for another studio's drawing of the class."""
    rng = np.random.default_rng(0)
    own, other = [], []
    for background in ("beach", "bricks", "night"):
        image, _ = draw_scene(Scene(FOX, background, pose=draw_pose(rng, 0.7)), WORLD)
        own.append(masked_correlation(image, WORLD.sprite(FOX)))
        other.append(masked_correlation(image, WORLD.sprite(Drawing("pizza", "3d"))))
    assert min(own) > 0.8
    assert max(other) < min(own) - 0.15


def test_correlation_against_the_definition():
    """An image that is the drawing on its own: the weighted correlation at that place, by hand."""
    sprite = np.zeros((64, 64, 4), np.uint8)
    sprite[8:56, 8:56, 3] = 255
    sprite[8:56, 8:32] = (255, 0, 0, 255)
    sprite[8:56, 32:56] = (0, 0, 255, 255)
    small = Image.fromarray(sprite).resize((round(0.8 * 64),) * 2, Image.Resampling.LANCZOS)
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    image.paste(small, (6, 6), small)
    assert masked_correlation(image, sprite) > 0.98
    flat = Image.new("RGB", (64, 64), (90, 90, 90))
    assert masked_correlation(flat, sprite) < 0.3


@pytest.mark.parametrize(
    ("field", "value"), [("background", "moon"), ("tint", "pink"), ("size", "small"), ("count", 4)]
)
def test_a_scene_that_cannot_be_drawn(field, value):
    with pytest.raises(UserError, match=f"there is no {field} {value!r}; choose"):
        Scene(Drawing("fox", "flat"), **{field: value})


def test_the_documentation_lists_what_prompts_may_say():
    text = (Path(__file__).parents[1] / "docs" / "sticker_world.md").read_text()
    backgrounds, factors, _, things = re.findall(r"^\* [a-z ,]+?: ((?:.|\n  )*)", text, re.M)
    said = [" ".join(listed.split()) for listed in (backgrounds, factors, things)]
    assert said[0] == ", ".join(BACKGROUNDS.values())
    assert all(value in said[1] for value in (*TINTS, *SIZES, *ORIENTATIONS, *LIGHTS, *WEATHERS, *FRAMES))
    assert said[2].split(", ") == sorted({drawing.word for drawing in WORLD.drawings()})
