"""A base model behind six verbs: methods and losses never ask which model it is.

`encode_image`, `encode_prompt`, `draw_times`, `add_noise`, `denoise`, `clean`. Each wraps the diffusers
pipeline of the model and calls the pipeline's own encoding code, so that training and inference cannot
drift apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from customize.backbones.layers import PRESETS, without_lora
from customize.backbones.quantize import quantize
from customize.backbones.text import ENCODER_NAMES, SUFFIXES, expand_words, expanded, text_parts
from customize.cache import TensorCache, fingerprint, key_of
from customize.errors import UserError, shortened


@dataclass
class Condition:
    """What the denoiser is conditioned on: its text arguments and the inputs of its attention processors."""

    text: dict[str, Tensor]
    # of a subject encoder; `ip_hidden_states` is the one name that diffusers lets through
    injected: Any = None
    # (batch, count, channels, height, width): latents of images that the model is shown
    references: Tensor | None = None
    # (batch, 4): original height and width, top and left of the crop in pixels; for SDXL
    sizes: Tensor | None = None

    @property
    def attention_arguments(self) -> dict | None:
        return None if self.injected is None else {"ip_hidden_states": self.injected}

    @property
    def shown(self) -> list[Tensor]:
        """The latents (batch, channels, height, width) of each image that the model is shown."""
        return [] if self.references is None else [*self.references.unbind(1)]


@dataclass
class Step:
    """One noising and one prediction: everything a loss may need. Latents are (batch, channels, height,
    width)."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    target: Tensor
    condition: Condition
    prediction: Tensor
    batch: dict = field(repr=False)


TimestepSampling = Literal["uniform", "cubic", "logit_normal", "shifted"]


def unsupported(why: str) -> UserError:
    """The error for a setting that would change the training objective and that no backbone supports."""
    return UserError(
        f"this base model cannot be trained here: {why}; give another base model or mend its configuration."
    )


def joined(entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The text arguments of several prompts, batch first, as those of one batch. Prompts of different
    length are padded at the end with zeros, their masks too."""
    found = {}
    for name in entries[0]:
        values = [entry[name] for entry in entries]
        if values[0].ndim > 1 and len({value.shape[1] for value in values}) > 1:
            values = [*pad_sequence([value.squeeze(0) for value in values], batch_first=True).split(1)]
        found[name] = torch.cat(values)
    return found


class Backbone(nn.Module):
    """The frozen components of a diffusers pipeline as one module.

    A family of base models is a subclass that declares what is peculiar to it, and one line of
    `BACKBONES`.
    """

    denoiser_name = "unet"  # the pipeline's name for it
    embedding_names: tuple[str, ...] = ENCODER_NAMES  # of the text encoders, in files of learned words
    call_arguments: ClassVar[
        dict[str, str]
    ]  # the denoiser's text arguments, as the pipeline's call names them
    needs_chat_template = False  # of its tokenizer
    takes_negative_prompt = True
    empty_prompt = ""  # of an image that is drawn under guidance without a negative prompt
    takes_references = 0  # images at most that the model is shown beside the prompt
    needs_references = False  # whether it draws nothing without one
    reference_resolution = 512  # side in pixels at which an untrained model is shown them
    guidance_name = "guidance_scale"  # of classifier-free guidance, in the pipeline's call
    text_length = 0  # tokens of a prompt given to T5 or a language model, of models that have one
    packing = 0  # sides of the patches that latents are packed into; 0: as the denoiser's patch_size says
    samples_posterior = True  # latents are drawn from the autoencoder's posterior, or its mean is taken
    lora_presets = PRESETS  # ends of the names of layers, by what --lora_layers calls them
    kohya_prefixes: ClassVar[
        dict[str, str]
    ] = {}  # of the components in kohya's LoRA files; none: it has no such layout
    timestep_sampling: TimestepSampling = "uniform"  # as the family's official training script draws times
    timestep_shift = 0.0  # of the times of flow models; 0: the scheduler's
    is_empty = False  # whether it has no weights, for a dry run
    resolution = 0  # side of the images that this run trains on and draws, in pixels
    place: Tensor  # empty; moves as the backbone does

    def __init__(self, pipe: DiffusionPipeline, name: str = ""):
        super().__init__()
        self.pipe, self.name = pipe, name
        self.vae = pipe.vae
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.tokenizers, encoders = text_parts(pipe)
        self.text_encoders = nn.ModuleList(encoders)
        expand_words(pipe)
        self.prompts: dict[str, dict[str, Tensor]] = {}  # text embeddings of prompts that were cached
        device = next(self.denoiser.parameters()).device
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)
        self.negative: dict[str, Tensor] = {}  # and of no prompt, as `_encode_negative` gives them
        self._as_loaded = ""  # the denoiser's fingerprint
        self._quantized_encoders: list[str] = []  # what tells the text encoders apart, once quantised
        self._check_latents()
        self._check_chat_template()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Keeps the components in evaluation mode, as they were pretrained (T5 has dropout); only the
        dropout of LoRA follows."""
        super().train(False)
        for name, module in self.named_modules():
            if name.endswith(("lora_dropout", "lora_dropout.default")):
                module.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """The device that it works on; the denoiser may still have to come there."""
        return self.place.device

    @contextmanager
    def denoiser_left_out(self) -> Iterator[None]:
        """Context in which moving the backbone leaves the denoiser where it is, so that a card need not hold
        it and the text encoders together."""
        denoiser, self._modules["denoiser"] = self._modules["denoiser"], None
        try:
            yield
        finally:
            self._modules["denoiser"] = denoiser

    def components(self) -> dict[str, nn.Module]:
        """The denoiser and the text encoders, by the pipeline's names for them."""
        encoders = {
            f"text_encoder{s}": encoder for s, encoder in zip(SUFFIXES, self.text_encoders, strict=False)
        }
        return {self.denoiser_name: self.denoiser, **encoders}

    @property
    def clip_encoders(self) -> list[nn.Module]:
        """The CLIP text encoders that may be trained: the stock pipeline loads their LoRA."""
        loadable = self.pipe._lora_loadable_modules
        return [m for name, m in self.components().items() if name in loadable and "CLIP" in type(m).__name__]

    def enable_gradient_checkpointing(self, checkpoint: Callable | None = None) -> None:
        """Makes the denoiser recompute activations in the backward pass instead of keeping them, by
        `checkpoint(function, *args)` if it is given."""
        self.denoiser.enable_gradient_checkpointing(*([checkpoint] if checkpoint else []))

    @property
    def unused_layers(self) -> set[str]:
        """Layers of the denoiser whose output is thrown away: LoRA of them would get no gradient."""
        return set()

    @property
    def is_distilled(self) -> bool:
        """Whether the model draws in few steps without guidance, as far as it says so."""
        return bool(getattr(self.pipe.config, "is_distilled", False)) or "turbo" in self.name.lower()

    @property
    def takes_guidance(self) -> bool:
        """Whether the denoiser is given a guidance scale."""
        return False

    def configure(
        self,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 0,
        timestep_sampling: str = "auto",
        timestep_shift: float = 0.0,
    ) -> None:
        """Settings of some families; UserError for those that this model does not have."""
        if guidance_scale != 1.0 and not self.takes_guidance:
            raise UserError(
                "--guidance_scale is for guidance-distilled models (Flux.1 dev); leave it out here."
            )
        if max_sequence_length and not self.text_length:
            raise UserError(
                "--max_sequence_length is for models with T5 or a language model; leave it out here."
            )
        if timestep_sampling != "auto":
            self.timestep_sampling = timestep_sampling  # type: ignore[assignment]
        self.timestep_shift = timestep_shift
        self.guidance_scale = guidance_scale
        self.text_length = max_sequence_length or self.text_length

    def fingerprint(self) -> str:
        """sha256 hex of the denoiser's configuration and weights as they were loaded: first called before
        adapters are added."""
        self._as_loaded = self._as_loaded or fingerprint(self.denoiser)
        return self._as_loaded

    def quantize(self, denoiser: str, text_encoders: str, device: torch.device) -> None:
        """Holds the weights of the blocks of the denoiser and of the text encoders in int8, fp8 or nf4, on
        the device; `none` leaves them. Before adapters are added. UserError if there are no such layers."""
        if denoiser == text_encoders == "none":
            return
        self.fingerprint()
        if denoiser != "none" and not quantize(self.denoiser, denoiser, device):
            raise UserError(f"--quantize {denoiser}: this model has no layers for it; leave it out.")
        self.denoiser.cpu()  # until the text encoders have gone
        if text_encoders == "none":
            return
        self._quantized_encoders = [f"{fingerprint(own)} {text_encoders}" for own in self.text_encoders]
        counts = [quantize(encoder, text_encoders, device) for encoder in self.text_encoders]
        if not all(counts):
            raise UserError(
                f"--quantize_text_encoder {text_encoders}: a text encoder of this model has no layers for "
                "it; leave it out."
            )

    @property
    def shifts_by_size(self) -> bool:
        """Whether times are drawn under a shift that depends on `resolution`."""
        return False

    @property
    def zeroes_empty_prompt(self) -> bool:
        """Whether the pipeline's unconditional half gets zeros instead of the text of the empty prompt, as
        SDXL's does."""
        return bool(getattr(self.pipe.config, "force_zeros_for_empty_prompt", False))

    @property
    def factor(self) -> int:
        """Sides of an image must be multiples of this many pixels."""
        packing = self.packing or getattr(self.denoiser.config, "patch_size", 1)
        return self.pipe.vae_scale_factor * packing

    @property
    def reference_factor(self) -> int:
        """Sides of a reference must be multiples of this many pixels."""
        return self.factor

    @property
    def native_resolution(self) -> int:
        """The side, in pixels, of the images that the model was trained on."""
        latents = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.get("sample_size")
        return latents * self.pipe.vae_scale_factor if latents else 1024

    # images

    def _check_latents(self) -> None:
        """UserError for settings of the autoencoder that would change the training objective and are not
        supported."""
        config, channels = self.vae.config, self.latent_channels
        if not config.scaling_factor > 0:
            raise unsupported(f"the autoencoder's scaling_factor is {config.scaling_factor}")
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise unsupported(f"the autoencoder sets {name}")
        if channels != config.latent_channels:
            raise unsupported(
                f"the denoiser takes {channels} channels, the autoencoder gives {config.latent_channels}"
            )

    def latent_shape(self, side: int) -> tuple[int, int, int, int]:
        """Batch of 1, channels, height and width of the latents of a square image of `side` pixels."""
        cells = side // self.pipe.vae_scale_factor
        return 1, self.latent_channels, cells, cells

    def _check_chat_template(self) -> None:
        parts = self.pipe.tokenizer, *self.tokenizers
        if self.needs_chat_template and not any(getattr(part, "chat_template", None) for part in parts):
            raise UserError(
                f"base model '{self.name}': its tokenizer has no chat template, which puts the prompt into "
                "the form that the model knows; download the folder 'tokenizer' again."
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the denoiser takes."""
        return self.denoiser.config.in_channels

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of the latent posterior, for pixels (batch, 3, height, width) in
        [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):  # XL's autoencoder overflows in float16
            mean, std = self._posterior(pixels.to(self.vae.dtype))
        return {"mean": mean.float(), "std": std.float() * self.samples_posterior}

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, at the height and width of the denoiser's latents."""
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def sample_latents(self, mean: Tensor, std: Tensor) -> Tensor:
        """Normalised latents from the posterior's moments."""
        return self._normalised(mean + std * torch.randn_like(mean))

    def _normalised(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the denoiser knows them."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.vae.config.scaling_factor

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to scaled latents."""
        return self.sample_latents(**self.moments(pixels))

    def encode_references(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, height, width) in [-1, 1] of images that the model is shown, to normalised latents:
        the mean of the posterior."""
        return self._normalised(self.moments(pixels)["mean"])

    # prompts

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's text arguments, batch first. Gradients flow, so that learned words and encoders
        can be trained; prompts that `cache_prompts` has seen are read from memory."""
        if prompts and all(prompt in self.prompts for prompt in prompts):
            found = joined([self.prompts[prompt] for prompt in prompts])
            return {name: value.to(self.device) for name, value in found.items()}
        if not len(self.text_encoders):
            raise RuntimeError(f"the text encoders were released before this prompt was cached: {prompts}")
        return self._encode_prompt(list(prompts))  # a copy: some pipelines write into it

    def encode_prompt_with_references(self, prompts: list[str], pixels: Tensor) -> dict[str, Tensor]:
        """The same for prompts whose images the model is shown: pixels (batch, count, 3, height, width) in
        [-1, 1]. Most models encode the prompts alone."""
        return self.encode_prompt(prompts)

    def _encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _encode_negative(self) -> dict[str, Tensor]:
        """The text arguments of an image that is drawn without a negative prompt, under guidance."""
        return self._encode_prompt([self.empty_prompt])

    def encode_unconditional(self) -> dict[str, Tensor]:
        """The text arguments, for a batch of 1, of the pipeline's unconditional half under guidance: zeros on
        SDXL. Those of the empty prompt where the model is drawn without guidance."""
        text, kept = self.negative or self._encode_negative(), not self.zeroes_empty_prompt
        return {name: (value * kept).to(self.device) for name, value in text.items()}

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """As `encode_prompt`, but a dropped caption, "", gets what `encode_unconditional` gives."""
        if "" not in captions:
            return self.encode_prompt(captions)
        kept = [caption for caption in captions if caption]
        text = self.encode_prompt(kept) if kept else {}
        rows = iter({name: value[i : i + 1] for name, value in text.items()} for i in range(len(kept)))
        nothing = self.encode_unconditional()
        return joined([next(rows) if caption else nothing for caption in captions])

    def text_lengths(self) -> list[int]:
        """How many tokens of a prompt each text encoder reads."""
        return [tokenizer.model_max_length for tokenizer in self.tokenizers]

    def check_length(self, name: str, prompt: str) -> None:
        """UserError for a prompt that every text encoder would cut; `name` is what the message calls the
        prompt."""
        lengths = [len(tokenizer(expanded(prompt, tokenizer)).input_ids) for tokenizer in self.tokenizers]
        limits = self.text_lengths()
        if all(length > limit for length, limit in zip(lengths, limits, strict=True)):
            most = limits.index(max(limits))
            raise UserError(
                f"the {name} has {lengths[most]} tokens, more than {limits[most]}: shorten "
                f"'{shortened(prompt)}'."
            )

    @torch.no_grad()
    def cache_prompts(self, prompts: Iterable[str], cache: TensorCache) -> None:
        """Encodes every prompt once; only for encoders that no longer change."""
        recipe = type(self).__name__, str(self.text_length)
        encoders = self._quantized_encoders or map(fingerprint, self.text_encoders)
        model = key_of("text", self.name, *recipe, *encoders)
        for prompt in dict.fromkeys(prompts):
            self.prompts[prompt] = cache.get(key_of(model, prompt), partial(self._encode_prompt, [prompt]))
        own = type(self)._encode_negative is not Backbone._encode_negative
        key = key_of(model, *["negative"] * own, self.empty_prompt)
        self.negative = cache.get(key, self._encode_negative)

    @torch.no_grad()
    def keep_prompts(self, prompts: Iterable[str]) -> None:
        """As `cache_prompts`, without a cache: the encoders of a dry run have no weights to know them by."""
        self.prompts |= {prompt: self._encode_prompt([prompt]) for prompt in dict.fromkeys(prompts)}
        self.negative = self._encode_negative()

    def prompt_arguments(self, prompt: str) -> dict[str, str | Tensor]:
        """The prompt as arguments of the pipeline's call: the text, or cached embeddings once the text
        encoders were released."""
        if len(self.text_encoders):
            return {"prompt": prompt}
        arguments = self._embedded(self.prompts[prompt], "")
        if self.takes_negative_prompt:
            arguments |= self._embedded(self.encode_unconditional(), "negative_")
        return arguments

    def _embedded(self, text: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        return {f"{prefix}{self.call_arguments[name]}": value.to(self.device) for name, value in text.items()}

    @classmethod
    def call_options(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """More arguments of the pipeline's call, without which it would not draw what `arguments` ask for."""
        return {}

    @classmethod
    def prepare_call(cls, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Settings of the pipeline itself, without which it would not draw what `arguments` ask for."""

    def release_text_encoders(self) -> None:
        """Frees the memory of encoders whose prompts are all cached."""
        self.text_encoders = nn.ModuleList()
        for suffix in SUFFIXES:
            if getattr(self.pipe, f"text_encoder{suffix}", None) is not None:
                setattr(self.pipe, f"text_encoder{suffix}", None)

    # diffusion

    def draw_times(self, n: int) -> Tensor:
        """Random times (n,) in [0, 1], by `timestep_sampling`: 0 is data, 1 is noise.

        `uniform`; `cubic`, mostly noisy (IDAdapter, arXiv 2402.18078); `logit_normal` (Esser et al., 2024,
        arXiv 2403.03206, section 3.1). Flow models shift them, and `shifted` is uniform under the shift
        that the pipeline draws with, which may depend on the image's size.
        """
        u = torch.rand(n, device=self.device)
        if self.timestep_sampling == "cubic":
            return 1 - u**3
        return torch.special.ndtri(u).sigmoid() if self.timestep_sampling == "logit_normal" else u

    def nearest_times(self, t: Tensor) -> Tensor:
        """Times in [0, 1], rounded to the times that the model was trained at."""
        return t

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents and the target that the denoiser must predict."""
        raise NotImplementedError

    def denoise(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction implies."""
        raise NotImplementedError

    def snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights, shape of `t` (Hang et al., 2023, arXiv 2303.09556, eq. 8)."""
        raise UserError(
            "--snr_gamma is defined for DDPM models (Stable Diffusion 1.x, 2.x, XL) only; leave it out here."
        )

    # adapters

    @contextmanager
    def without_assistant(self) -> Iterator[None]:
        """Context in which the LoRA that only helps training is left out, as drawing is without it."""
        with without_lora(self.denoiser, assistant=True):
            yield

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Context in which LoRA of the denoiser and of the text encoders is switched off."""
        with ExitStack() as stack:
            for module in (self.denoiser, *self.text_encoders):
                stack.enter_context(without_lora(module))
            yield
