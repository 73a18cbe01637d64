"""The sticker world: a small rendered world with ground truth, and the base model that was trained on it."""

from customize.stickers.scene import BACKGROUNDS, Scene, caption, draw_scene
from customize.stickers.world import ATLAS_COLUMNS, DATA, ENCODER, MODEL, Drawing, World

__all__ = [
    "ATLAS_COLUMNS",
    "BACKGROUNDS",
    "DATA",
    "ENCODER",
    "MODEL",
    "Drawing",
    "Scene",
    "World",
    "caption",
    "draw_scene",
]
