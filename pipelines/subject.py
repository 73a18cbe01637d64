"""Pipelines that take images of subjects: stock Stable Diffusion and SDXL, and in their call
`subject_images`.

    pipe = load_subject_pipeline("stickers")
    pipe("a <s> fox on the beach", subject_images=["a.png", "b.png"]).images[0]
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch import Tensor

from customize import embedded
from customize.adapters.attention import use_xformers
from customize.adapters.embedding_hooks import replaced_words
from customize.adapters.encoders.image_encoder import (
    ImageEncoder,
    ReferenceFit,
    image_encoder_of,
    load_image_encoder,
)
from customize.adapters.seecoder import GUIDANCE, text_of
from customize.adapters.subject_files import OWN_READERS, adapter_file, kind_of, load_adapter
from customize.backbones.text import clip_skip_works, text_parts
from customize.errors import UserError
from customize.pipelines.conditioning import SubjectCall, stack_references, with_words
from customize.pipelines.guidance import word_maps
from customize.pipelines.inputs import (
    Reference,
    Subjects,
    by_name,
    check_length,
    each_prompt,
    opened,
    refuse_subject_options,
    scales_of,
    side_by_side,
    single_images,
    texts_of,
    without_subjects,
)
from customize.prompts import MAX_REFERENCES, WORDS, check_shown, check_words
from customize.runs.checkpoint import open_run
from customize.runs.folder import INFO, read_info

TOKENIZERS = ("tokenizer", "tokenizer_2")


NEGATIVES = ("negative_prompt", "negative_prompt_2")


TEXTS = ("prompt", "prompt_2", *NEGATIVES)


SIDE_BY_SIDE = "side by side"


Task = Literal["text-to-image", "image-to-image", "inpainting", "controlnet"]


Stock: Any = object  # a stock pipeline: the mixin is only ever used beside one


class SubjectMixin(Stock):
    """Adds subjects to a stock pipeline of Stable Diffusion or SDXL; without an adapter, or without
    `subject_images`, it is the stock one."""

    reference_fit: ReferenceFit = "stretch"  # how references that are not square become square
    _adapter: Any = None
    _subjects: SubjectCall | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The signature of every class's call holds the stock call's arguments, and those of subjects."""
        super().__init_subclass__(**kwargs)
        stock = cls._stock_class()
        own = inspect.signature(SubjectMixin.__call__).parameters.values()
        more = [p for p in own if p.name.startswith("subject_") or p.name == "attention_maps"]
        *first, last = inspect.signature(stock.__call__).parameters.values()
        rest = [last] if last.kind is inspect.Parameter.VAR_KEYWORD else []
        listed = [*first, *([] if rest else [last]), *more, *rest]

        @wraps(SubjectMixin.__call__)
        def call(self: Any, *args: Any, **options: Any) -> Any:
            return SubjectMixin.__call__(self, *args, **options)

        call.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
        cls.__call__ = call  # type: ignore[method-assign]

    @classmethod
    def _stock_class(cls) -> Any:
        """The stock pipeline that the mixin stands beside."""
        return next(kind for kind in cls.__mro__ if not issubclass(kind, SubjectMixin))

    @property
    def adapter(self) -> Any:
        """The SubjectAdapter that is loaded, or None: the pipeline's own, or else the one that another
        pipeline of the same denoiser has loaded, as after `from_pipe`."""
        return getattr(self.unet, "subject_adapter", None) if self._adapter is None else self._adapter

    @adapter.setter
    def adapter(self, adapter: Any) -> None:
        self._adapter = adapter
        # past nn.Module: the denoiser's state dict stays stock
        object.__setattr__(self.unet, "subject_adapter", adapter)

    def load_subject_adapter(
        self,
        name: str | Path,
        image_encoder: str | ImageEncoder = "",
        reference_fit: ReferenceFit | Literal[""] = "",
    ) -> None:
        """Loads a subject encoder: a run folder, a file of ours or of a released IP-Adapter, or
        `stickers`.

        `image_encoder` (folder, hub id, OWNER/NAME/FOLDER or an ImageEncoder) is read from the run, or
        else must be given. `reference_fit` says how references that are not square become square:
        "stretch", "pad" (with white) or "crop" (to the centre, as stock IP-Adapters do); empty: as in the
        run. Raises UserError if there is no encoder, it was made for another base model, or the pipeline is
        offloaded already.
        """
        if any(hasattr(part, "_hf_hook") for part in self.components.values()):
            raise UserError(
                "load the subject encoder before offloading: its image encoder must be offloaded with the "
                "others."
            )
        if getattr(self.unet, "encoder_hid_proj", None) is not None:
            raise UserError("an IP-Adapter is loaded: call unload_ip_adapter before load_subject_adapter.")
        if reference_fit and reference_fit not in get_args(ReferenceFit):
            raise UserError(
                f"reference_fit: there is no '{reference_fit}'; choose {', '.join(get_args(ReferenceFit))}."
            )
        file = adapter_file(str(name))
        if (file.parent / INFO).exists():
            open_run(file.parent)  # says so if its files are not as they were written
        if (kind := kind_of(file)) in OWN_READERS:
            if image_encoder:
                raise UserError(f"image_encoder: '{file}' reads images without one; leave it out.")
            self.adapter = OWN_READERS[kind].read(file, self).to(self.unet.dtype)
        else:
            if not isinstance(image_encoder, ImageEncoder):
                image_encoder = self._find_image_encoder(file, image_encoder)
            self.adapter = load_adapter(file, self, image_encoder).to(self.unet.dtype)
            vision = image_encoder.vision.to(self.unet.device, self.unet.dtype)
            self.register_modules(image_encoder=vision, feature_extractor=image_encoder.processor)
        of_run = read_info(file.parent)["config"] if (file.parent / INFO).exists() else {}
        self.reference_fit = reference_fit or of_run.get("reference_fit", "stretch")

    def _find_image_encoder(self, file: Path, name: str) -> ImageEncoder:
        if not name and (file.parent / INFO).exists():
            info = read_info(file.parent)
            own = info["base_model"] if embedded.is_embedded(info["base_model"]) else ""
            name = info["config"].get("image_encoder") or own
        if not name and file == embedded.SUBJECT_ENCODER:
            name = embedded.NAME
        if name:
            return load_image_encoder(name, self.unet.dtype)
        if (image_encoder := image_encoder_of(self)) is None:
            raise UserError(f"image_encoder: name the CLIP vision model that '{file}' was trained with.")
        return image_encoder

    def unload_subject_adapter(self) -> None:
        """Removes the subject encoder: the pipeline is the stock one again."""
        self.adapter = None
        self.unet.set_attn_processor(AttnProcessor2_0())

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_ip_adapter("load_ip_adapter")
        super().load_ip_adapter(*args, **kwargs)

    def unload_ip_adapter(self) -> None:
        self._refuse_ip_adapter("unload_ip_adapter")
        super().unload_ip_adapter()

    def _refuse_ip_adapter(self, what: str) -> None:
        if self.adapter is not None:
            raise UserError(
                f"{what}: a subject encoder is loaded, which also reads IP-Adapters; call "
                "unload_subject_adapter first."
            )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves the pipeline as the stock one, which stock diffusers reads, with the subject encoder's file
        beside it, which `load_subject_pipeline(folder)` reads. UserError while a LoRA is loaded, as its
        layers have other names than the base model's."""
        if any(getattr(part, "peft_config", None) for part in self.components.values()):
            raise UserError(
                "save_pretrained: a LoRA is loaded; call fuse_lora and unload_lora_weights first, or keep "
                "the run folder instead."
            )
        stock = self._stock_class()
        _, names = stock._get_signature_keys(stock)
        settings = {name: self.config[name] for name in names if name in self.config}
        stock(**self.components, **settings).save_pretrained(save_directory, *args, **kwargs)
        if self.adapter is not None:
            self.adapter.save(Path(save_directory))

    def encode_references(self, images: Reference | Sequence[Reference]) -> Tensor:
        """Images of one subject to features (references, tokens, features), which `subject_images`
        takes instead of them.

        UserError for none, more than four, or something that is not an image."""
        if self.adapter is None:
            raise UserError(
                "references need a subject encoder to read them: call load_subject_adapter first."
            )
        listed: Any = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        images = [opened(image) for image in listed]
        if not 1 <= len(images) <= MAX_REFERENCES:
            raise UserError(f"a subject takes 1 to {MAX_REFERENCES} reference images, not {len(images)}.")
        self._place_adapter()
        return self.adapter.features(self, images)

    def _place_adapter(self) -> None:
        """Moves the adapter to the denoiser's device and precision; while it is trained, only to the
        device."""
        frozen = not any(parameter.requires_grad for parameter in self.adapter.parameters())
        self.adapter.to(self._execution_device, self.unet.dtype if frozen else None)

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        subject_images: Any = None,
        subject_scale: float | Mapping[str, float] = 1.0,
        subject_masks: Image.Image | Mapping[str, Image.Image] | Literal["side by side"] | None = None,
        subject_cache: bool = True,
        attention_maps: Sequence[str] = (),
        **kwargs: Any,
    ):
        """The stock pipeline's call, and of subjects (with an encoder that takes the place of the prompt,
        such as SeeCoder, one image, or a list of lists of one for several images, and no prompt):

        `subject_images`: one image or a list of up to four (PIL or path) of the subject that the prompt
        calls `<s>`; a dictionary of these by word (`<s>`, `<s2>`, `<s3>`, `<s4>`) for several subjects;
        or a list of lists or dictionaries, one for each prompt, with None for a prompt without a subject.
        `subject_scale`, at least 0, weights the visual branch: one number, numbers by subject
        (`{"<s>": 0.5}`), or by the beginning of layers' names ("down", "mid", "up", "up_blocks.1").
        `subject_masks`: white where a subject may be, by word; or "side by side", from left to right in
        the order of their words. `subject_cache` keeps keys and values between steps.
        `attention_maps`: words of every prompt whose attention maps the result holds, as its
        `attention_maps`: for each word, a gray image for each image. UserError for references that do not fit
        the prompt, and for words that it does not say.
        """
        if subject_images is not None and self.adapter is not None and self.adapter.replaces_prompt:
            refuse_subject_options(subject_scale, subject_masks, attention_maps)
            return self._from_images(subject_images, by_name(super().__call__, args, kwargs))
        if attention_maps:
            return self._with_maps(
                attention_maps,
                *args,
                subject_images=subject_images,
                subject_scale=subject_scale,
                subject_masks=subject_masks,
                subject_cache=subject_cache,
                **kwargs,
            )
        kwargs = by_name(super().__call__, args, kwargs)
        self._refuse_ip_arguments(kwargs)
        if subject_images is None:
            self._refuse_words(kwargs, TEXTS)
            return super().__call__(**kwargs)
        if self.adapter is None:
            raise UserError("subject_images needs a subject encoder: call load_subject_adapter first.")
        prompts = texts_of(kwargs.get("prompt"))
        if not prompts:
            raise UserError("subject_images needs `prompt`: S+ cannot be put into prompt_embeds.")
        self._refuse_words(kwargs, NEGATIVES)
        subjects = [self._encoded(entry) for entry in each_prompt(subject_images, len(prompts))]
        if not any(subjects):
            raise UserError("subject_images is empty: give 1 to 4 images of the subject.")
        self._check_prompts(prompts, subjects, kwargs)
        if not self.adapter.has_words:
            kwargs |= {name: without_subjects(kwargs[name]) for name in TEXTS if kwargs.get(name)}
        if not self.adapter.is_installed(self.unet):  # but those of another pipeline with the same denoiser
            self.adapter.install(self.unet)
        strengths, scales = scales_of(subject_scale, self.adapter.layer_names)
        features, references = stack_references(subjects)
        call = SubjectCall(
            self.adapter,
            features,
            references,
            features.new_tensor(strengths[: features.shape[1]]),
            scales,
            subject_cache,
            kwargs.get("num_images_per_prompt") or 1,
        )
        call.make_regions = self._region_maker(subject_masks, call.present, kwargs)
        with self._drawing(call):
            return super().__call__(**kwargs)

    def _from_images(self, images: Any, kwargs: dict) -> Any:
        """The stock call with the contexts of images instead of texts; without an image, zeros."""
        self._refuse_ip_arguments(kwargs)
        if texts := [name for name in TEXTS if any(texts_of(kwargs.get(name)) or ())]:
            raise UserError(f"{texts[0]}: the image takes the place of the prompt; leave it out.")
        context = self._as_adapter(torch.cat([self.encode_references(one) for one in single_images(images)]))
        named = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
        given = {named[name]: value for name, value in text_of(context, self.unet).items()}
        given |= {f"negative_{name}": torch.zeros_like(value) for name, value in given.items()}
        kwargs = {name: value for name, value in kwargs.items() if name not in TEXTS}
        return super().__call__(**({"guidance_scale": GUIDANCE} | kwargs | given))

    def _refuse_ip_arguments(self, kwargs: dict) -> None:
        for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
            if self.adapter is not None and kwargs.get(name) is not None:
                raise UserError(f"{name}: a subject encoder is loaded; give images as subject_images.")

    def _check_prompts(self, prompts: Sequence[str], subjects: Sequence[Subjects], kwargs: dict) -> None:
        """UserError unless each prompt, with the subjects' words, says its subjects and is not too long."""
        for prompt, found in zip(prompts, subjects, strict=True):
            check_words(prompt, found, self.adapter.has_words)
            if self.adapter.has_words:
                check_length(prompt, found, with_words(self.tokenizer))
        if self.adapter.has_words:
            for text in texts_of(kwargs.get("prompt_2")) or ():
                check_shown(text, [word for found in subjects for word in found])

    def _with_maps(self, words: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The call, and the attention maps of words in its result."""
        prompt = kwargs.get("prompt", args[0] if args else None)
        prompts = texts_of(prompt)
        if not prompts or isinstance(words, str) or kwargs.get("return_dict") is False:
            raise UserError(
                "attention_maps is a list of words of `prompt`, and comes with the result as an object: give "
                "both, and leave return_dict out."
            )
        with word_maps(self, prompts, words) as maps:
            result = self(*args, **kwargs)
        result["attention_maps"] = maps
        return result

    def _encoded(self, entry: Any) -> Subjects:
        if entry is None:
            return {}
        entry = entry if isinstance(entry, Mapping) else {WORDS[0]: entry}
        if not entry:
            raise UserError("subject_images is empty: give 1 to 4 images of the subject.")
        found = {
            word: own if isinstance(own, Tensor) else self.encode_references(own)
            for word, own in entry.items()
        }
        width = self.adapter.encoder.feature_dim
        for own in found.values():
            if own.ndim != 3 or own.shape[-1] != width or not 1 <= len(own) <= MAX_REFERENCES:
                made = f"what encode_references makes, (1 to {MAX_REFERENCES}, tokens, {width})"
                raise UserError(f"subject_images: a tensor {tuple(own.shape)} is not {made}.")
        return {word: self._as_adapter(own) for word, own in found.items()}

    def _as_adapter(self, features: Tensor) -> Tensor:
        """Features on the adapter's device, in its precision."""
        self._place_adapter()
        some = next(self.adapter.parameters())
        return features.to(some.device, some.dtype)

    def _refuse_words(self, kwargs: dict, names: Sequence[str]) -> None:
        """UserError if one of these texts of the call holds a subject's word that has no subject."""
        if self.adapter is not None and self.adapter.has_words:
            for name in names:
                why = (
                    "what to avoid has no subject"
                    if name in NEGATIVES
                    else "there are no subject_images of it"
                )
                for text in texts_of(kwargs.get(name)) or ():
                    check_shown(text, why=why)

    def _region_maker(self, masks: Any, present: Tensor, kwargs: dict) -> Callable[[int, int], Tensor] | None:
        """A function from a latent height and width to the regions (prompts, subjects, height, width):
        masks by word, the same for every prompt, or columns for those that are `present` (prompts,
        subjects)."""
        if masks is None:
            return None
        if kwargs.get("padding_mask_crop") is not None:
            raise UserError(
                "subject_masks cover the whole image, padding_mask_crop draws a part of it: leave one out."
            )
        if isinstance(masks, str) and masks == SIDE_BY_SIDE:
            return lambda height, width: side_by_side(present, height, width).to(self.unet.dtype)
        masks = masks if isinstance(masks, Mapping) else {WORDS[0]: masks}
        if unknown := [word for word in masks if word not in WORDS]:
            raise UserError(
                f"subject_masks: '{unknown[0]}' is no subject's word; those are {', '.join(WORDS)}."
            )
        grays = {WORDS.index(word): opened(mask, "mask").convert("L") for word, mask in masks.items()}

        def make(height: int, width: int) -> Tensor:
            regions = torch.ones(len(WORDS), height, width)
            for column, gray in grays.items():
                small = gray.resize((width, height), Image.Resampling.BOX)
                regions[column] = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
            regions = regions.to(self._execution_device, self.unet.dtype)
            return regions[: present.shape[1]].expand(len(present), -1, -1, -1)

        return make

    @contextmanager
    def _drawing(self, call: SubjectCall):
        stock = {
            name: tokenizer for name in TOKENIZERS if (tokenizer := getattr(self, name, None)) is not None
        }
        stock = stock if self.adapter.has_words else {}
        if self.adapter.encoder.has_blank:
            side = self.image_encoder.config.image_size
            image_encoder: Any = image_encoder_of(self, self.reference_fit)
            nothing = torch.zeros(1, 3, side, side, device=self._execution_device, dtype=self.unet.dtype)
            call.blank = self._as_adapter(self.adapter.encoder.blank(image_encoder, nothing).unsqueeze(0))
        handle = self.unet.register_forward_pre_hook(self._inject, with_kwargs=True)
        try:
            self._subjects = call
            for name, tokenizer in stock.items():
                setattr(self, name, with_words(tokenizer))
            yield
        finally:
            handle.remove()
            self._subjects = None
            for name, tokenizer in stock.items():
                setattr(self, name, tokenizer)

    def _inject(self, unet, inputs, named):
        """Before every step: gives the attention processors the subjects of its time."""
        call, encoder = self._subjects, self.adapter.encoder
        sample, t = (
            inputs[i] if len(inputs) > i else named[name] for i, name in enumerate(("sample", "timestep"))
        )
        bins = int(
            encoder.bin_of(
                torch.as_tensor(t).flatten()[:1].float() / self.scheduler.config.num_train_timesteps
            )
        )
        guided = len(sample) > len(call.features) * call.images
        if call.regions is None and call.make_regions is not None:
            call.regions = call.make_regions(*sample.shape[-2:])
        named = dict(named)
        given = named.get("cross_attention_kwargs") or {}
        named["cross_attention_kwargs"] = {**given, "ip_hidden_states": call.injected(bins, guided)}
        added = named.get("added_cond_kwargs") or {}
        if (
            "text_embeds" in added
            and (own := call.pooled_text(bins, added["text_embeds"], len(sample))) is not None
        ):
            named["added_cond_kwargs"] = {**added, "text_embeds": own}
        return inputs, named

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method's results. With subjects, S+ is put into the prompts, and the text of every
        time bin and block is kept."""
        with clip_skip_works(self.text_encoder):
            return self._encode_prompt_of_call(self._subjects, args, kwargs)

    def _encode_prompt_of_call(self, call: SubjectCall | None, args: tuple, kwargs: dict) -> Any:
        if call is None or not self.adapter.has_words:
            return super().encode_prompt(*args, **kwargs)
        bound = inspect.signature(super().encode_prompt).bind(*args, **kwargs).arguments
        prompts = [bound["prompt"]] if isinstance(bound["prompt"], str) else list(bound["prompt"])
        tokenizers, encoders = text_parts(self)
        words = list(WORDS[: call.present.shape[1]])
        for bins in range(self.adapter.encoder.config.time_bins):
            vectors = self.adapter.word_vectors(call.encoded(bins), call.present.float())
            texts = self.adapter.texts(
                lambda some: self._encode_text(some, bound), tokenizers, encoders, prompts, vectors
            )
            call.block_texts[bins] = texts["encoder_hidden_states"]
            middle = [own[self.adapter.text_blocks // 2] for own in vectors]
            if (
                "text_embeds" in texts
            ):  # encoded anew: among other slots its last bits would not be those of the stock call
                with replaced_words(tokenizers, encoders, words, middle):
                    call.pooled[bins] = self._encode_text(prompts, bound)["text_embeds"]
        # of what follows only the unconditional half counts: steps are given the texts of their time
        with replaced_words(tokenizers, encoders, words, middle):
            return super().encode_prompt(*args, **kwargs)

    def _encode_text(self, prompts: list[str], bound: dict) -> dict[str, Tensor]:
        """The denoiser's text states of prompts under the options of the call; for SDXL also the pooled
        ones."""
        options = {name: bound[name] for name in ("clip_skip", "lora_scale") if name in bound}
        if bound.get("prompt_2"):
            second = [bound["prompt_2"]] if isinstance(bound["prompt_2"], str) else bound["prompt_2"]
            options["prompt_2"] = second * (len(prompts) // len(second))
        states, _, *pooled = super().encode_prompt(
            prompts,
            device=bound.get("device"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **options,
        )
        return {"encoder_hidden_states": states} | ({"text_embeds": pooled[0]} if pooled else {})

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """Ignored with a warning while an adapter is loaded: diffusers would replace its processors and
        thereby remove the subject."""
        if self.adapter is None:
            super().enable_attention_slicing(slice_size)
        else:
            warnings.warn(
                "attention slicing is left off: it would remove the subject encoder, and SDPA needs none.",
                stacklevel=2,
            )

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        if self.adapter is None:
            super().enable_xformers_memory_efficient_attention(attention_op)
        else:
            use_xformers(self.unet)


class SubjectSDPipeline(SubjectMixin, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x with subjects."""


class SubjectSDXLPipeline(SubjectMixin, StableDiffusionXLPipeline):
    """Stable Diffusion XL with subjects."""


def _beside(stock: type[DiffusionPipeline]) -> type:
    """The class that adds subjects to a stock pipeline class, `Subject` before its name."""
    about = {"__doc__": f"{stock.__name__} with subjects.", "__module__": __name__}
    return type(f"Subject{stock.__name__}", (SubjectMixin, stock), about)


# the stock classes of each task, and with subjects: of Stable Diffusion and of SDXL
TASKS: dict[str, dict[type, type]] = {
    "text-to-image": {
        StableDiffusionPipeline: SubjectSDPipeline,
        StableDiffusionXLPipeline: SubjectSDXLPipeline,
    }
}


TASKS |= {
    task: {stock: _beside(stock) for stock in stocks}
    for task, stocks in {
        "image-to-image": (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline),
        "inpainting": (StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline),
        "controlnet": (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline),
    }.items()
}
