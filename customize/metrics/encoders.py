"""Models that turn images and prompts into features, each with a stamp that identifies model and
preprocessing."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from customize import embedded
from customize.cache import fingerprint
from customize.errors import UserError, first_line
from customize.imaging import to_tensor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MetricEncoder:
    """Images to unit vectors.

    `features` maps pixels (batch, 3, height, width) to (batch, d); `prepare` maps one image to pixels (3,
    height, width). `stamp` names the model and the preprocessing, and goes into every result.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Tensor], Tensor],
        prepare: Callable[[Image.Image], Tensor],
        stamp: str,
        batch_size: int = 64,
    ):
        self.model = model.eval().requires_grad_(False)
        self.features, self.prepare, self.stamp, self.batch_size = features, prepare, stamp, batch_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, d), float32 on the CPU."""
        starts = range(0, len(images), self.batch_size)
        batches = (
            torch.stack([self.prepare(p.convert("RGB")) for p in images[i : i + self.batch_size]])
            for i in starts
        )
        return torch.cat(
            [F.normalize(self.features(b.to(self.device)).float(), dim=-1).cpu() for b in batches]
        )


class ClipEncoder(MetricEncoder):
    """Images and prompts to unit vectors of one space. `texts` maps prompts to (n, d).

    Raises UserError where the two widths differ, before anything is drawn.
    """

    def __init__(self, *parts, texts: Callable[[list[str]], Tensor], **options):
        super().__init__(*parts, **options)
        self._texts = texts
        widths = self([Image.new("RGB", (64, 64))]).shape[1], self.texts(["a"]).shape[1]
        if widths[0] != widths[1]:
            raise UserError(
                f"'{self.stamp}' gives {widths[0]} numbers an image but {widths[1]} a prompt; give a CLIP "
                "model."
            )

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d), float32 on the CPU."""
        chunks = [list(prompts[i : i + self.batch_size]) for i in range(0, len(prompts), self.batch_size)]
        return torch.cat([F.normalize(self._texts(chunk).float(), dim=-1).cpu() for chunk in chunks])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _loaded(flag: str, name: str, load: Callable, **options):
    try:
        return load(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"--{flag}: '{name}' could not be loaded ({reason}); give a hub id or a local folder."
        ) from error


def load_clip(name: str, flag: str = "clip") -> ClipEncoder:
    """CLIP from a hub id or a local folder, with its own preprocessing (PIL); `openai/clip-vit-base-patch32`
    is usual."""
    model = _loaded(flag, name, AutoModel.from_pretrained, use_safetensors=True, dtype=torch.float32).to(
        _device()
    )
    if not isinstance(
        model, CLIPModel
    ):  # CLIPModel's own loading would fill another model's gaps with random weights
        kind = getattr(model.config, "model_type", "")
        raise UserError(
            f"--{flag}: '{name}' is a '{kind}' model; give a CLIP one, such as openai/clip-vit-base-patch32."
        )
    processor = _loaded(flag, name, CLIPImageProcessorPil.from_pretrained)
    tokenizer = _loaded(flag, name, CLIPTokenizer.from_pretrained)
    if len(tokenizer) <= len(
        tokenizer.all_special_tokens
    ):  # without its files it loads empty: all prompts would be equal
        raise UserError(
            f"--{flag}: '{name}' has no tokenizer; download its tokenizer.json, or vocab.json and "
            "merges.txt, too."
        )

    def texts(prompts: list[str]) -> Tensor:
        words = tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=_length(model.config.text_config),
            return_tensors="pt",
        )
        return model.get_text_features(**words.to(model.device)).pooler_output

    def pixels(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt").pixel_values[0]

    sides = processor.to_dict()["crop_size" if processor.do_center_crop else "size"]
    resampling = Image.Resampling(processor.resample).name.lower()
    fitted = f"{resampling}, {'centre crop' if processor.do_center_crop else 'resized'}"
    stamp = f"{_named(name, model)}, {fitted} {'x'.join(map(str, sides.values()))}"
    return ClipEncoder(
        model, lambda batch: model.get_image_features(batch).pooler_output, pixels, stamp, texts=texts
    )


def _named(name: str, model: nn.Module) -> str:
    return f"{name} (weights {fingerprint(model)[:8]})"


def _length(config) -> int:
    return config.max_position_embeddings


def load_sticker_clip() -> ClipEncoder:
    """The CLIP pair of the sticker world; its image encoder was fitted to the mean of the text encoder's
    states."""
    folder = embedded.MODEL
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")

    def texts(prompts: list[str]) -> Tensor:
        # always padded to the full length: this image_encoder's padding positions carry meaning
        words = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=_length(text.config),
            return_tensors="pt",
        )
        return text(words.input_ids).last_hidden_state.mean(1)

    def pixels(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt").pixel_values[0]

    side = vision.config.image_size
    stamp = f"{_named('stickers', vision)}, resized {side}x{side}"
    return ClipEncoder(vision, lambda batch: vision(batch).image_embeds, pixels, stamp, texts=texts)


def load_dino(name: str, flag: str = "dino") -> MetricEncoder:
    """DINO (`facebook/dino-vits16`) or DINOv2 (`facebook/dinov2-base`) from a hub id or a local folder: the
    class token.

    Preprocessing is that of the papers' evaluation: shorter side to 256 bicubic, centre crop of 224, ImageNet
    statistics; in proportion for a model of another input size.
    """
    model = _loaded(flag, name, AutoModel.from_pretrained, use_safetensors=True, dtype=torch.float32).to(
        _device()
    )
    kind = getattr(model.config, "model_type", "")
    if kind not in ("vit", "dinov2", "dinov2_with_registers"):
        raise UserError(
            f"--{flag}: '{name}' is a '{kind}' model; give a DINO or DINOv2 one, such as "
            "facebook/dino-vits16."
        )
    size = 224 if kind != "vit" else model.config.image_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)

    def pixels(image: Image.Image) -> Tensor:
        return (to_tensor(cropped(image, round(size * 256 / 224), size)) - mean) / std

    stamp = f"{_named(name, model)}, class token, bicubic {round(size * 256 / 224)}, centre crop {size}"
    return MetricEncoder(model, lambda batch: model(batch).last_hidden_state[:, 0], pixels, stamp)


def cropped(image: Image.Image, shorter: int, size: int) -> Image.Image:
    """The image with its shorter side at `shorter` pixels (bicubic), and of that the middle `size` x
    `size`."""
    scale = shorter / min(image.size)
    resized = image.resize(
        [max(round(side * scale), shorter) for side in image.size], Image.Resampling.BICUBIC
    )
    left, top = ((side - size) // 2 for side in resized.size)
    return resized.crop((left, top, left + size, top + size))
