"""Reference UNet: the UNet reads the references itself, and its attention is joined with them (Face Fusion,
"Fusion is all you need", 2024, arXiv 2409.19111).

Where a layer of the UNet attends, the states of the references at the same layer give further keys and
values, by matrices of their own, which alone are trained. Background of a reference that is cut out is
masked. Of the paper, which has no code, only reviews were read: they join references with the text's keys and
values (`--join cross`). The default, self-attention, is this project's: there the layer's own keys are of
images too. The other flags and the start of the matrices are choices of this project.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from customize.adapters.encoders.reference_unet import Join, ReferenceNoise
from customize.adapters.reference_unet import ReferenceUNet
from customize.adapters.subject_files import adapter_file, kind_of
from customize.backbones.base import Condition
from customize.config import option
from customize.errors import UserError
from customize.trainers.methods.encoder_method import EncoderConfig, EncoderMethod, of_subjects


@dataclass
class ReferenceUNetConfig(EncoderConfig):
    join: Join = option(
        "self", "attention layers that references join: self-attention, or cross-attention beside the text"
    )
    reference_noise: ReferenceNoise = option(
        "none",
        "noise of the references as the UNet reads them: none, or that of the image at each step (slower)",
    )


class ReferenceUNetMethod(EncoderMethod):
    Config = ReferenceUNetConfig
    adapter: ReferenceUNet
    config: ReferenceUNetConfig

    def make_adapter(self) -> ReferenceUNet:
        pipe, side = self.backbone.pipe, self.backbone.resolution or self.backbone.native_resolution
        made = ReferenceUNet(pipe, side, self.config.join, self.config.reference_noise)
        return made.install(pipe.unet)

    def start_from(self, name: str) -> ReferenceUNet:
        """The adapter of an earlier run; UserError if it joins other layers or reads references otherwise."""
        path, made = adapter_file(name), self.make_adapter()
        if kind_of(path) != "reference_unet":
            raise UserError(f"--pretrained_adapter: '{path}' is no run of reference_unet; name one.")
        found = ReferenceUNet.read(path, self.backbone.pipe)
        for flag, name in (
            ("--join", "join"),
            ("--reference_noise", "noise"),
            ("--resolution", "resolution"),
        ):
            if getattr(found, name) != getattr(made, name):
                raise UserError(
                    f"--pretrained_adapter: '{path}' was trained with {flag} {getattr(found, name)}; give "
                    "the same."
                )
        return found.train().requires_grad_(True)

    def reference_pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self.adapter.pixels(images, self.config.reference_fit)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        present = batch["present"]
        count = 2 if self.uses_both() else 1
        views = batch["references"][present][:, :count].flatten(0, 1)
        latents = self.backbone.encode_references(views[:, :3])
        features = self.adapter.encoder.features(latents, views[:, 3:]).unflatten(0, (-1, count))
        shows_target = of_subjects(batch["shows_target"], present)
        encoded = self.encode(features, of_subjects(t, present), shows_target).spread(present)
        no_text, no_image = self.dropped(len(present))
        text = self.without_text(self.backbone.encode_prompt(self.prompts_of(batch, no_text)), no_text)
        weight = (present & ~no_image[:, None]).float()
        return Condition(text, self.adapter.injected(encoded, weight, regions=self.regions_of(batch)))
