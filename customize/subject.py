"""The subject adapter: an encoder of reference pictures and the attention branches that its tokens enter by.

Saved as one file: `subject.safetensors` with the configuration in its header, or, for encoders of IP-Adapter's kind, the
released IP-Adapter layout, which stock diffusers reads.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.attention import Injected, TextGate, install, make_branches, stacks, text_layers
from customize.encoders.encoded import Encoded
from customize.encoders.image_prompt import HEAD, ImagePrompt, Projection, from_released
from customize.encoders.multimodal import MultimodalConfig, MultimodalEncoder
from customize.encoders.perceiver import Resampler
from customize.encoders.tower import ImageTower
from customize.errors import UserError, nearest, shortened
from customize.files import header, tensors_of
from customize.run_folder import ADAPTER_FILES
from customize.tensor_checks import check_finite, misfit
from customize.tokens import add_words, replaced_words, text_parts

WORDS = ("<s>", "<s2>", "<s3>", "<s4>")  # of the subjects of one prompt, in their order
MAX_REFERENCES = 4  # pictures of one subject
FILE, RELEASED = ADAPTER_FILES
Encode = Callable[[list[str]], dict[str, Tensor]]


class SubjectAdapter(nn.Module):
    """`encoder` is a `MultimodalEncoder` or an `ImagePrompt`; a branch is made for each text layer of `denoiser`.

    `starts` are the embeddings (dim,) that S+ starts from, one for each text encoder, if the encoder gives words.
    """

    def __init__(self, denoiser, encoder: Any, starts: Sequence[Tensor] = (), text_gate: TextGate = "none"):
        super().__init__()
        self.encoder, self.text_gate = encoder, text_gate
        self.starts = nn.ParameterList(start.detach().float().clone() for start in starts)
        self.branches = make_branches(denoiser, visual_dim(encoder), encoder.place_dim)
        self.layers = layer_widths(denoiser)

    def install(self, denoiser) -> "SubjectAdapter":
        """Gives the denoiser's attention layers our processors, with this adapter's branches."""
        install(denoiser, self.branches, self.text_gate)
        return self

    @property
    def has_words(self) -> bool:
        return len(self.starts) > 0

    @property
    def slots(self) -> int:
        return self.encoder.config.slots

    def word_vectors(self, encoded: Encoded, weight: Tensor) -> list[Tensor]:
        """S+ for each text encoder, (slots, rows, subjects, dim); a subject of weight 0 is its start."""
        rows, subjects = weight.shape
        here = (weight != 0).view(rows, subjects, 1, 1)
        offsets = [words.unflatten(0, (rows, subjects)) * here for words in encoded.words]
        return [(start + own).permute(2, 0, 1, 3) for start, own in zip(self.starts, offsets, strict=True)]

    def texts(
        self, encode: Encode, tokenizers: Sequence, text_encoders: Sequence, prompts: list[str], vectors: list[Tensor]
    ) -> dict[str, Tensor]:
        """The denoiser's text arguments with S+ of each slot in the prompts, (slots, rows, ...): one batch for all slots."""
        subjects = vectors[0].shape[2]
        with replaced_words(tokenizers, text_encoders, list(WORDS[:subjects]), [v.flatten(0, 1) for v in vectors]):
            found = encode(prompts * self.slots)
        return {name: value.unflatten(0, (self.slots, len(prompts))) for name, value in found.items()}

    def injected(self, encoded: Encoded, weight: Tensor, contexts: Tensor | None = None, **more) -> Injected:
        """`encoded` has rows * subjects rows; `weight` is (rows, subjects)."""

        mask, place = (None if x is None else x.unflatten(0, tuple(weight.shape)) for x in (encoded.mask, encoded.place))
        return Injected(encoded.visual.unflatten(0, tuple(weight.shape)), weight, mask, contexts, place, **more)


def layer_widths(denoiser) -> dict[str, list]:
    """Name and width of each text layer, by its released number: adapters of one base model share them."""
    return {number: [name, denoiser.get_submodule(name).inner_dim] for number, name in text_layers(denoiser).items()}


def visual_dim(encoder: Any) -> int:
    return encoder.visual_dim if isinstance(encoder, ImagePrompt) else encoder.config.visual_dim


def add_subject_words(tokenizers: Sequence) -> None:
    """Makes each of `WORDS` one token, where it is none yet."""
    for tokenizer in tokenizers:
        known = tokenizer.get_vocab()
        add_words(tokenizer, [word for word in WORDS if word not in known])


def multimodal(pipe: DiffusionPipeline, tower: ImageTower, start: str, text_gate: TextGate = "none", **sizes) -> SubjectAdapter:
    """CustomContrast's adapter for a pipeline and an image tower, untrained; `sizes` are fields of `MultimodalConfig`.

    `start` is the word that S+ starts from; its tokenizers learn the subjects' words, for training. UserError if `start` is
    empty for a tokenizer.
    """
    tokenizers, encoders = text_parts(pipe)
    tables = [encoder.get_input_embeddings().weight for encoder in encoders]
    config = MultimodalConfig(
        image_dim=tower.width,
        image_layers=tower.depth,
        visual_dim=pipe.unet.config.cross_attention_dim,
        text_dims=[table.shape[1] for table in tables],
        slots=len(stacks(pipe.unet)),
        **sizes,
    )
    starts = []
    if config.words:
        for tokenizer, table in zip(tokenizers, tables, strict=True):
            ids = tokenizer(start, add_special_tokens=False).input_ids
            if not ids:
                raise UserError(f"--initializer_token: '{start}' is empty for the tokenizer; give a word such as photo.")
            starts.append(table[ids[-1]])
        add_subject_words(tokenizers)
    return SubjectAdapter(pipe.unet, MultimodalEncoder(config), starts, text_gate).install(pipe.unet)


def image_prompt(pipe: DiffusionPipeline, tower: ImageTower, plus: bool = True, **sizes) -> SubjectAdapter:
    """IP-Adapter's adapter, untrained; `sizes` (dim, depth, heads, queries) are those of the Plus resampler."""
    output = pipe.unet.config.cross_attention_dim
    embed = tower.vision.config.projection_dim
    made = Resampler(tower.width, output=output, head_dim=HEAD, **sizes) if plus else Projection(embed, output)
    return SubjectAdapter(pipe.unet, ImagePrompt(made)).install(pipe.unet)


def save_adapter(adapter: SubjectAdapter, folder: Path, half: bool = False) -> Path:
    """Writes the adapter's one file into `folder`; in float16 if `half`."""
    dtype = torch.float16 if half else torch.float32
    if isinstance(adapter.encoder, ImagePrompt):
        state = {f"image_proj.{k}": v for k, v in adapter.encoder.image_proj.state_dict().items()}
        state |= {f"ip_adapter.{k}": v for k, v in adapter.branches.state_dict().items()}
        path, header = folder / RELEASED, {"format": "pt"}
    else:
        state = adapter.state_dict()
        about = {"config": asdict(adapter.encoder.config), "text_gate": adapter.text_gate, "layers": adapter.layers}
        path, header = folder / FILE, {"format": "pt", "subject": json.dumps(about)}
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}, path, header)
    return path


def load_adapter(path: Path, pipe: DiffusionPipeline, tower: ImageTower) -> SubjectAdapter:
    """The adapter of a file, installed in a pipeline's denoiser: ours, or a released IP-Adapter (safetensors, or a .bin file,
    which is read without unpickling code). UserError if it was made for another base model or image tower, or is damaged."""
    state, about = read_file(path)
    if about is None:
        return load_released(state, pipe, path, tower)
    config = _config(path, about)
    _, encoders = text_parts(pipe)
    dims = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
    fits = layer_widths(pipe.unet) == about["layers"] and config.visual_dim == pipe.unet.config.cross_attention_dim
    if not fits or (config.words and dims != config.text_dims):
        raise other_base(path)
    if (config.image_dim, config.image_layers) != (tower.width, tower.depth):
        raise other_tower(path)
    with torch.device("meta"):  # a damaged file may ask for more than memory holds
        starts = [torch.zeros(dim) for dim in config.text_dims] if config.words else []
        adapter = SubjectAdapter(pipe.unet, MultimodalEncoder(config), starts, about["text_gate"])
    if reason := misfit(state, adapter.state_dict()):
        raise UserError(f"'{path}' is damaged ({reason}); use an earlier checkpoint.")
    check_finite(state, path)
    # copied, as tensors in a file's memory are not aligned, which changes sums in their last bit
    adapter.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)
    return adapter.install(pipe.unet).eval().requires_grad_(False)


def _config(path: Path, about: dict) -> MultimodalConfig:
    """The configuration in a file's header; UserError if it is of another version or damaged."""
    config, gate = about.get("config"), about.get("text_gate")
    if not isinstance(config, dict) or gate not in get_args(TextGate) or not isinstance(about.get("layers"), dict):
        raise UserError(f"'{path}' is damaged (its header has no configuration); use an earlier checkpoint.")
    try:
        made = MultimodalConfig(**config)
        made.check()
    except TypeError as error:
        raise UserError(f"'{path}' was written by another version ({error}): pip install -U customize.") from error
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}); use an earlier checkpoint.") from error
    return made


def load_released(state: dict[str, Tensor], pipe: DiffusionPipeline, path: Path, tower: ImageTower) -> SubjectAdapter:
    """A released IP-Adapter: `image_proj.*` and `ip_adapter.*`."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"'{path}' is no subject encoder and no IP-Adapter: it has a tensor '{name}'.")
        if not value.is_floating_point():
            raise _of_another_kind(path, f"'{name}' is of {value.dtype}")
        parts[part][rest] = value.float().clone()
    try:
        encoder = from_released(parts["image_proj"])
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise _of_another_kind(path, error) from error
    if encoder.feature_dim != (tower.width if encoder.plus else tower.vision.config.projection_dim):
        raise other_tower(path)
    adapter = SubjectAdapter(pipe.unet, encoder)
    fits = encoder.visual_dim == pipe.unet.config.cross_attention_dim
    if not fits or misfit(parts["ip_adapter"], adapter.branches.state_dict()):
        raise other_base(path)
    check_finite(state, path, "download it again")
    adapter.branches.load_state_dict(parts["ip_adapter"])
    return adapter.install(pipe.unet).eval().requires_grad_(False)


def _of_another_kind(path: Path, reason: object) -> UserError:
    return UserError(f"'{path}' is damaged or of another kind ({' '.join(str(reason).split())}); download it again.")


def other_base(path: Path) -> UserError:
    return UserError(f"'{path}' was trained for another base model: its cross-attention layers differ; load that base model.")


def other_tower(path: Path) -> UserError:
    return UserError(f"'{path}' reads another image tower than this one: name the one it was trained with (image_encoder).")


def read_file(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors, and what our header says, None if it is not ours."""
    if path.suffix != ".bin":
        state = tensors_of(path)
        return state, _about(path)
    try:
        nested = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"'{path}' cannot be read ({str(error).splitlines()[0]}); use the .safetensors file.") from error
    if not isinstance(nested, dict) or not all(isinstance(state, dict) for state in nested.values()):
        raise UserError(f"'{path}' is no IP-Adapter: it must hold image_proj and ip_adapter.")
    flat = {f"{part}.{name}": value for part, state in nested.items() for name, value in state.items()}
    if not all(isinstance(value, Tensor) for value in flat.values()):
        raise UserError(f"'{path}' is no IP-Adapter: it holds more than tensors.")
    return flat, None


def _about(path: Path) -> dict | None:
    text = header(path).get("subject")
    if text is None:
        return None
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged (its header: {error}); use an earlier checkpoint.") from error
    if not isinstance(about, dict):
        raise UserError(f"'{path}' is damaged (its header holds no object); use an earlier checkpoint.")
    return about


def without_words(prompt: str) -> str:
    """The prompt for an adapter that gives no words."""
    for word in WORDS:
        prompt = prompt.replace(f"{word} ", "").replace(word, "")
    return prompt


def check_words(prompt: str, subjects: Collection[str], has_words: bool) -> None:
    """UserError unless the prompt says the word of every subject, and has a subject for every word."""
    for word in subjects:
        if word not in WORDS:
            raise UserError(
                f"subject_images: '{word}' is no subject's word; those are {', '.join(WORDS)}.{nearest(word, WORDS)}"
            )
        if has_words and word not in prompt:
            raise UserError(
                f"the prompt '{shortened(prompt)}' does not say {word}: write it before the noun, as in 'a {word} dog'."
            )
    if has_words:
        check_shown(prompt, subjects)


def check_shown(prompt: str, subjects: Collection[str] = (), why: str = "there are no subject_images of it") -> None:
    """UserError if the prompt says the word of a subject that is not among `subjects`."""
    for word in WORDS:
        if word in prompt and word not in subjects:
            raise UserError(f"the prompt '{shortened(prompt)}' says {word}, but {why}.")


def adapter_file(name: str) -> Path:
    """The encoder's file: `name` itself, or the one in that run folder; UserError if there is none."""
    path = Path(name)
    for found in (path, *(path / name for name in ADAPTER_FILES)):
        if found.is_file():
            return found
    raise UserError(f"there is no subject encoder at '{name}': give a run folder of custom_contrast or ip_adapter, or a file.")
