"""The frozen image encoder that subject encoders read: any CLIP vision model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from customize import embedded
from customize.errors import UserError, first_line
from customize.imaging import NOTHING, flatten
from customize.tensor_checks import load_whole

OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


ReferenceFit = Literal["stretch", "pad", "crop"]


class ImageEncoder(nn.Module):
    """`vision`, in evaluation mode and without gradients, and the preprocessing that it was trained with,
    except that images are stretched to its square unless `fit` is "pad" (with white) or "crop" (to the
    centre, as in CLIP's own preprocessing): a subject at the edge must not be cropped away."""

    def __init__(
        self,
        vision: CLIPVisionModelWithProjection,
        mean: Sequence[float],
        std: Sequence[float],
        fit: ReferenceFit = "stretch",
    ):
        super().__init__()
        self.fit = fit
        self.vision = vision.eval().requires_grad_(False)
        side = vision.config.image_size
        self.processor = CLIPImageProcessorPil(
            size={"height": side, "width": side},
            do_center_crop=False,
            image_mean=list(mean),
            image_std=list(std),
        )

    def train(self, mode: bool = True) -> "ImageEncoder":
        return super().train(False)

    @property
    def width(self) -> int:
        return self.vision.config.hidden_size

    @property
    def depth(self) -> int:
        return self.vision.config.num_hidden_layers

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Images to (n, 3, side, side); what is transparent becomes white."""
        squares = [squared(flatten(image), self.fit) for image in images]
        return self.processor(squares, return_tensors="pt").pixel_values

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Any:
        """transformers' output: `image_embeds` (n, projection) and all `hidden_states` (n, tokens, width)."""
        if (
            self.vision.device.type != "meta"
        ):  # its weights come when it runs, and pixels with them: sequential offloading
            pixels = pixels.to(self.vision.device)
        return self.vision(pixels.to(self.vision.dtype), output_hidden_states=True)


def squared(image: Image.Image, fit: ReferenceFit) -> Image.Image:
    """The image as a square, if it is padded or cropped; stretching is left to the preprocessing."""
    if fit == "stretch" or image.width == image.height:
        return image
    side = max(image.size) if fit == "pad" else min(image.size)
    if fit == "pad":
        return ImageOps.pad(image, (side, side), color=NOTHING)
    return ImageOps.fit(image, (side, side))


def load_image_encoder(name: str, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """An image encoder by folder or hub id (also OWNER/NAME/SUBFOLDER), or `stickers`, the embedded one;
    UserError if it is none."""
    name = str(embedded.IMAGE_ENCODER) if embedded.is_embedded(name) else name
    place, options = name, {}
    if not Path(name).exists() and name.count("/") > 1 and not name.startswith((".", "/", "~")):
        owner, repository, folder = name.split("/", 2)
        place, options = f"{owner}/{repository}", {"subfolder": folder}
    try:
        vision = load_whole(CLIPVisionModelWithProjection, place, dtype=dtype, **options)
    except Exception as error:  # the library raises all kinds
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = first_line(error)
        raise UserError(
            f"--image_encoder: '{name}' could not be loaded as a CLIP vision model ({reason})."
        ) from error
    return ImageEncoder(vision, **statistics(place, options))


def statistics(place: str, options: dict) -> dict:
    """Mean and standard deviation of the pixels that the image encoder was trained on: from its folder,
    from a folder feature_extractor beside it, or OpenAI's."""
    beside = [str(Path(place).parent / "feature_extractor")] if Path(place).exists() else []
    for folder in (place, *beside):
        try:
            found = CLIPImageProcessorPil.from_pretrained(folder, **(options if folder == place else {}))
        except (OSError, ValueError):
            continue
        return {"mean": found.image_mean, "std": found.image_std}
    return {"mean": OPENAI["image_mean"], "std": OPENAI["image_std"]}


def image_encoder_of(pipe: DiffusionPipeline, fit: ReferenceFit = "stretch") -> ImageEncoder | None:
    """The image encoder that a pipeline holds as its `image_encoder`, or None."""
    vision, extractor = getattr(pipe, "image_encoder", None), getattr(pipe, "feature_extractor", None)
    if vision is None:
        return None
    mean, std = (
        getattr(extractor, "image_mean", OPENAI["image_mean"]),
        getattr(extractor, "image_std", OPENAI["image_std"]),
    )
    return ImageEncoder(vision, mean, std, fit)
