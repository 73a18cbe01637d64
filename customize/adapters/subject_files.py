"""Files of subject encoders: ours, and the layout of released IP-Adapters."""

import json
from pathlib import Path
from typing import get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from customize import embedded
from customize.adapters import reference_unet, seecoder
from customize.adapters.attention import TextGate
from customize.adapters.encoders.image_encoder import ImageEncoder
from customize.adapters.encoders.ip_adapter import from_released
from customize.adapters.encoders.multimodal import MultimodalConfig, MultimodalEncoder
from customize.adapters.reference_unet import ReferenceUNet
from customize.adapters.seecoder import SeeCoderAdapter
from customize.adapters.subject import FILE, RELEASED, SubjectAdapter, from_header, layer_widths
from customize.backbones.text import text_parts
from customize.errors import UserError, first_line
from customize.files import header, names_of, tensors_of
from customize.tensor_checks import check_finite, misfit

SIGN = "qtransformer.init_query.weight"  # of a SeeCoder's tensors, among released files


def load_adapter(path: Path, pipe: DiffusionPipeline, image_encoder: ImageEncoder) -> SubjectAdapter:
    """The adapter of a file, installed in a pipeline's denoiser: ours, or a released IP-Adapter (safetensors,
    or a .bin file, which is read without unpickling code). UserError if it was made for another base model or
    image encoder, or is damaged."""
    state, about = read_file(path)
    if about is None:
        return load_released(state, pipe, path, image_encoder)
    config = _config(path, about)
    _, encoders = text_parts(pipe)
    dims = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders]
    fits = (
        layer_widths(pipe.unet) == about["layers"]
        and config.visual_dim == pipe.unet.config.cross_attention_dim
    )
    if not fits or (config.words and dims != config.text_dims):
        raise other_base(path)
    if (config.image_dim, config.image_layers) != (image_encoder.width, image_encoder.depth):
        raise other_image_encoder(path)
    with torch.device("meta"):  # a damaged file may ask for more than memory holds
        starts = [torch.zeros(dim) for dim in config.text_dims] if config.words else []
        adapter = SubjectAdapter(pipe.unet, MultimodalEncoder(config), starts, about["text_gate"])
    if reason := misfit(state, adapter.state_dict()):
        raise UserError(f"'{path}' is damaged ({reason}); use an earlier checkpoint.")
    check_finite(state, path)
    # copied, as tensors in a file's memory are not aligned, which changes sums in their last bit
    adapter.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)
    return adapter.install(pipe.unet).eval().requires_grad_(False)


# encoders that read images without a CLIP vision model
OWN_READERS: dict[str, type[ReferenceUNet] | type[SeeCoderAdapter]] = {
    "reference_unet": ReferenceUNet,
    "seecoder": SeeCoderAdapter,
}


def kind_of(path: Path) -> str:
    """Which kind of encoder a file holds: `subject` (also a released IP-Adapter), or one of `OWN_READERS`."""
    if path.suffix != ".safetensors":
        return "subject"
    about = header(path)
    found = next((kind for kind in OWN_READERS if kind in about), "")
    return found or ("seecoder" if seecoder.PREFIX + SIGN in names_of(path) else "subject")


def replaces_prompt(name: str) -> bool:
    """Whether `name`, a run or a file, is an encoder that takes the place of the prompt."""
    files = (path for path in (Path(name), Path(name, seecoder.FILE)) if path.is_file())
    return any(kind_of(file) == "seecoder" for file in files)


def _config(path: Path, about: dict) -> MultimodalConfig:
    """The configuration in a file's header; UserError if it is of another version or damaged."""
    config, gate = about.get("config"), about.get("text_gate")
    if (
        not isinstance(config, dict)
        or gate not in get_args(TextGate)
        or not isinstance(about.get("layers"), dict)
    ):
        raise UserError(f"'{path}' is damaged (its header has no configuration); use an earlier checkpoint.")
    try:
        made = MultimodalConfig(**from_header(config))
        made.check()
    except TypeError as error:
        raise UserError(
            f"'{path}' was written by another version ({error}): pip install -U customize."
        ) from error
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}); use an earlier checkpoint.") from error
    return made


def load_released(
    state: dict[str, Tensor], pipe: DiffusionPipeline, path: Path, image_encoder: ImageEncoder
) -> SubjectAdapter:
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
    if encoder.feature_dim != (
        image_encoder.width if encoder.plus else image_encoder.vision.config.projection_dim
    ):
        raise other_image_encoder(path)
    adapter = SubjectAdapter(pipe.unet, encoder)
    fits = encoder.visual_dim == pipe.unet.config.cross_attention_dim
    if not fits or misfit(parts["ip_adapter"], adapter.branches.state_dict()):
        raise other_base(path)
    check_finite(state, path, "download it again")
    adapter.branches.load_state_dict(parts["ip_adapter"])
    return adapter.install(pipe.unet).eval().requires_grad_(False)


def _of_another_kind(path: Path, reason: object) -> UserError:
    return UserError(
        f"'{path}' is damaged or of another kind ({' '.join(str(reason).split())}); download it again."
    )


def other_base(path: Path) -> UserError:
    return UserError(
        f"'{path}' was trained for another base model: its cross-attention layers differ; load that base "
        "model."
    )


def other_image_encoder(path: Path) -> UserError:
    return UserError(
        f"'{path}' reads another image encoder than this one: name the one it was trained with "
        "(image_encoder)."
    )


def read_file(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors, and what our header says, None if it is not ours."""
    if path.suffix != ".bin":
        state = tensors_of(path)
        return state, _about(path)
    try:
        nested = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"'{path}' cannot be read ({first_line(error)}); use the .safetensors file."
        ) from error
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


def adapter_file(name: str) -> Path:
    """The encoder's file: `name` itself, the one in that run folder, or that of the embedded `stickers`;
    UserError if there is none."""
    path = embedded.SUBJECT_ENCODER if embedded.is_embedded(name) else Path(name)
    for found in (path, *(path / name for name in (FILE, RELEASED, reference_unet.FILE, seecoder.FILE))):
        if found.is_file():
            return found
    raise UserError(
        f"there is no subject encoder at '{name}': give a run folder of custom_contrast, ip_adapter, "
        "reference_unet or seecoder, or a file."
    )
