"""The contract of an adapter: a kind of thing that is trained, saved into a run folder and loaded into a
pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline


class Adapter:
    """One file of `customize/adapters/` holds one kind; `ADAPTERS` lists them, in the order in which they are
    loaded."""

    files: ClassVar[tuple[str, ...]]  # names, or patterns, of what it writes into a run folder
    reads_images: ClassVar[bool] = False  # whether it is an encoder, which a subject pipeline loads

    @property
    def changes_text(self) -> bool:
        """Whether training it changes what the text encoders return, so that prompts cannot be cached."""
        return False

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes its files; returns what `run.json` must hold for `load`."""
        raise NotImplementedError

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Gives a pipeline what `folder` holds of this kind, if anything; `info` is `run.json`.

        UserError if it is damaged or does not fit the base model.
        """
