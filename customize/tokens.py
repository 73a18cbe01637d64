"""Learned words: vectors that stand in for placeholder words in every text encoder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn
from transformers import PreTrainedModel, T5EncoderModel

from customize.errors import UserError
from customize.tensor_checks import check_finite

SUFFIXES = ("", "_2", "_3")  # of a pipeline's tokenizers and text encoders
ENCODER_NAMES = ("clip_l", "clip_g", "t5")  # in files of learned words, in the order in which pipelines hold the encoders


def pieces(word: str, count: int) -> list[str]:
    """The tokens of a word with several vectors, named as diffusers names them: <dog>, <dog>_1, ..."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def add_words(tokenizer, words: list[str]) -> None:
    """Makes each of `words` one token; raises UserError if one is a token already."""
    for word in words:
        tokens = tokenizer.tokenize(word)
        if word in tokenizer.get_vocab() or (len(tokens) == 1 and tokens != [tokenizer.unk_token]):
            another = f"<my-{word.strip('<>')}>"
            raise UserError(
                f"--placeholder_token: '{word}' is in the tokenizer's vocabulary already; choose another, such as '{another}'."
            )
    tokenizer.add_tokens(words)


class ConceptTokens(nn.Module):
    """`words` maps each placeholder, such as "<dog>", to the word whose embedding it starts from.

    Each text encoder gets `num_vectors` trained vectors a word, shape (words * num_vectors, dim), float32. They replace rows
    on the fly, so the encoder's own embedding table stays as it was, bit for bit.
    """

    def __init__(self, backbone, words: dict[str, str], num_vectors: int = 1):
        super().__init__()
        self.words, self.num_vectors = list(words), num_vectors
        self.names = backbone.embedding_names[: len(backbone.text_encoders)]
        self.vectors = nn.ParameterList()
        tokens = [piece for word in self.words for piece in pieces(word, num_vectors)]
        for tokenizer, encoder in zip(backbone.tokenizers, backbone.text_encoders, strict=True):
            start = torch.tensor([_start(tokenizer, word) for word in words.values()]).repeat_interleave(num_vectors)
            add_words(tokenizer, tokens)
            table = _called_table(encoder)
            self.vectors.append(nn.Parameter(table.weight[start.to(table.weight.device)].detach().float().clone()))
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
            table.register_forward_pre_hook(_clamp)
            table.register_forward_hook(self._replace(len(self.vectors) - 1, ids))

    def _replace(self, index: int, ids: Tensor) -> Callable:
        def hook(table, args, embedded):
            found = table.asked.unsqueeze(-1) == ids.to(table.asked.device)  # (batch, length, words)
            learned = found.to(embedded.dtype) @ self.vectors[index].to(embedded.dtype)
            return torch.where(found.any(-1, keepdim=True), learned, embedded)

        return hook

    def by_word(self) -> dict[str, dict[str, Tensor]]:
        """For each word, the vectors (num_vectors, dim) by text encoder: `clip_l`, `clip_g`, `t5`."""
        split = [vectors.detach().split(self.num_vectors) for vectors in self.vectors]
        return {
            word: {name: parts[i] for name, parts in zip(self.names, split, strict=True)} for i, word in enumerate(self.words)
        }


def _called_table(encoder: PreTrainedModel) -> nn.Embedding:
    """The embedding layer that the encoder calls: T5 keeps a second one, with the same weights, outside its stack."""
    return (encoder.encoder if isinstance(encoder, T5EncoderModel) else encoder).get_input_embeddings()


def _clamp(table, args):
    """Ids of learned words lie beyond the table; look up any row for them, `_replace` puts the vector there."""
    table.asked = args[0]
    return (args[0].clamp(max=table.num_embeddings - 1),)


@contextmanager
def replaced_words(tokenizers: Sequence, encoders: Sequence, words: list[str], vectors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, row r of a batch of prompts reads `vectors[encoder][r, word]` wherever one of `words` stands.

    `vectors` holds (rows, words, dim) for each text encoder; gradients flow into them. The embedding tables stay as they are,
    and may be exchanged between two uses, as loading other learned words does.
    """
    with ExitStack() as stack:
        for tokenizer, encoder, own in zip(tokenizers, encoders, vectors, strict=True):
            stack.enter_context(_pooled_at_end(tokenizer, encoder))
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
            for handle in _replacing(_called_table(encoder), ids, own):
                stack.callback(handle.remove)
        yield


@contextmanager
def _pooled_at_end(tokenizer, encoder) -> Iterator[None]:
    """Encoders whose configuration calls the end of a text 2, as XL's do, pool at the highest token id instead, which a word
    beyond the table would be."""
    mistaken = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == 2]
    for module in mistaken:
        module.eos_token_id = tokenizer.eos_token_id
    try:
        yield
    finally:
        for module in mistaken:
            module.eos_token_id = 2


def _replacing(table: nn.Embedding, ids: Tensor, vectors: Tensor) -> tuple:
    asked: list[Tensor] = []

    def look_up(table, args):
        asked[:] = [args[0]]
        return (args[0].clamp(max=table.num_embeddings - 1),)

    def replace(table, args, embedded):
        found = asked[0].unsqueeze(-1) == ids.to(asked[0].device)  # (rows, length, words)
        own = found.to(embedded.dtype) @ vectors.to(embedded.dtype)
        return torch.where(found.any(-1, keepdim=True), own, embedded)

    # before the hooks of learned words, which clamp too
    return table.register_forward_pre_hook(look_up, prepend=True), table.register_forward_hook(replace)


def _start(tokenizer, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"--initializer_token: '{word}' is empty for the tokenizer; give a word such as the subject's class.")
    return ids[-1]


def text_parts(pipe: DiffusionPipeline) -> tuple[list, list]:
    """The tokenizers and text encoders of a pipeline, of those that it has."""
    parts = [(getattr(pipe, f"tokenizer{s}", None), getattr(pipe, f"text_encoder{s}", None)) for s in SUFFIXES]
    found = [(tokenizer, encoder) for tokenizer, encoder in parts if encoder is not None]
    return [tokenizer for tokenizer, _ in found], [encoder for _, encoder in found]


def load_words(pipe: DiffusionPipeline, word: str, vectors: dict[str, Tensor]) -> None:
    """Gives a pipeline a learned word; `vectors` as in `ConceptTokens.by_word`, or of the one text encoder under any name.

    UserError if they are of another base model or damaged, or if the pipeline knows the word already.
    """
    tokenizers, encoders = text_parts(pipe)
    if reason := _misfit(encoders, vectors):
        raise UserError(
            f"the learned word '{word}' does not fit this base model ({reason}); load the base model it was trained on."
        )
    check_finite(vectors, word)
    names = pieces(word, len(next(iter(vectors.values()))))
    if any(tokenizer.get_vocab().keys() & names for tokenizer in tokenizers):
        raise UserError(f"the pipeline knows the word '{word}' already; load the base model anew for this one.")
    ordered = [vectors[name] for name in _names(encoders)] if len(encoders) > 1 else vectors.values()
    for tokenizer, encoder, matrix in zip(tokenizers, encoders, ordered, strict=True):
        pipe.load_textual_inversion({word: matrix}, token=word, text_encoder=encoder, tokenizer=tokenizer)


def _names(encoders: list) -> list[str]:
    """The encoders' names in files of learned words."""
    return ["t5" if isinstance(encoder, T5EncoderModel) else ENCODER_NAMES[i] for i, encoder in enumerate(encoders)]


def _misfit(encoders: list, vectors: dict[str, Tensor]) -> str:
    """What is wrong with the vectors of a word, or nothing."""
    names = _names(encoders) if len(encoders) > 1 else list(vectors)[:1]
    if not vectors or set(names) != vectors.keys():
        return f"it is for {', '.join(map(repr, vectors)) or 'no text encoder'}, the model has {len(encoders)} text encoders"
    for encoder, name in zip(encoders, names, strict=True):
        shape, width = tuple(vectors[name].shape), _called_table(encoder).embedding_dim
        if len(shape) != 2 or not shape[0] or shape[1] != width:
            return f"'{name}' is {shape}, not (vectors, {width})"
        if not vectors[name].is_floating_point():
            return f"'{name}' is of {vectors[name].dtype}"
    return (
        "" if len({len(matrix) for matrix in vectors.values()}) == 1 else "its text encoders have different numbers of vectors"
    )


class WordsSD3Pipeline(TextualInversionLoaderMixin, StableDiffusion3Pipeline):
    """Stable Diffusion 3 whose prompts may hold learned words, which diffusers' own pipeline of it does not support."""

    def encode_prompt(self, prompt, prompt_2=None, prompt_3=None, **options):
        tokenizers = self.tokenizer, self.tokenizer_2, self.tokenizer_3
        names = "negative_prompt", "negative_prompt_2", "negative_prompt_3"
        negatives = [options.get(name) or options.get("negative_prompt") for name in names]

        def expand(texts):
            pairs = zip(texts, tokenizers, strict=True)
            return [self.maybe_convert_prompt(text, t) if text is not None and t is not None else text for text, t in pairs]

        options |= dict(zip(names, expand(negatives), strict=True))
        return super().encode_prompt(*expand([prompt, prompt_2 or prompt, prompt_3 or prompt]), **options)
