"""The methods by name. Nothing heavy is imported here: `customize methods` must answer at once."""

import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from customize.errors import UserError, first_line, nearest, shortened
from customize.other_tools import METHODS as RENAMED

GROUP = "customize.methods"  # of the entry points by which other packages add methods


class Entry(NamedTuple):
    """Where a method lives ("module:Class") and what it learns, in one line."""

    path: str
    summary: str


METHODS: dict[str, Entry] = {
    "dreambooth": Entry(
        "customize.trainers.methods.dreambooth:DreamBooth",
        "LoRA (or the whole denoiser) on a rare word, with prior preservation (Ruiz et al., 2023)",
    ),
    "textual_inversion": Entry(
        "customize.trainers.methods.textual_inversion:TextualInversion",
        "vectors of a new word, nothing else (Gal et al., 2023)",
    ),
    "pivotal_tuning": Entry(
        "customize.trainers.methods.pivotal_tuning:PivotalTuning",
        "a new word and LoRA together",
    ),
    "mcpl": Entry(
        "customize.trainers.methods.mcpl:MCPL",
        "several words at once from images that hold several things (Jin et al., 2024)",
    ),
    "core": Entry(
        "customize.trainers.methods.core:CoRe",
        "a new word that leaves the rest of the prompt its meaning (Wu et al., 2024)",
    ),
    "single_insert": Entry(
        "customize.trainers.methods.single_insert:SingleInsert",
        "a new word and LoRA from one image with a mask, without its background (Wu et al., 2023)",
    ),
    "break_for_make": Entry(
        "customize.trainers.methods.break_for_make:BreakForMake",
        "content and style learned apart in two halves of one LoRA, and joined (Xu et al., 2024)",
    ),
    "ziplora": Entry(
        "customize.trainers.methods.ziplora:ZipLoRA",
        "trained LoRAs joined in one by a coefficient for each column (Shah et al., 2023)",
    ),
    "noiseclr": Entry(
        "customize.trainers.methods.noiseclr:NoiseCLR",
        "directions such as older or in fog, found in images without captions (Dalva and Yanardag, 2024)",
    ),
    "iti_gen": Entry(
        "customize.trainers.methods.iti_gen:ITIGen",
        "words for the categories of attributes, for images balanced over them (Zhang et al., 2023)",
    ),
    "domain_tuning": Entry(
        "customize.trainers.methods.domain_tuning:DomainTuning",
        "a dozen steps from the word and LoRA that a domain encoder predicts (Arar et al., 2023)",
    ),
    "domain_encoder": Entry(
        "customize.trainers.methods.domain_encoder:DomainEncoding",
        "an encoder of images to a word and LoRA, for domain_tuning (Arar et al., 2023)",
    ),
    "custom_contrast": Entry(
        "customize.trainers.methods.custom_contrast:CustomContrast",
        "an encoder of images, no tuning per subject, taught by contrast between subjects (Chen et "
        "al., 2025)",
    ),
    "in_context": Entry(
        "customize.trainers.methods.in_context:InContext",
        "LoRA for models that are shown images of the subject: Flux.2, Flux.1 Kontext, Qwen-Image-Edit-Plus",
    ),
    "ip_adapter": Entry(
        "customize.trainers.methods.ip_adapter:IPAdapter",
        "an encoder of images: visual tokens alone (Ye et al., 2023)",
    ),
    "reference_unet": Entry(
        "customize.trainers.methods.reference_unet:ReferenceUNetMethod",
        "the UNet reads the images itself, and its attention is joined with them (Face Fusion, 2024)",
    ),
    "seecoder": Entry(
        "customize.trainers.methods.seecoder:SeeCoderMethod",
        "an encoder of one image that takes the place of the prompt (Prompt-Free Diffusion, Xu et al., 2023)",
    ),
}


def all_methods() -> dict[str, Entry]:
    """The methods of the toolkit, and those that installed packages add as entry points."""
    added = {point.name: Entry(point.value, f"from {point.value}") for point in entry_points(group=GROUP)}
    return added | METHODS


def methods_listed() -> str:
    """A line for each method."""
    return "\n".join(f"{name:<18} {entry.summary}" for name, entry in all_methods().items())


def general_usage() -> str:
    """The help of `customize train` without a method."""
    return (
        "customize train METHOD [FILE.yaml] [--flag value ...]: teach a model your subject\n\n"
        "customize train METHOD --help lists a method's flags. METHOD is FILE.py:Class or one of\n\n"
        f"{methods_listed()}"
    )


def find_entry(name: str) -> Entry:
    """The entry of a method, without importing the method; `FILE.py:Class` is a method in a file."""
    if is_file(name):
        return Entry(name, "")
    methods = all_methods()
    if name in methods:
        return methods[name]
    if name.endswith((".yaml", ".yml")):
        raise UserError(f"Write the METHOD before the file: customize train dreambooth {shortened(name)}.")
    other = RENAMED.get(name.lower())
    told = f" It is called {other} here." if other else nearest(name, methods)
    raise UserError(f"There is no method '{shortened(name)}': `customize methods` lists them.{told}")


def is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def find_method(name: str) -> type:
    """The class of a method; imports its module."""
    path, _, attribute = find_entry(name).path.rpartition(":")
    if not is_file(name):
        return getattr(import_module(path), attribute)
    if not path or not attribute:
        raise UserError(f"'{shortened(name)}' lacks its class: write it as FILE.py:Class.")
    found = getattr(_import_file(Path(path)), attribute, None)
    from customize.trainers.methods.base import Method

    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"'{path}' has no class '{attribute}' derived from Method; correct its name.")
    return found


def _import_file(path: Path) -> ModuleType:
    """The module in a file, imported once; UserError if it cannot be."""
    if not path.is_file():
        raise UserError(f"There is no file '{path}'; correct the path of the method.")
    name = f"customize_method_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        if (folder := str(path.resolve().parent)) not in sys.path:
            sys.path.append(folder)  # so that the file can import its neighbours, as a script can
        spec = spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file does
            del sys.modules[name]
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"'{path}' cannot be imported ({what}); mend the file.") from error
    return sys.modules[name]


def display_name(name: str) -> str:
    """The name of a method as runs and model cards state it: of a file, the name of its class."""
    return name.rpartition(":")[2] if is_file(name) else name
