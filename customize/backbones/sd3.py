"""Stable Diffusion 3, also with learned words in its prompts."""

from typing import Any

from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from customize.backbones.base import Condition
from customize.backbones.flow import Flow


class SD3(Flow):
    timestep_sampling = "logit_normal"

    @property
    def unused_layers(self) -> set[str]:
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        return {f"{last}.attn.add_q_proj"}

    def __init__(self, pipe, name=""):
        super().__init__(
            pipe if isinstance(pipe, WordsSD3Pipeline) else WordsSD3Pipeline(**pipe.components), name
        )

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


class WordsSD3Pipeline(TextualInversionLoaderMixin, StableDiffusion3Pipeline):
    """Stable Diffusion 3 whose prompts may hold learned words, which diffusers' own pipeline of it does not
    support."""

    def encode_prompt(self, prompt: Any, prompt_2: Any = None, prompt_3: Any = None, **options) -> Any:
        tokenizers = self.tokenizer, self.tokenizer_2, self.tokenizer_3
        names = "negative_prompt", "negative_prompt_2", "negative_prompt_3"
        negatives = [options.get(name) or options.get("negative_prompt") for name in names]

        def expand(texts):
            pairs = zip(texts, tokenizers, strict=True)
            return [
                self.maybe_convert_prompt(text, t) if text is not None and t is not None else text
                for text, t in pairs
            ]

        options |= dict(zip(names, expand(negatives), strict=True))
        return super().encode_prompt(*expand([prompt, prompt_2 or prompt, prompt_3 or prompt]), **options)
