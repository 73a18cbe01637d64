"""What is said of a user's images, each problem on images that have it and on none that have not."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from customize.data.advice import advise
from customize.stickers import BACKGROUNDS, Scene, World, draw_scene


def photo(seed: int = 0, size: tuple[int, int] = (700, 600)) -> Image.Image:
    """Sharp blocks of many sizes and colours."""
    rng, (width, height) = np.random.default_rng(seed), size
    pixels = np.zeros((height, width, 3), np.uint8)
    for side in (200, 90, 40, 15):
        for _ in range(60):
            y, x = rng.integers(height), rng.integers(width)
            pixels[y : y + side, x : x + side] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def cut_out(touches: bool) -> Image.Image:
    image, alpha = photo(), np.zeros((600, 700), np.uint8)
    alpha[100 : 600 if touches else 500, 200:500] = 255
    image.putalpha(Image.fromarray(alpha))
    return image


def turned() -> Image.Image:
    image = photo()
    image.getexif()[0x0112] = 6
    return image


def faint() -> Image.Image:
    return Image.fromarray((np.asarray(photo()) // 32).astype(np.uint8))


def empty() -> Image.Image:
    image = photo()
    image.putalpha(0)
    return image


PROBLEMS = {
    "small": lambda: photo(size=(300, 200)),
    "blurred": lambda: photo().filter(ImageFilter.GaussianBlur(9)),
    "narrow": lambda: photo(size=(1400, 600)),
    "turned": turned,
    "transparent": lambda: cut_out(False),
    "cut off": lambda: cut_out(True),
    "dark": faint,
}


def problems(image: Image.Image, resolution: int = 512) -> list[str]:
    return [advice.problem for advice in advise([image], resolution)[0]]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_is_seen_with_a_remedy(problem):
    found = advise([PROBLEMS[problem]()], 512)[0]
    expected = ["transparent", "cut off"] if problem == "cut off" else [problem]
    assert [advice.problem for advice in found] == expected
    assert all(advice.sentence.endswith(".") for advice in found)


def test_a_good_image_has_none():
    assert problems(photo()) == []
    assert problems(photo(size=(3000, 2400))) == []  # the camera's size does not matter
    assert problems(photo(size=(3000, 2400)).filter(ImageFilter.GaussianBlur(40))) == ["blurred"]


def test_nearly_equal_images_name_the_earlier_one():
    first, other = photo(0), photo(1)
    again = Image.fromarray((np.asarray(first) * 0.9 + 10).astype(np.uint8)).resize((650, 560))
    found = advise([first, other, again], 512)
    assert [[advice.problem for advice in own] for own in found] == [[], [], ["equal"]]
    assert "image 1" in found[2][0].sentence


def test_an_image_without_anything_is_to_be_left_out():
    [found] = advise([empty()], 512)
    assert "leave it out" in " ".join(advice.sentence for advice in found)


def test_the_drawings_of_the_sticker_world_are_sharp():
    world = World()
    drawings, names = world.drawings(core=True), list(BACKGROUNDS)
    scenes = [Scene(drawings[37 * i % len(drawings)], names[i % len(names)], seed=i) for i in range(24)]
    found = [problems(draw_scene(scene, world)[0], 128) for scene in scenes]
    assert sum("blurred" in own for own in found) <= 1
    assert not any({"small", "dark", "narrow"} & set(own) for own in found)
