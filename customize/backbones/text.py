"""The tokenizers and text encoders of a pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn
from transformers import PreTrainedModel, T5EncoderModel

SUFFIXES = ("", "_2", "_3", "_4")  # of a pipeline's tokenizers and text encoders
COMPONENTS = ("unet", "transformer", *(f"text_encoder{suffix}" for suffix in SUFFIXES))  # that may be trained


ENCODER_NAMES = (
    "clip_l",
    "clip_g",
    "t5",
    "llama3",
)  # in files of learned words, in the order in which pipelines hold the encoders


def embedding_table(encoder: PreTrainedModel) -> nn.Embedding:
    """The embedding layer that the encoder uses. T5 keeps a second one with the same weights outside its
    stack."""
    return (encoder.encoder if isinstance(encoder, T5EncoderModel) else encoder).get_input_embeddings()


def _tokenizer(part: Any) -> Any:
    """The tokenizer of a processor of images and text, which Flux.2 dev has, or `part` itself."""
    return getattr(part, "tokenizer", part) if hasattr(part, "image_processor") else part


def text_parts(pipe: DiffusionPipeline) -> tuple[list, list]:
    """The tokenizers and text encoders that a pipeline has."""
    parts = [
        (_tokenizer(getattr(pipe, f"tokenizer{s}", None)), getattr(pipe, f"text_encoder{s}", None))
        for s in SUFFIXES
    ]
    found = [(tokenizer, encoder) for tokenizer, encoder in parts if encoder is not None]
    return [tokenizer for tokenizer, _ in found], [encoder for _, encoder in found]


def expanded(prompt: Any, tokenizer: Any) -> Any:
    """A prompt or several with all tokens of each learned word of several vectors, named as diffusers names
    them: <dog> becomes <dog> <dog>_1."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)


def expand_words(pipe: Any) -> None:
    """Makes a pipeline put all vectors of learned words into its prompts, if its class does not do so."""
    if isinstance(pipe, TextualInversionLoaderMixin) or hasattr(pipe.encode_prompt, "expands"):
        return
    stock = pipe.encode_prompt
    parameters = signature(stock)

    @wraps(stock)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        tokenizers, _ = text_parts(pipe)  # all know the same words; none once the encoders were freed
        for name, text in given.arguments.items() if tokenizers else ():
            if name.removeprefix("negative_").rstrip("_234") == "prompt" and text is not None:
                given.arguments[name] = expanded(text, tokenizers[0])
        return stock(*given.args, **given.kwargs)

    encode_prompt.expands = True  # type: ignore[attr-defined]
    pipe.encode_prompt = encode_prompt


@contextmanager
def clip_skip_works(encoder: Any) -> Iterator[None]:
    """Context in which diffusers finds text_model.final_layer_norm, which it reads for clip_skip and
    which transformers 5.6 moved. Outside of it the attribute must be missing, as diffusers' LoRA loader
    checks for it."""
    moved = hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model")
    if moved:  # past nn.Module, so that no weight has two names
        object.__setattr__(encoder, "text_model", encoder)
    try:
        yield
    finally:
        if moved:
            object.__delattr__(encoder, "text_model")


def lost_words(pipe: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that none of a pipeline's text encoders reads; empty if one reads all of it."""
    lost = []
    for tokenizer in text_parts(pipe)[0]:
        ids = tokenizer(expanded(prompt, tokenizer)).input_ids
        most = min(tokenizer.model_max_length, 512)
        lost.append(tokenizer.decode(ids[most - 1 : -1]).strip() if len(ids) > most else "")
    return min(lost, key=len, default="")
