"""Runs a model without computing it: tensors have shapes and types but no values; their bytes are counted.

A training step of the largest model runs so on any machine. It is the method's own step, so that what is
counted is what a real step would allocate, not a formula. Tensors whose values steer the program (tokens,
masks, indices, random choices) also keep their values, as long as they do not depend on weights.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from customize import files

aten = torch.ops.aten
Kind = Literal["cuda", "cpu"]  # whose allocator, autocast and attention kernels are assumed
BLOCK = {"cuda": 512, "cpu": 64}  # bytes that an allocation is rounded up to
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
MOST_KNOWN = 1 << 18  # elements of a tensor whose values are kept


@dataclass
class Tally:
    """Bytes of the tensors made in a context: those that live now, and the most that lived at a time."""

    kind: Kind
    live: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = rounded(storage.nbytes(), self.kind)
        self._seen[key] = weakref.finalize(storage, self._drop, key, size)
        self._seen[key].atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        if self._seen.pop(key, None):
            self.live -= size


def rounded(size: int, kind: Kind) -> int:
    return -(-size // BLOCK[kind]) * BLOCK[kind]


def known(tensor: Tensor) -> Tensor | None:
    """The values of a simulated tensor, if they do not depend on weights."""
    return tensor.__dict__.get("known")


class Simulation(TorchDispatchMode):
    """Runs all operations on shapes. `measured()` counts bytes; `place(module)` takes a module in."""

    def __init__(self, fake: FakeTensorMode, kind: Kind):
        super().__init__()
        self.fake, self.kind = fake, kind
        self.tallies: list[Tally] = []

    @contextmanager
    def measured(self) -> Iterator[Tally]:
        tally = Tally(self.kind)
        self.tallies.append(tally)
        try:
            yield tally
        finally:
            self.tallies.remove(tally)

    def place(self, module: nn.Module) -> None:
        """Replaces parameters and buffers that are not simulated yet by simulated ones, shared as before."""
        made: dict[int, Tensor] = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None and not isinstance(tensor, FakeTensor):
                        made.setdefault(id(tensor), self._like(tensor))
                        held[name] = made[id(tensor)]  # type: ignore[assignment]

    def _like(self, tensor: Tensor) -> Tensor:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            new.__dict__.update(tensor.__dict__)
        elif tensor.device.type != "meta":
            self._remember(new, tensor.detach())
        return new

    def _remember(self, tensor: Any, value: Any) -> None:
        if isinstance(tensor, FakeTensor) and isinstance(value, Tensor) and value.numel() <= MOST_KNOWN:
            tensor.known = value  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.taken_in, (args, kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = [known(tensor) for tensor in tensors]
        real = None
        if all(value is not None for value in values) and (tensors or _is_small(args)):
            real = self._really(func, args, kwargs)
        if func in STEERING:
            result = STEERING[func](self, real, args)
            self._note(result, None, tensors)
            return result
        if func in INDEXED:
            args = args[0], self._split_masks(args[1]), *args[2:]
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if real is None:
                raise
            result = tree_map(self.taken_in, real)
        if real is None and func._schema.is_mutable:
            self._forget(args)
        self._note(result, real, tensors)
        return result

    def taken_in(self, leaf: Any) -> Any:
        """A tensor with values, or without a device, as a simulated one."""
        if isinstance(leaf, torch.device) and leaf.type != "cpu":
            return torch.device("cpu")
        if not isinstance(leaf, Tensor) or (isinstance(leaf, FakeTensor) and leaf.device.type == "cpu"):
            return leaf
        if leaf.device.type == "meta":
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
        with _disable_current_modes():
            plain = leaf.detach()
        taken = self.fake.from_tensor(plain)
        self._remember(taken, plain)
        return taken

    @torch.no_grad()
    def _really(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on values; None where it cannot be had."""

        def value(leaf: Any) -> Any:
            return known(leaf) if isinstance(leaf, Tensor) else leaf

        with _disable_current_modes():
            try:
                return func(*tree_map(value, args), **tree_map(value, kwargs))
            except (RuntimeError, NotImplementedError, IndexError):
                return None

    def _note(self, result: Any, real: Any, given: list[Tensor]) -> None:
        """Counts what is new in a result; a view of what was `given` is not."""
        for made, value in zip(tree_leaves(result), tree_leaves(real) or [], strict=False):
            self._remember(made, value)
        old = {tensor.untyped_storage()._cdata for tensor in given} if self.tallies else set()
        for made in tree_leaves(result):
            if isinstance(made, FakeTensor) and made.untyped_storage()._cdata not in old:
                for tally in self.tallies:
                    tally.add(made)

    def _forget(self, args: Any) -> None:
        for leaf in tree_leaves(args[:1]):
            if isinstance(leaf, Tensor):
                leaf.__dict__.pop("known", None)

    def _split_masks(self, indices: Any) -> list[Any]:
        """Indices with every mask as the positions where it holds; all of them where that is not known."""
        found: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                found += _positions(self, index).unbind(1)
            else:
                found.append(index)
        return found


def _is_small(args: Any) -> bool:
    """Whether a new tensor of these arguments has few elements."""
    sizes = next((arg for arg in args if isinstance(arg, list | tuple)), ())
    return math.prod(size for size in sizes if isinstance(size, int)) <= MOST_KNOWN


def _positions(simulation: Simulation, mask: Tensor) -> Tensor:
    """Where a mask holds (n, dimensions); everywhere if that is not known."""
    holds = known(mask)
    with _disable_current_modes():
        found = (torch.ones(mask.shape, dtype=torch.bool) if holds is None else holds).nonzero()
    return simulation.taken_in(found)


def _number(simulation: Simulation, real: Any, args: Any) -> Any:
    kind = bool if args[0].dtype == torch.bool else float if args[0].is_floating_point() else int
    return kind(1) if real is None else real


def _is_equal(simulation: Simulation, real: Any, args: Any) -> bool:
    return True if real is None else real


def _nonzero(simulation: Simulation, real: Any, args: Any) -> Tensor:
    return simulation.taken_in(real) if real is not None else _positions(simulation, args[0])


def _selected(simulation: Simulation, real: Any, args: Any) -> Tensor:
    return args[0].new_empty(len(_positions(simulation, args[1])))


# operations whose result a program branches on, or whose shape depends on values
STEERING: dict[Any, Callable[[Simulation, Any, Any], Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: _is_equal,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _selected,
}


class OnCuda(TorchFunctionMode):
    """Autocast's float32 operations and the attention kernels of CUDA, for simulated tensors, which are the
    CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.backward:
            with self:  # for the layers that gradient checkpointing runs again
                return _backward(*args)
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_in_float32, (args, kwargs))
        return func(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, which would leave the function mode."""
    ones = torch.ones_like(loss)
    _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


IN_FLOAT32 = {
    *(F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, F.mse_loss),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.sum),
    *(Tensor.sum, torch.norm, Tensor.norm, F.cosine_similarity, torch.log, Tensor.log),
}


def _in_float32(leaf: Any) -> Any:
    is_low = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if is_low else leaf


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention in half precision without a mask, else the memory-efficient kernel: both keep a number
    for each query instead of one for each pair."""
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = (own.to(low) for own in (query, key, value))
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    lead = query.shape[:-3]
    query, key, value = (own.flatten(0, -4) if own.ndim > 4 else own for own in (query, key, value))
    if query.ndim == 3:
        query, key, value = (own.unsqueeze(0) for own in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        pair = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    else:
        pair = aten._scaled_dot_product_efficient_attention(
            query, key, value, _bias(attn_mask, query, key), True, dropout_p, is_causal, scale=scale
        )
    return pair[0].view(*lead, *pair[0].shape[-3:])


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])


def _swap(first: Tensor, second: Tensor) -> None:
    """torch's `swap_tensors`, by which modules change their precision, without its objection to weak
    references: those to a simulated tensor only save work."""
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


def _read(path: Any, **options: Any) -> dict[str, Tensor]:
    """The tensors of a file, such as a run to go on from, with their values."""
    with _disable_current_modes():
        return load_file(path, **options)


def _numpy(tensor: Tensor, **options: Any) -> Any:
    """The values of a tensor that does not depend on weights, such as a scheduler's, as an array."""
    if (value := known(tensor)) is None:
        raise RuntimeError("a simulated tensor that depends on weights has no values")
    with _disable_current_modes():
        return value.detach().numpy()


@contextmanager
def simulated(kind: Kind = "cuda") -> Iterator[Simulation]:
    """Context in which tensors are simulated, as those of an NVIDIA GPU or of a CPU."""
    with ExitStack() as stack:
        simulation = Simulation(stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True)), kind)
        stack.enter_context(simulation)
        stack.enter_context(patch.object(torch.utils, "swap_tensors", _swap))
        for reader in (files, safetensors.torch):
            stack.enter_context(patch.object(reader, "load_file", _read))
        # peft would make LoRA of a file by the class of the layer's weight, which is no Parameter
        stack.enter_context(patch.object(lora_pipeline, "_LOW_CPU_MEM_USAGE_DEFAULT_LORA", False))
        stack.enter_context(patch.object(FakeTensor, "numpy", _numpy, create=True))
        if kind == "cuda":
            stack.enter_context(OnCuda())
        yield simulation
