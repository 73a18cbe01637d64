"""IP-Adapter: visual tokens through cross-attention of their own (Ye et al., 2023, arXiv 2308.06721)."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from customize.adapters.encoders.ip_adapter import RELEASED_DEPTH
from customize.adapters.subject import FILE, SubjectAdapter, image_prompt
from customize.backbones.base import Condition
from customize.config import check_ranges, option
from customize.trainers.methods.encoder_method import SubjectConfig, SubjectMethod, of_subjects


@dataclass
class IPAdapterConfig(SubjectConfig):
    plus: bool = option(
        True, "read patches with a resampler (IP-Adapter-Plus) instead of the pooled embedding"
    )
    dim: int = option(768, "width of the resampler (--plus)", least=1)
    depth: int = option(4, "blocks of the resampler (--plus)", least=1)
    heads: int = option(12, "attention heads of the resampler (--plus), of 64 numbers each", least=1)
    visual_queries: int = option(16, "visual tokens of the resampler (--plus)", least=1)


class IPAdapter(SubjectMethod):
    Config = IPAdapterConfig
    embedded_defaults = SubjectMethod.embedded_defaults | {"heads": 3}

    def make_adapter(self) -> SubjectAdapter:
        check_ranges(self.config)
        sizes = {name: getattr(self.config, name) for name in ("dim", "depth", "heads")}
        sizes = sizes | {"queries": self.config.visual_queries} if self.config.plus else {}
        adapter = image_prompt(self.backbone.pipe, self.image_encoder, self.config.plus, **sizes)
        if not adapter.encoder.released:
            warnings.warn(
                f"--depth {self.config.depth}: stock diffusers reads IP-Adapters of depth {RELEASED_DEPTH} "
                f"alone; this one is written as {FILE}, which this toolkit reads.",
                stacklevel=2,
            )
        return adapter

    def condition(self, batch: dict, t: Tensor) -> Condition:
        """A dropped image is replaced by the blank one that the unconditional half gets at inference."""
        encoder, present = self.adapter.encoder, batch["present"]
        count = 2 if self.uses_both() else 1
        views = batch["references"][present][:, :count].flatten(0, 1)
        features = encoder.read(self.image_encoder(views)).unflatten(0, (-1, count))
        no_text, no_image = self.dropped(len(present))
        if no_image.any():
            blank = encoder.blank(self.image_encoder, views).unsqueeze(1)
            features = torch.where(of_subjects(no_image, present).view(-1, 1, 1, 1), blank, features)
        shows_target = of_subjects(batch["shows_target"], present)
        encoded = self.encode(features, of_subjects(t, present), shows_target).spread(present)
        text = self.without_text(self.backbone.encode_prompt(self.prompts_of(batch, no_text)), no_text)
        return Condition(
            text, self.adapter.injected(encoded, present.float(), regions=self.regions_of(batch))
        )
