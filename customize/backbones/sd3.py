"""Stable Diffusion 3 and 3.5."""

from torch import Tensor

from customize.backbones.base import Condition
from customize.backbones.flow import Flow


class SD3(Flow):
    timestep_sampling = "logit_normal"

    @property
    def unused_layers(self) -> set[str]:
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        return {f"{last}.attn.add_q_proj"}

    def _encode_prompt(self, prompts):
        options = {
            "device": self.device,
            "do_classifier_free_guidance": False,
            "max_sequence_length": self.text_length,
        }
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, **options)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        arguments = {"joint_attention_kwargs": condition.attention_arguments}
        return self.denoiser(noisy, timestep=1000 * t, **condition.text, **arguments).sample
