"""Subject-driven text-to-image customization: teach a diffusion model a subject, get a diffusers pipeline
back.

`train`, `load_pipeline` and `load_subject_pipeline` are imported when they are first used: torch takes
seconds.
"""

import logging
from importlib import import_module
from typing import Any

_HOMES = {
    "train": ("customize.trainers.launch", "train_method"),
    "load_pipeline": ("customize.pipelines", "load_pipeline"),
    "load_subject_pipeline": ("customize.pipelines", "load_subject_pipeline"),
}
# torchao and bitsandbytes report at their import which kernels a machine lacks, needed or not
for _library in ("torchao", "bitsandbytes", "torch.utils._pytree", "diffusers.quantizers"):
    logging.getLogger(_library).setLevel(logging.ERROR)
__all__ = ["load_pipeline", "load_subject_pipeline", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'customize' has no attribute '{name}'")
    from customize.quiet import quietly

    module, attribute = _HOMES[name]
    with quietly():  # libraries warn at their import of what we do not use
        return getattr(import_module(module), attribute)
