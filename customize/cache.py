"""Tensors that need computing only once (latents, prompt embeddings), kept in memory and on disk."""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from customize.errors import UserError
from customize.files import atomic_file


class TensorCache:
    """Named tensors by key, in memory and in the .safetensors files of a folder if given; UserError if it
    cannot be made."""

    def __init__(self, folder: Path | None = None):
        self.folder = Path(folder) if folder else None
        self._memory: dict[str, dict[str, Tensor]] = {}
        try:
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The cache folder {self.folder} cannot be made ({error}); choose another."
            ) from error

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The CPU tensors of `key`, computed by `compute()` the first time. They are shared: never change
        them in place."""
        if key not in self._memory:
            self._memory[key] = self._read(key) or self._write(key, compute())
        return dict(self._memory[key])

    def _path(self, key: str) -> Path | None:
        return self.folder and self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        path = self._path(key)
        if path and path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    if file.metadata() != {
                        "sha256": _digest(tensors)
                    }:  # safetensors itself checks the layout only
                        raise ValueError("its values have changed")
                return tensors
            except (SafetensorError, OSError, ValueError) as error:
                warnings.warn(
                    f"The cache file {path} is broken ({error}); it is computed again.", stacklevel=3
                )
        return None

    def _write(self, key: str, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in computed.items()
        }
        if path := self._path(key):
            with atomic_file(path) as partial:
                partial.write_bytes(save(tensors, metadata={"sha256": _digest(tensors)}))
        return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def key_of(*parts) -> str:
    """A string key for JSON-like parts (text, numbers, lists, dicts, None); different parts give
    different keys."""
    return json.dumps(parts, sort_keys=True)


def fingerprint(module: nn.Module) -> str:
    """sha256 hex over class, config and, per tensor, name, shape, type, the sum of its bits as integers
    and 8 values."""
    config = getattr(module, "config", None) or {}
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    settings = {
        name: value for name, value in entries.items() if not name.startswith("_")
    }  # _name_or_path is a place
    digest = hashlib.sha256(
        json.dumps([type(module).__name__, settings], sort_keys=True, default=str).encode()
    )
    for name, tensor in module.state_dict().items():
        bits = tensor.detach().view(
            getattr(torch, f"int{8 * tensor.element_size()}")
        )  # adds up alike on any device
        digest.update(
            key_of(
                name, tensor.shape, str(tensor.dtype), bits.sum().item(), bits.flatten()[:8].tolist()
            ).encode()
        )
    return digest.hexdigest()
