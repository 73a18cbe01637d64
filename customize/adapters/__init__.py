"""Kinds of adapters: things that are trained and saved. A new kind is one file and one line of
`ADAPTERS`."""

from pathlib import Path

from customize.adapters.base import Adapter
from customize.adapters.components import Components
from customize.adapters.directions import Directions
from customize.adapters.domain import DomainEncoder
from customize.adapters.dual_path import DualPath
from customize.adapters.kohya import KohyaLora
from customize.adapters.lora import Lora
from customize.adapters.output_words import OutputWords
from customize.adapters.reference_unet import ReferenceUNet
from customize.adapters.seecoder import SeeCoderAdapter
from customize.adapters.subject import SubjectAdapter
from customize.adapters.words import LearnedWords

ADAPTERS: dict[str, type[Adapter]] = {  # in the order in which they are loaded
    "components": Components,
    "lora": Lora,
    "kohya": KohyaLora,
    "words": LearnedWords,
    "outputs": OutputWords,
    "dual_path": DualPath,
    "domain": DomainEncoder,
    "directions": Directions,
    "subject": SubjectAdapter,
    "reference_unet": ReferenceUNet,
    "seecoder": SeeCoderAdapter,
}


def is_adapter_file(name: str | Path) -> bool:
    """Whether a file or folder of a run has a name under which an adapter is saved."""
    return any(Path(name).match(pattern) for kind in ADAPTERS.values() for pattern in kind.files)


def holds(folder: str | Path, kind: str) -> bool:
    """Whether a run folder holds an adapter of this kind."""
    return any(True for pattern in ADAPTERS[kind].files for _ in Path(folder).glob(pattern))


def holds_encoder(folder: str | Path) -> bool:
    """Whether a run folder holds an encoder of images, of any kind."""
    return any(adapter.reads_images and holds(folder, kind) for kind, adapter in ADAPTERS.items())
