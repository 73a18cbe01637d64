from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from customize.data.advice import advise
from customize.data.images import find_images, read_image_file
from customize.stickers import BACKGROUNDS, Scene, World, draw_scene
from customize.stickers.scene import draw_factors, draw_pose


def shapes(width, height, seed=0, flat=False):
    """Ellipses in several colours, with a texture of noise unless `flat`."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "gray")
    draw = ImageDraw.Draw(image)
    for x, y, *colour in rng.integers(0, 256, (12, 5)).tolist():
        x, y, r = x * width // 256, y * height // 256, min(width, height) // 6
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colour))
    if flat:
        return image
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def cut_out(box, size=(300, 300)):
    """Shapes that are opaque in an ellipse within `box` alone."""
    image, alpha = shapes(*size), Image.new("L", size)
    ImageDraw.Draw(alpha).ellipse(box, fill=255)
    image.putalpha(alpha)
    return image


def blurred(image, percent):
    return image.filter(ImageFilter.GaussianBlur(percent / 100 * min(image.size)))


def reopened(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def problems(*images, resolution=256):
    return [[advice.problem for advice in own] for own in advise(images, resolution)]


def sentence(problem, *images, resolution=256):
    """What the last of the images is told about a problem."""
    return dict(advise(images, resolution)[-1])[problem]


def turned(image, orientation, kind="JPEG"):
    exif = image.getexif()
    exif[0x0112] = orientation
    return reopened(image, kind, exif=exif)


def test_good_images_get_no_advice():
    assert advise([], 512) == []
    assert (
        problems(*(shapes(640, 480, seed) for seed in range(4)), shapes(300, 300, 9, flat=True)) == [[]] * 5
    )


def test_small_images_are_told_how_much_they_are_enlarged():
    assert problems(shapes(512, 700), resolution=512) == [[]]
    assert problems(shapes(700, 511), resolution=512) == [["small"]]
    assert "640 x 500 pixels and is enlarged a little to 512" in sentence(
        "small", shapes(640, 500), resolution=512
    )
    assert "400 x 300 pixels and is enlarged to 512: take" in sentence(
        "small", shapes(400, 300), resolution=512
    )
    assert "90 x 80 pixels and is enlarged 6.4 times" in sentence("small", shapes(90, 80), resolution=512)


@pytest.mark.parametrize("size", [(128, 128), (400, 300), (1600, 1200)])
@pytest.mark.parametrize("flat", [True, False])
def test_images_out_of_focus_are_blurred_at_any_size(size, flat):
    image = shapes(*size, flat=flat)
    assert problems(image, blurred(image, 1.5), resolution=128)[0] == []
    for percent in (1.5, 3, 8):
        assert "blurred" in problems(blurred(image, percent), resolution=128)[0]


def test_a_sharp_subject_before_a_soft_background_is_in_focus():
    image = blurred(shapes(600, 600), 3)
    image.paste(shapes(200, 200, 1), (200, 200))
    assert problems(image) == [[]]


def test_noise_does_not_hide_that_an_image_is_out_of_focus():
    soft = np.asarray(blurred(shapes(1200, 900, flat=True), 2))
    noisy = soft + np.random.default_rng(0).normal(0, 6, soft.shape)
    assert problems(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))) == [["blurred"]]


def test_the_outline_of_a_cut_out_does_not_make_it_sharp():
    image = cut_out((30, 30, 270, 270))
    assert problems(image) == [["transparent"]]
    soft = blurred(image.convert("RGB"), 3)
    soft.putalpha(image.getchannel("A"))
    assert problems(soft) == [["blurred", "transparent"]]


def test_steps_at_the_outline_of_a_flat_cut_out_do_not_count():
    image = cut_out((30, 30, 270, 270))
    flat = Image.new("RGB", image.size, "orange")
    for side in range(30, 270, 8):
        flat.paste("navy", (side, 0, side + 4, 60))
    flat.putalpha(image.getchannel("A"))
    assert problems(flat) == [["transparent"]]


def test_the_width_of_outlines_is_told_in_pixels_of_the_image():
    edge = Image.new("L", (1000, 1000))
    edge.paste(200, (500, 0, 1000, 1000))
    told = sentence("blurred", blurred(edge, 2))
    [width] = [int(word) for word in told.split() if word.isdigit()]
    assert width == pytest.approx(np.sqrt(2 * np.pi) * 20, rel=0.15)


def test_an_image_nearly_equal_to_an_earlier_one_names_it():
    first, second = shapes(400, 300), shapes(400, 300, 1)
    copy = reopened(second.resize((320, 240)), "JPEG", quality=50)
    assert problems(first, second, copy, resolution=240) == [[], [], ["equal"]]
    assert "nearly equal to image 2" in sentence("equal", first, second, copy)
    assert "nearly equal to image 1" in sentence("equal", copy, first, second)


def test_other_images_are_not_equal():
    image = shapes(300, 300)
    red, green, blue = image.split()
    others = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.merge("RGB", (blue, red, green))
    assert problems(image, *others) == [[]] * 3
    black = Image.new("RGB", (300, 300))
    assert problems(black, black) == [["dark"]] * 2


def test_equal_images_are_found_however_they_are_turned():
    image = shapes(400, 300)
    lying = turned(image.transpose(Image.Transpose.ROTATE_90), 6)
    assert problems(image, lying) == [[], ["equal", "turned"]]


@pytest.mark.parametrize(
    ("box", "side"),
    [
        ((50, -80, 250, 200), "upper"),
        ((50, 100, 250, 380), "lower"),
        ((-80, 50, 200, 250), "left"),
        ((100, 50, 380, 250), "right"),
        ((-80, -80, 200, 200), "upper and left"),
        ((-60, -60, 200, 360), "upper, lower and left"),
    ],
)
def test_a_cut_out_that_goes_on_beyond_the_border_is_cut_off(box, side):
    assert problems(cut_out(box)) == [["cut off", "transparent"]]
    assert f"the {side} border:" in sentence("cut off", cut_out(box))


@pytest.mark.parametrize("box", [(30, 30, 270, 270), (0, 0, 299, 299)])
def test_a_cut_out_within_the_image_or_touching_it_is_whole(box):
    assert problems(cut_out(box)) == [["transparent"]]


def test_rounded_corners_are_no_cut_out():
    image, alpha = shapes(300, 300), Image.new("L", (300, 300))
    ImageDraw.Draw(alpha).rounded_rectangle((0, 0, 299, 299), 40, fill=255)
    image.putalpha(alpha)
    assert problems(image) == [["transparent"]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_told_as_the_mask_that_training_reads(tmp_path, mode):
    image = cut_out((60, 60, 240, 240))
    made = image.quantize() if mode == "P" else image.convert(mode)
    made.save(tmp_path / "a.png")
    told = sentence("transparent", Image.open(tmp_path / "a.png"))
    shown, mask = read_image_file(find_images(tmp_path, "a dog")[0])
    share = 1 - np.asarray(mask).mean() / 255
    assert told.startswith(f"{100 * share:.0f} % of it is transparent")
    assert "become white" in told
    assert shown.getpixel((0, 0)) == (255, 255, 255)


def test_an_opaque_alpha_channel_is_no_transparency():
    image = shapes(300, 300)
    image.putalpha(255)
    assert problems(image) == [[]]


def test_an_image_that_is_all_transparent_is_to_be_left_out():
    assert problems(Image.new("RGBA", (300, 300))) == [["transparent"]]
    assert "leave it out" in sentence("transparent", cut_out((150, 150, 160, 160)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_turned_images_are_told_and_measured_upright(kind):
    image = turned(shapes(200, 90), 6, kind)
    assert problems(image, resolution=128) == [["small", "turned", "narrow"]]
    assert "90 x 200 pixels" in sentence("small", turned(shapes(200, 90), 6, kind), resolution=128)
    assert "90 x 200 pixels" in sentence("small", image, resolution=128)
    assert problems(turned(shapes(300, 300), 3, kind)) == [["turned"]]
    assert problems(turned(shapes(300, 300), 1, kind)) == [[]]


def test_sides_of_a_turned_cut_out_are_those_seen():
    image = turned(cut_out((50, -80, 250, 200)), 6, "PNG")  # shown a quarter turn clockwise
    assert "the right border:" in sentence("cut off", image)


def test_narrow_images_are_told_how_much_the_crop_leaves_out():
    assert problems(shapes(600, 300)) == [[]]
    assert problems(shapes(300, 610)) == [["narrow"]]
    assert "1200 x 300 pixels: the square crop of its middle leaves 75 %" in sentence(
        "narrow", shapes(1200, 300)
    )


def test_images_that_show_nothing_are_dark():
    image = shapes(300, 300)
    assert "almost black" in sentence("dark", image.point(lambda level: level // 8))
    assert "of one colour" in sentence("dark", Image.new("RGB", (300, 300), "orange"))
    assert problems(image.point(lambda level: level // 2)) == [[]]


def test_a_dark_cut_out_is_judged_without_its_background():
    image = cut_out((30, 30, 270, 270))
    night = image.convert("RGB").point(lambda level: level // 8)
    night.putalpha(image.getchannel("A"))
    assert "dark" in problems(night)[0]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_every_mode_is_judged_as_the_same_image(mode):
    image = shapes(1200, 900, flat=True)
    gray = np.asarray(image.convert("L"))
    if mode == "I;16":
        made = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode == "I":
        made = Image.fromarray(gray.astype(np.int32) * 257)
    elif mode == "F":
        made = Image.fromarray(gray.astype(np.float32) / 255)
    else:
        made = image.convert(mode)
    assert made.mode == mode
    assert problems(made) == [[]]
    if mode != "1":  # of black and white dots
        assert problems(image if mode in ("P", "CMYK", "YCbCr") else image.convert("L"), made)[1] == ["equal"]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 9), (23, 24)])
def test_tiny_images_are_small(size):
    assert "small" in problems(shapes(*size) if min(size) > 6 else Image.new("RGB", size))[0]


def test_the_images_stay_as_they_are():
    image = turned(shapes(400, 300), 6)
    pixels = np.asarray(reopened(shapes(400, 300), "JPEG"))
    advise([image], 256)
    assert (image.size, image.getexif()[0x0112]) == ((400, 300), 6)
    assert np.array_equal(np.asarray(image), pixels)


def test_the_sticker_world_gets_no_advice():
    world, rng = World(), np.random.default_rng(0)
    drawings = list(world.drawings())
    for i in range(0, len(drawings), 16):
        scenes = [Scene(drawings[i], name, pose=draw_pose(rng), seed=i) for name in BACKGROUNDS]
        scenes += [draw_factors(rng, world, drawings) for _ in range(4)]
        images = [draw_scene(scene, world)[0] for scene in scenes]
        assert problems(*images, resolution=128) == [[]] * len(images)
