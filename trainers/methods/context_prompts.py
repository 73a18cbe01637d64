"""Sets of prompts for context regularization, with {} for the learned word. They need no images."""

import itertools
from pathlib import Path

from customize import embedded
from customize.errors import UserError, shortened
from customize.reading import read_text

PLACES = (
    "on the beach",
    "in the snow",
    "in a forest",
    "in the jungle",
    "in a garden",
    "on a city street",
    "on a wooden table",
    "on a cobblestone street",
    "on green grass",
    "on a red carpet",
    "on a mountain",
    "in a desert",
    "in a kitchen",
    "in a cave",
    "under water",
    "in space",
    "at night",
    "at sunset",
    "in the rain",
    "in front of a brick wall",
    "in front of the Eiffel Tower",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "with autumn leaves",
)
COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "orange", "black", "white", "golden")
STYLES = (
    "an oil painting",
    "a watercolor painting",
    "a pencil sketch",
    "a charcoal drawing",
    "a comic drawing",
    "a pixel art image",
    "a low poly rendering",
    "a 3d rendering",
    "a clay model",
    "a wooden carving",
    "a bronze statue",
    "a stained glass window",
    "a mosaic",
    "an embroidery",
    "an origami figure",
    "a poster",
    "a sticker",
    "a logo",
    "a black and white photo",
    "a close-up photo",
    "a wide shot",
    "a photo from above",
    "an anime drawing",
    "a cubist painting",
    "an impressionist painting",
)
COMPOSITIONS = (
    "a photo of two {}",
    "a photo of a tiny {}",
    "a photo of a huge {}",
    "a {} beside a tree",
    "a {} on top of a box",
    "a {} behind a fence",
    "a {} next to a bicycle",
    "a {} between flowers",
    "a {} with a bowl of fruit",
    "a {} with a stack of books",
)
ACTIONS = (
    "running",
    "jumping",
    "sleeping",
    "sitting on a chair",
    "swimming",
    "eating",
    "looking to the left",
    "standing on a rock",
    "playing with a ball",
    "riding a skateboard",
    "driving a car",
    "reading a book",
    "playing the guitar",
    "dancing",
    "flying",
)
OUTFITS = (
    "a red hat",
    "a top hat",
    "a santa hat",
    "a crown",
    "sunglasses",
    "a scarf",
    "a rain coat",
    "a spacesuit",
    "a police uniform",
    "a chef outfit",
    "a superhero cape",
    "a suit",
    "a flower necklace",
    "a backpack",
    "headphones",
)
SCENES = (
    *(f"a photo of a {{}} {place}" for place in PLACES),
    *(f"a {colour} {{}}" for colour in COLOURS),
    *COMPOSITIONS,
)
SETS = {
    "living": (
        *SCENES,
        *(f"{style} of a {{}}" for style in STYLES),
        *(f"a {{}} {action}" for action in ACTIONS),
        *(f"a {{}} wearing {outfit}" for outfit in OUTFITS),
    ),
    "object": (
        *SCENES,
        *(f"{style} of a {{}}" for style in STYLES),
        *(
            f"a {colour} {{}} {place}"
            for colour, place in zip(itertools.cycle(COLOURS), PLACES, strict=False)
        ),
        "a shiny {}",
        "a wet {}",
        "a cube shaped {}",
        "a {} made of glass",
        "a {} on a shelf",
    ),
    "style": (
        *(f"a {thing} {place} in {{}} style" for thing in ("dog", "house") for place in PLACES),
        *(
            f"a {colour} {thing} in {{}} style"
            for colour in COLOURS
            for thing in ("car", "flower", "bird", "ship", "tree")
        ),
    ),
}


def prompt_set(name: str) -> list[str]:
    """The prompts of a set, by its name or of a text file, one a line, with {} for the word. UserError for a
    file without such prompts."""
    if name in SETS:
        return list(SETS[name])
    if embedded.is_embedded(name):
        return embedded.context_prompts()
    if not Path(name).is_file():
        known = ", ".join([*SETS, embedded.NAME])
        raise UserError(
            f"--context_prompts: there is no set or file '{shortened(name)}'; choose {known}, or a file."
        )
    lines = [line.strip() for line in read_text(Path(name)).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    for line in found or [""]:
        if line.count("{}") != 1 or line.count("{") != 1 or line.count("}") != 1:
            raise UserError(
                f"--context_prompts: '{shortened(line)}' in '{name}' must hold {{}} once, where the learned "
                "word stands."
            )
    return found
