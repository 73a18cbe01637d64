"""Base models in one file, as model sites offer them: weights under the names of their authors.

Such a file says neither how its model is built nor what its scheduler and tokenizers are, and often it holds
the denoiser alone. The rest comes from a diffusers folder of the same kind of model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.loaders import single_file, single_file_utils
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from customize.errors import UserError, first_line, shortened
from customize.tensor_checks import is_finite

FLAG = "--single_file_config"
PICKLE = "is a pickle, which can run code when it is read"
REFUSED = {".ckpt": PICKLE, ".pt": PICKLE, ".gguf": "holds quantised weights that cannot be trained on"}
SD, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
# The pipelines of a file, by the name that diffusers has for its layout; the first is the usual one.
KINDS = {
    "v1": (SD,),
    "v2": (SD,),
    "xl_base": ("StableDiffusionXLPipeline",),
    "sd3": (SD3,),
    "sd35_medium": (SD3,),
    "sd35_large": (SD3,),
    "flux-dev": (FLUX, "FluxKontextPipeline"),
    "flux-schnell": (FLUX, "FluxKontextPipeline"),
    "flux-2-dev": ("Flux2Pipeline", "Flux2KleinPipeline"),
    "chroma": ("ChromaPipeline",),
    "z-image-turbo": ("ZImagePipeline",),
    "lumina2": ("Lumina2Pipeline",),
    "sana": ("SanaPipeline",),
    "krea2": ("Krea2Pipeline",),
}
USUAL = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS
DENOISERS = ("unet", "transformer")
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]  # files of a hub repository that hold no weights


@dataclass
class SingleFile:
    """The tensors of a base model's file, and the diffusers folder that says how the model is built."""

    path: Path
    tensors: dict[str, Tensor]
    layout: str  # as diffusers calls it; empty: unknown
    folder: Path
    hub_id: str = ""  # where the folder was downloaded from
    revision: str | None = None

    @classmethod
    def read(cls, name: str | Path, config: str = "", revision: str | None = None) -> "SingleFile":
        """The file `name`, built as `config` (a folder or a hub id) says, or as the model that diffusers
        names for the file's layout.

        UserError for a file that is missing, damaged or of an unknown or unsupported kind, and for a
        configuration that cannot be had or is of another kind.
        """
        path = Path(name)
        tensors = read_tensors(path)
        layout = layout_of(tensors)
        if layout and layout not in KINDS:
            raise UserError(f"base model '{path}' is a {layout}; supported are {', '.join(KINDS)}.")
        if not (layout or config):
            raise UserError(
                f"base model '{path}': its kind cannot be told from its {len(tensors)} tensors "
                f"({shortened(next(iter(tensors), 'none'), 60)}, ...); name a diffusers folder or hub id of "
                f"the same kind with {FLAG}, unless it is a LoRA or a part of a model."
            )
        source = config or USUAL[layout]["pretrained_model_name_or_path"]
        if Path(source).is_dir():
            return cls(path, tensors, layout, Path(source))
        file = cls(path, tensors, layout, Path(), source, revision)
        file.folder = file._downloaded(SETTINGS)
        return file

    def _downloaded(self, patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(self.hub_id, revision=self.revision, allow_patterns=patterns))
        except Exception as error:  # the hub's client raises all kinds
            raise UserError(
                f"base model '{self.path}' is built as '{self.hub_id}' says, which could not be had "
                f"({shortened(first_line(error), 120)}); check your connection, or give a diffusers folder "
                f"of the same kind with {FLAG}."
            ) from error

    def check_kind(self, kind: str) -> None:
        """UserError if the configuration, of a pipeline of this kind, is for another sort of file."""
        kinds = KINDS.get(self.layout, (kind,))
        if kind not in kinds:
            raise UserError(
                f"base model '{self.path}' is for a {kinds[0]}, and '{self.hub_id or self.folder}' is the "
                f"configuration of a {kind}; name one of the same kind with {FLAG}."
            )

    def holds(self, part: str, kind: type) -> bool:
        """Whether the file holds this component; it always holds the denoiser."""
        if part in DENOISERS:
            return True
        if part == "vae":
            return issubclass(kind, AutoencoderKL) and any(map(is_of_vae, self.tensors))
        return single_file_utils.is_clip_model_in_single_file(kind, self.tensors) or (
            kind.__name__ == "T5EncoderModel" and single_file_utils.is_t5_in_single_file(self.tensors)
        )

    def complete(self, kinds: Mapping[str, type]) -> None:
        """Sees to it that the folder has the weights of what the file lacks. UserError if it cannot."""
        lacking = [part for part, kind in kinds.items() if not self.holds(part, kind)]
        if lacking and self.hub_id:
            self.folder = self._downloaded([*SETTINGS, *(f"{part}/*.safetensors" for part in lacking)])
        for part in lacking:
            if not any((self.folder / part).glob("*.safetensors")):
                raise UserError(
                    f"base model '{self.path}' lacks its {part}, and '{self.folder / part}' has no weights "
                    f"of it; give a diffusers folder that has them with {FLAG}."
                )

    def component(self, part: str, kind: Any, dtype: torch.dtype) -> nn.Module:
        """A component from the file. ValueError unless all its weights are there, fit and are finite."""
        tensors = self._of_denoiser(part, kind) if part in DENOISERS else dict(self.tensors)
        library = kind.__module__.split(".")[0]
        where = {"cached_model_config_path": str(self.folder), "local_files_only": True}
        names = library, kind.__name__, part, tensors, diffusers.pipelines, False
        try:
            model = single_file.load_single_file_sub_model(*names, torch_dtype=dtype, **where)
        except NotImplementedError as error:  # of torch: tensors that got no values cannot be moved
            raise ValueError(f"it lacks weights of its {part}") from error
        for name, value in model.state_dict().items():
            if value.is_meta:
                raise ValueError(f"it lacks weights of its {part}: {name}")
            if not is_finite(value):
                raise ValueError(f"its {part} holds values that are not finite: {name}")
        return model.eval()

    def _of_denoiser(self, part: str, kind: Any) -> dict[str, Tensor]:
        """The denoiser's tensors where the file has them under diffusers' own names, maybe behind a prefix;
        else all of the file, for diffusers to convert."""
        with torch.device("meta"):
            names = kind.from_config(kind.load_config(self.folder / part)).state_dict().keys()
        for prefix in PREFIXES:
            if all(prefix + name in self.tensors for name in names):
                return {name: self.tensors[prefix + name] for name in names}
        return dict(self.tensors)

    def scheduler_settings(self) -> dict[str, Any]:
        """What an SDXL file says of its schedule by empty tensors: that the denoiser predicts v, and that no
        signal is left at the last time."""
        found: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in self.tensors else {}
        if "ztsnr" in self.tensors:
            found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """UserError if there is no such file, or it is none that can be trained on."""
    if not path.is_file():
        raise UserError(f"there is no file '{path}'; check the base model's path.")
    if why := REFUSED.get(path.suffix.lower()):
        raise UserError(f"base model '{path}' {why}; give it as .safetensors.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"base model '{path}' is damaged ({first_line(error)}); download it again."
        ) from error
    if any(name.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) for name in tensors):
        raise UserError(
            f"base model '{path}' has scaled fp8 weights; give the file with bf16 or fp16 weights."
        )
    return tensors


def layout_of(tensors: dict[str, Tensor]) -> str:
    """What diffusers calls the layout of a file; empty if it knows none."""
    layout = single_file_utils.infer_diffusers_model_type(tensors)
    known = layout != "v1" or single_file_utils.CHECKPOINT_KEY_NAMES["v1"] in tensors  # v1 is its last guess
    return layout if known else ""


def is_of_vae(name: str) -> bool:
    """Whether a tensor of a whole model's file belongs to the autoencoder."""
    return name.startswith(("first_stage_model.", "vae."))
