"""Z-Image."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from customize.backbones.base import Condition
from customize.backbones.flow import Flow
from customize.backbones.layers import presets


class ZImage(Flow):
    """Time runs from noise at 0 to data at 1 inside the model, which predicts the way to the data. Each
    prompt has as many tokens as it needs."""

    needs_chat_template = True
    text_length = 512
    embedding_names = ("qwen3",)
    packing = 2
    samples_posterior = False
    lora_presets = presets(
        ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"],
        ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
    )

    def _encode_prompt(self, prompts):
        texts, _ = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        masks = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in texts]
        return {
            "encoder_hidden_states": pad_sequence(texts, batch_first=True),
            "encoder_attention_mask": pad_sequence(masks, batch_first=True),
        }

    def _embedded(self, text: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        return {f"{prefix}prompt_embeds": [own.to(self.device) for own in _unpadded(text)]}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        images = [*noisy.unsqueeze(2).unbind()]
        towards_data = self.denoiser(images, 1 - t, _unpadded(condition.text), return_dict=False)[0]
        return -torch.stack(towards_data).squeeze(2)


def _unpadded(text: dict[str, Tensor]) -> list[Tensor]:
    return [
        own[mask.bool()]
        for own, mask in zip(text["encoder_hidden_states"], text["encoder_attention_mask"], strict=True)
    ]
