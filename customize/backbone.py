"""A base model behind six verbs: methods and losses never ask which model it is.

`encode_image`, `encode_prompt`, `draw_times`, `add_noise`, `denoise`, `clean`. Each wraps the diffusers pipeline of the model
and calls the pipeline's own encoding code, so that training and inference cannot drift apart.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from customize.attention import Injected
from customize.cache import TensorCache, fingerprint, key_of
from customize.errors import UserError
from customize.tokens import ENCODER_NAMES, SUFFIXES, WordsSD3Pipeline, text_parts

EMBEDDINGS = {  # a denoiser's text arguments, as its pipeline's call names them
    "encoder_hidden_states": "prompt_embeds",
    "text_embeds": "pooled_prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}
PREDICTIONS = ("epsilon", "v_prediction")  # what DDPM models may be trained to predict


@dataclass
class Condition:
    """What the denoiser is conditioned on: its text arguments, and what its attention processors are given."""

    text: dict[str, Tensor]
    injected: Injected | None = None  # reaches the processors as `ip_hidden_states`, the one name diffusers lets through

    @property
    def attention_arguments(self) -> dict | None:
        return None if self.injected is None else {"ip_hidden_states": self.injected}


@dataclass
class Step:
    """One noising and one prediction: all that a loss may need. Latents are (batch, channels, height, width)."""

    latents: Tensor
    noisy: Tensor
    t: Tensor
    target: Tensor
    condition: Condition
    prediction: Tensor
    batch: dict = field(repr=False)


def unsupported(why: str) -> UserError:
    """For a setting that would change what is trained, and that no backbone here knows."""
    return UserError(f"this base model cannot be trained here: {why}; give another base model or mend its configuration.")


class Backbone(nn.Module):
    """The frozen components of a diffusers pipeline, registered so that they move and train as one module."""

    denoiser_name = "unet"
    t_max = 1000  # its times, over this, are what encoders see: 0 is data, 1 is noise
    takes_negative_prompt = True
    resolution = 0  # side of the pictures that this run trains on and draws, in pixels
    embedding_names: tuple[str, ...] = ENCODER_NAMES  # of the text encoders, in files of learned words

    def __init__(self, pipe: DiffusionPipeline, name: str = ""):
        super().__init__()
        self.pipe, self.name = pipe, name
        self.vae = pipe.vae
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.tokenizers, encoders = text_parts(pipe)
        self.text_encoders = nn.ModuleList(encoders)
        self.prompts: dict[str, dict[str, Tensor]] = {}  # text embeddings of prompts that were cached
        self._check_latents()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stays in evaluation mode, as its components were pretrained (T5 has dropout); only LoRA's own dropout follows."""
        super().train(False)
        for name, module in self.named_modules():
            if name.endswith(("lora_dropout", "lora_dropout.default")):
                module.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def factor(self) -> int:
        """Sides of a picture must be multiples of this many pixels."""
        return self.pipe.vae_scale_factor * getattr(self.denoiser.config, "patch_size", 1)

    @property
    def native_resolution(self) -> int:
        """The side, in pixels, of the pictures that the model was trained on."""
        latents = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size
        return latents * self.pipe.vae_scale_factor

    # images

    def _check_latents(self) -> None:
        """Settings of the autoencoder that change what is trained on are used, or refused."""
        config, channels = self.vae.config, self.latent_channels
        if not config.scaling_factor > 0:
            raise unsupported(f"the autoencoder's scaling_factor is {config.scaling_factor}")
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise unsupported(f"the autoencoder sets {name}")
        if channels != config.latent_channels:
            raise unsupported(f"the denoiser takes {channels} channels, the autoencoder gives {config.latent_channels}")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the denoiser takes."""
        return self.denoiser.config.in_channels

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of the latent posterior, for pixels (batch, 3, height, width) in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):  # XL's autoencoder overflows in float16
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return {"mean": posterior.mean.float(), "std": posterior.std.float()}

    def sample_latents(self, mean: Tensor, std: Tensor) -> Tensor:
        """Scaled latents from the posterior's moments."""
        latents = mean + std * torch.randn_like(mean)
        return (latents - (getattr(self.vae.config, "shift_factor", None) or 0.0)) * self.vae.config.scaling_factor

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to scaled latents."""
        return self.sample_latents(**self.moments(pixels))

    # prompts

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's text arguments, batch first. Gradients flow, so that learned words and encoders can be trained;
        prompts that `cache_prompts` has seen are read from memory."""
        if prompts and all(prompt in self.prompts for prompt in prompts):
            found = [self.prompts[prompt] for prompt in prompts]
            return {name: torch.cat([entry[name] for entry in found]).to(self.device) for name in found[0]}
        if not len(self.text_encoders):
            raise RuntimeError(f"the text encoders were released before this prompt was cached: {prompts}")
        return self._encode_prompt(prompts)

    def _encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def cache_prompts(self, prompts: Iterable[str], cache: TensorCache) -> None:
        """Encodes every prompt once; only for encoders that no longer change."""
        model = key_of("text", self.name, *(fingerprint(encoder) for encoder in self.text_encoders))
        for prompt in dict.fromkeys(prompts):
            self.prompts[prompt] = cache.get(key_of(model, prompt), partial(self._encode_prompt, [prompt]))

    def prompt_arguments(self, prompt: str) -> dict[str, str | Tensor]:
        """The prompt as the pipeline's call takes it: words, or the cached embeddings once the text encoders were released."""
        if len(self.text_encoders):
            return {"prompt": prompt}
        arguments = self._embedded(self.prompts[prompt], "")
        if self.takes_negative_prompt:
            zeros = getattr(self.pipe.config, "force_zeros_for_empty_prompt", False)  # XL's stand-in for the empty prompt
            empty = {name: value * (not zeros) for name, value in self.prompts[""].items()}
            arguments |= self._embedded(empty, "negative_")
        return arguments

    def _embedded(self, text: dict[str, Tensor], prefix: str) -> dict[str, str | Tensor]:
        return {f"{prefix}{EMBEDDINGS[name]}": value.to(self.device) for name, value in text.items()}

    def release_text_encoders(self) -> None:
        """Frees the memory of encoders whose prompts are all cached."""
        self.text_encoders = nn.ModuleList()
        for suffix in SUFFIXES:
            if getattr(self.pipe, f"text_encoder{suffix}", None) is not None:
                setattr(self.pipe, f"text_encoder{suffix}", None)

    # diffusion

    def draw_times(self, n: int) -> Tensor:
        """Random times, shape (n,), in the model's own units."""
        raise NotImplementedError

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents, and what the denoiser must predict from them."""
        raise NotImplementedError

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The latents that a prediction stands for."""
        raise NotImplementedError

    def snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights, shape of `t` (Hang et al., 2023, arXiv 2303.09556, eq. 8)."""
        raise UserError("--snr_gamma is defined for DDPM models (Stable Diffusion 1.x, 2.x, XL) only; leave it out here.")

    # adapters

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model as it came: LoRA of the denoiser and of the text encoders is switched off inside."""
        adapted = [m for m in (self.denoiser, *self.text_encoders) if getattr(m, "peft_config", None)]
        for module in adapted:
            module.disable_adapters()
        try:
            yield
        finally:
            for module in adapted:
                module.enable_adapters()


class DDPM(Backbone):
    """Discrete times, predicting the noise or the velocity."""

    def __init__(self, pipe, name=""):
        super().__init__(pipe, name)
        config = pipe.scheduler.config
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise unsupported(f"its scheduler is a {type(pipe.scheduler).__name__}, which knows no betas")
        if config.get("prediction_type", "epsilon") not in PREDICTIONS:
            raise unsupported(f"its prediction_type is '{config.prediction_type}', not one of {', '.join(PREDICTIONS)}")
        # the pipeline's sampler may add noise in its own way (Euler does) or know no velocity (PNDM)
        self.noise = DDPMScheduler.from_config(config)

    def draw_times(self, n):
        return torch.randint(self.noise.config.num_train_timesteps, (n,), device=self.device)

    @property
    def predicts_velocity(self) -> bool:
        return self.noise.config.prediction_type == "v_prediction"

    def add_noise(self, latents, noise, t):
        target = self.noise.get_velocity(latents, noise, t) if self.predicts_velocity else noise
        return self.noise.add_noise(latents, noise, t), target

    def denoise(self, noisy, t, condition):
        arguments = {"cross_attention_kwargs": condition.attention_arguments}
        return self.denoiser(noisy, t, **self._text_arguments(noisy, condition.text), **arguments).sample

    def _text_arguments(self, noisy: Tensor, text: dict[str, Tensor]) -> dict:
        return text

    def clean(self, noisy, t, prediction):
        alpha = self.noise.alphas_cumprod.to(noisy)[t].view(-1, 1, 1, 1)
        if self.predicts_velocity:
            return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()

    def snr_weights(self, t, gamma):
        snr = compute_snr(self.noise, t)
        return snr.clamp(max=gamma) / (snr + 1 if self.predicts_velocity else snr)


class SD(DDPM):
    """Stable Diffusion 1.x and 2.x."""

    def _encode_prompt(self, prompts):
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}


class SDXL(DDPM):
    def _encode_prompt(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def _text_arguments(self, noisy, text):
        height, width = (side * self.pipe.vae_scale_factor for side in noisy.shape[-2:])
        times = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device).expand(len(noisy), -1)
        added = {"text_embeds": text["text_embeds"], "time_ids": times}
        return {"encoder_hidden_states": text["encoder_hidden_states"], "added_cond_kwargs": added}


class Flow(Backbone):
    """Rectified flow: straight lines from data at 0 to noise at 1, predicting their velocity."""

    denoiser_name = "transformer"
    t_max = 1
    text_length = 256  # tokens given to T5

    def __init__(self, pipe, name=""):
        super().__init__(pipe, name)
        scheduler, config = pipe.scheduler, pipe.scheduler.config
        if hasattr(scheduler, "alphas_cumprod") or "shift" not in config or config.get("invert_sigmas"):
            raise unsupported(f"its scheduler is a {type(scheduler).__name__}, not one of flow from noise to data")
        self.text_length = min([self.text_length, *(tokenizer.model_max_length for tokenizer in self.tokenizers[-1:])])

    def draw_times(self, n):
        """Logit-normal (Esser et al., 2024, arXiv 2403.03206, section 3.1), under the scheduler's own shift."""
        t = torch.sigmoid(torch.randn(n, device=self.device))
        config = self.pipe.scheduler.config
        shift = 1.0 if config.get("use_dynamic_shifting") else config.shift
        return shift * t / (1 + (shift - 1) * t)

    def add_noise(self, latents, noise, t):
        return latents.lerp(noise, t.view(-1, 1, 1, 1)), noise - latents

    def clean(self, noisy, t, prediction):
        return noisy - t.view(-1, 1, 1, 1) * prediction


class SD3(Flow):
    def __init__(self, pipe, name=""):
        super().__init__(pipe if isinstance(pipe, WordsSD3Pipeline) else WordsSD3Pipeline(**pipe.components), name)

    def _encode_prompt(self, prompts):
        options = {"device": self.device, "do_classifier_free_guidance": False, "max_sequence_length": self.text_length}
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, **options)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def denoise(self, noisy, t, condition):
        arguments = {"joint_attention_kwargs": condition.attention_arguments}
        return self.denoiser(noisy, timestep=1000 * t, **condition.text, **arguments).sample


class Flux(Flow):
    guidance = 1.0  # what the guidance-distilled model is told while it trains
    takes_negative_prompt = False
    text_length = 512
    embedding_names = ("clip_l", "t5")

    @property
    def factor(self):
        return 2 * self.pipe.vae_scale_factor  # latents are packed two by two

    @property
    def latent_channels(self):
        return self.denoiser.config.in_channels // 4

    def _encode_prompt(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=self.device, max_sequence_length=self.text_length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def denoise(self, noisy, t, condition):
        b, c, h, w = noisy.shape
        guidance = torch.full_like(t, self.guidance) if self.denoiser.config.guidance_embeds else None
        ids = {
            "img_ids": self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, noisy.dtype),
            "txt_ids": torch.zeros(condition.text["encoder_hidden_states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        }
        arguments = {"joint_attention_kwargs": condition.attention_arguments, "guidance": guidance, **ids}
        packed = self.pipe._pack_latents(noisy, b, c, h, w)
        velocity = self.denoiser(packed, timestep=t, **condition.text, **arguments).sample
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, h * scale, w * scale, scale)


BACKBONES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
}


def wrap(pipe: DiffusionPipeline, name: str = "") -> Backbone:
    """The backbone for a pipeline that is already loaded."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in BACKBONES:
            return BACKBONES[kind.__name__](pipe, name)
    raise UserError(f"no backbone wraps a {type(pipe).__name__}; supported are {', '.join(BACKBONES)}.")
