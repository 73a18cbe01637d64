"""Frozen weights held in 8 or 4 bits: int8 and fp8 by torchao, nf4 by bitsandbytes (QLoRA, Dettmers et al.,
2023, arXiv 2305.14314). LoRA beside them stays float32."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customize.errors import UserError, first_line

Quantization = Literal["none", "int8", "fp8", "nf4"]
PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
TOLERANCE = 0.2  # relative error of a layer's output above which its kernel is broken; nf4's is 0.09


class _Product(torch.autograd.Function):
    """x W^T + b for a quantised W, which is restored for the product and once more for the gradient.
    torchao's own product keeps the restored weights of every layer until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, restored(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ restored(ctx.weight).to(gradient.dtype), None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is a quantised tensor of torchao or bitsandbytes."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self.weight, self.bias)


def restored(weight: Any) -> Tensor:
    """The weight (out, in) of a linear layer, quantised or not, as ordinary numbers."""
    if hasattr(weight, "quant_state"):
        return _library("nf4").functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "qdata") else weight


def quantized_names(module: nn.Module) -> list[str]:
    """The names of a module's quantised weights."""
    return [f"{name}.weight" for name, own in module.named_modules() if isinstance(own, QuantizedLinear)]


def quantize(module: nn.Module, kind: str, device: torch.device) -> int:
    """Replaces the frozen linear layers of a model's blocks by ones of `kind`, on the device; returns how
    many. Layers before and after the blocks stay as they are."""
    found = [name for name, layer in module.named_modules() if _fits(name, layer, kind)]
    for name in found:
        parent, _, own = name.rpartition(".")
        layer = module.get_submodule(name)
        setattr(module.get_submodule(parent), own, _quantized(layer, kind, device))
    return len(found)


def in_block(name: str) -> bool:
    """Whether a layer of this name belongs to one of the model's blocks, which are numbered."""
    return any(part.isdigit() for part in name.split(".")[:-1])


def _fits(name: str, layer: nn.Module, kind: str) -> bool:
    if type(layer) is not nn.Linear or not in_block(name):
        return False
    # T5 casts what its last layers are given to the type of their weights, which are packed bytes
    return not (kind == "nf4" and name.endswith("DenseReluDense.wo"))


def _quantized(layer: Any, kind: str, device: torch.device) -> nn.Module:
    """The frozen layer with its weight quantised, on the device."""
    library = _library(kind)
    layer.to(device)
    made: Any = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    if kind == "nf4":
        weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        layer.weight = weight.to(device)
    else:
        config = library.Int8WeightOnlyConfig() if kind == "int8" else library.Float8WeightOnlyConfig()
        library.quantize_(layer, config)
    made.weight, made.bias = layer.weight, layer.bias
    return made.requires_grad_(False).train(layer.training)


def _library(kind: str) -> Any:
    """The package that quantises to `kind`; ImportError if it is missing."""
    with _silent():
        if kind == "nf4":
            return importlib.import_module("bitsandbytes")
        # peft says that it cannot merge into torchao's weights, which is never asked for
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        return importlib.import_module("torchao.quantization")


@contextmanager
def _silent() -> Iterator[None]:
    """Context without messages below errors: the packages report kernels that they do not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def check_quantization(flag: str, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """UserError, naming the flag, unless layers of `kind` compute their output and its gradient on the device
    in a dtype."""
    try:
        error = _error(kind, device, dtype)
    except ImportError:
        raise UserError(f"{flag} {kind} needs {PACKAGES[kind]}: pip install {PACKAGES[kind]}.") from None
    except Exception as reason:  # each package has its own kinds
        raise UserError(
            f"{flag} {kind} does not run on this machine's {device.type} ({first_line(reason)}); use "
            f"{'none' if kind == 'int8' else 'int8 or none'}."
        ) from reason
    if not error < TOLERANCE:
        raise UserError(
            f"{flag} {kind} computes wrong values on this machine's {device.type}; use another or none."
        )


def _error(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """The larger relative error of output and gradient of a small layer of `kind`."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, 64, generator=generator) for _ in range(2))
    layer = nn.Linear(64, 64, bias=False, device="meta")  # which draws no random numbers
    layer.weight = nn.Parameter(weight.to(dtype))
    given = x.to(device, dtype, copy=True).requires_grad_(True)
    output = _quantized(layer, kind, device)(given)
    (gradient,) = torch.autograd.grad(output, given, torch.ones_like(output))
    pairs = (output.detach(), x @ weight.T), (gradient, weight.sum(0).expand(64, -1))
    return max(float((a.cpu().float() - b).norm() / b.norm()) for a, b in pairs)
