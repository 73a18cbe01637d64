"""Reading safetensors files."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from customize.errors import UserError


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is damaged ({error}); use an earlier checkpoint.") from error
