"""HiDream-I1."""

import math
from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift
from torch import Tensor

from customize.backbones.base import Condition
from customize.backbones.flow import Flow
from customize.backbones.layers import presets


class HiDream(Flow):
    """Its text is the pooled states of two CLIP encoders, T5's, and those of every layer of Llama, which are
    batch first here and layer first in diffusers. It predicts the way to the data."""

    text_length = 128
    call_arguments = {
        "encoder_hidden_states": "prompt_embeds_t5",
        "encoder_hidden_states_llama3": "prompt_embeds_llama3",
        "pooled_projections": "pooled_prompt_embeds",
    }
    lora_presets = presets(
        ["to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"], ["w1", "w2", "w3"]
    )

    def train(self, mode: bool = True) -> "HiDream":
        """Experts stay in training mode, which changes gradients alone: in evaluation mode diffusers runs
        them without gradients."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.training, module._force_inference_output = True, False
        return self

    def text_lengths(self) -> list[int]:
        return [min(own, self.text_length) for own in super().text_lengths()]

    def _encode_prompt(self, prompts):
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        text = {"encoder_hidden_states": t5, "pooled_projections": pooled}
        return _swapped(text | {"encoder_hidden_states_llama3": llama})

    def _embedded(self, text: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        return super()._embedded(_swapped(text), prefix)

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        text = _swapped(condition.text)
        arguments = {
            "encoder_hidden_states_t5": text["encoder_hidden_states"],
            "encoder_hidden_states_llama3": text["encoder_hidden_states_llama3"],
            "pooled_embeds": text["pooled_projections"],
        }
        return -self.denoiser(noisy, timesteps=1000 * t, **arguments).sample

    def dynamic_shift(self) -> float:
        return calculate_shift(self.denoiser.max_seq)

    @classmethod
    def prepare_call(cls, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """The pipeline rescales every image to the area of its default size, and rounds its sides down."""
        height, width = (arguments.get(side) or 128 * pipe.vae_scale_factor for side in ("height", "width"))
        pipe.default_sample_size = math.sqrt(height * width) / pipe.vae_scale_factor * (1 + 1e-9)


def _swapped(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's states with samples and layers, the first two dimensions, exchanged."""
    name = "encoder_hidden_states_llama3"
    return text | {name: text[name].transpose(0, 1)}
