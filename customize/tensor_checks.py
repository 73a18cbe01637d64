"""What can be wrong with the values of tensors that came from a file."""

from collections.abc import Mapping
from pathlib import Path

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


def check_finite(tensors: Mapping[str, Tensor], where: str | Path, remedy: str = "use an earlier checkpoint") -> None:
    """UserError if a tensor of the file `where` holds NaN or infinity."""
    for name, value in tensors.items():
        if not is_finite(value):
            raise UserError(f"'{where}' holds values that are not finite ({name}); {remedy}.")
