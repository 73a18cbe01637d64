"""The space that CLIP's images and prompts share, read through a base model's own text encoder, so that
gradients reach words that are learned in it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from customize import embedded
from customize.adapters.encoders.image_encoder import ImageEncoder, load_image_encoder
from customize.backbones.text import expanded
from customize.errors import UserError, first_line
from customize.tensor_checks import load_whole


class JointSpace(nn.Module):
    """`pooled` maps a text encoder's last hidden states (prompts, length, width) and where each prompt ends
    (prompts,) to vectors of the image encoder's space."""

    image_encoder: ImageEncoder
    pooled: Callable[[Tensor, Tensor], Tensor]
    encoder: Any

    def __init__(
        self, tokenizer: Any, encoder: Any, images: ImageEncoder, pooled: Callable[[Tensor, Tensor], Tensor]
    ):
        super().__init__()
        self.tokenizer, self.image_encoder, self.pooled = tokenizer, images, pooled
        self.__dict__["encoder"] = encoder  # past nn.Module: it is the base model's

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, dim) of images."""
        parts = [images[i : i + 64] for i in range(0, len(images), 64)]
        found = [self.image_encoder(self.image_encoder.pixels(part)).image_embeds for part in parts]
        return F.normalize(torch.cat(found).float(), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, dim) of prompts; gradients flow into learned words."""
        tokenizer = self.tokenizer
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        length = tokenizer.model_max_length
        texts = [expanded(prompt, tokenizer) for prompt in prompts]
        ids = tokenizer(texts, max_length=length, **options).input_ids.to(self.encoder.device)
        # not the encoder's own pooling, which some configurations take for the largest id: that of a new word
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        return F.normalize(self.pooled(self.encoder(ids).last_hidden_state, ends).float(), dim=-1)


def load_joint_space(name: str, tokenizer: Any, encoder: Any) -> JointSpace:
    """The space of a CLIP model (folder, hub id, or `stickers`) whose text half is `encoder`. UserError if it
    is none, or not of this encoder."""
    if embedded.is_embedded(name):  # its images were fitted to the mean of the text's states
        images = load_image_encoder(name)
        if images.vision.config.projection_dim != encoder.config.hidden_size:
            raise UserError(
                f"--clip_models: '{name}' is of another text encoder; name this one's CLIP model."
            )
        return JointSpace(tokenizer, encoder, images, lambda states, ends: states.mean(1))
    try:
        projection = load_whole(CLIPTextModelWithProjection, name).text_projection
    except Exception as error:  # the library raises all kinds
        reason = first_line(error)
        raise UserError(f"--clip_models: '{name}' could not be loaded as a CLIP model ({reason}).") from error
    if projection.in_features != encoder.config.hidden_size:
        raise UserError(
            f"--clip_models: the texts of '{name}' are {projection.in_features} wide, and those of the base "
            f"model's text encoder {encoder.config.hidden_size}; name the CLIP model that it is a half of."
        )
    projection.requires_grad_(False).to(encoder.device)

    def pooled(states: Tensor, ends: Tensor) -> Tensor:
        return projection(states[range(len(states)), ends].to(projection.weight.dtype))

    return JointSpace(tokenizer, encoder, load_image_encoder(name), pooled)
