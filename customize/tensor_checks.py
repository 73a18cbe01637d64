"""Models from files, and checks of tensors that were read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from customize.errors import UserError


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 knows no comparison
        tensor = tensor.float()
    low, high = tensor.aminmax()  # one pass, no copy; NaN prevails
    return bool(low.isfinite() and high.isfinite())


def check_finite(
    tensors: Mapping[str, Tensor], where: str | Path, remedy: str = "use an earlier checkpoint"
) -> None:
    """UserError if a tensor of the file `where` holds NaN or infinity."""
    for name, value in tensors.items():
        if not is_finite(value):
            raise UserError(f"'{where}' holds values that are not finite ({name}); {remedy}.")


def misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """How a file's tensors differ from the expected ones in names, shapes or types; empty if they do not."""
    for name in sorted(found.keys() ^ wanted.keys()):
        return f"{'it lacks' if name in wanted else 'it has an unknown tensor'} '{name}'"
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            return f"'{name}' is {tuple(value.shape)} where {tuple(wanted[name].shape)} is needed"
        if not value.is_floating_point():
            return f"'{name}' is of {value.dtype}"
    return ""


_EMPTY: ContextVar[bool] = ContextVar("empty", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Context in which `load_whole` reads configurations alone and makes models of the meta device."""
    token = _EMPTY.set(True)
    try:
        yield
    finally:
        _EMPTY.reset(token)


def reads_weights() -> bool:
    """Whether models are loaded with their weights, as they are outside of `without_weights`."""
    return not _EMPTY.get()


def empty_model(kind: Any, place: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model as `from_pretrained` would load it in this precision, but on the meta device: its configuration
    alone is read."""
    of_diffusers = issubclass(kind, ModelMixin)
    if of_diffusers:
        config = kind.load_config(place, **options)
    else:
        config = kind.config_class.from_pretrained(place, **options)
    with torch.device("meta"):
        model = kind.from_config(config) if of_diffusers else kind._from_config(config)
    if not of_diffusers:
        model.tie_weights()
    kept = set(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())
    if of_diffusers or dtype == torch.float16:
        kept |= set(kind._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def load_whole(kind: Any, place: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(place)`; ValueError unless all of its weights are there and finite. diffusers
    and transformers leave missing weights at random values. An `empty_model` within `without_weights`."""
    if not reads_weights():
        named = {name: value for name, value in options.items() if name in ("dtype", "subfolder", "revision")}
        return empty_model(kind, place, **named)
    model, info = kind.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
    name = Path(place).name
    if missing := sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"])):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its {name} lacks weights: {missing[0]}{more}; save or download it anew")
    for key, value in model.state_dict().items():
        if not is_finite(value):
            raise ValueError(f"its {name} holds values that are not finite: {key}; download it anew")
    return model
