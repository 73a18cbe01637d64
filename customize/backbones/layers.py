"""Layers that LoRA is added to, by the ends of their names in diffusers' models, and LoRA switched off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = [
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]
CONVOLUTIONS = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "proj_in",
]  # of a UNet's residual and transformer blocks


def presets(
    attention: Sequence[str], feed_forward: Sequence[str], others: Sequence[str] = ()
) -> dict[str, list[str]]:
    """What --lora_layers calls the layers of a family, by the ends of their names."""
    return {
        "attention": [*attention],
        "attention+ff": [*attention, *feed_forward],
        "all": [*attention, *feed_forward, *others],
    }


PRESETS = presets(ATTENTION, FEED_FORWARD, CONVOLUTIONS)


ASSISTANT = "assistant"  # name of the LoRA that is active while training only


@contextmanager
def without_lora(module: nn.Module, assistant: bool = False) -> Iterator[None]:
    """Context in which the LoRA layers of a module give what they gave before; with `assistant`, the context
    in which only the assistant is left out. What is trained stays so: peft's own switch makes everything
    trainable again."""
    adapted = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    before = [part._active_adapter for part in adapted]
    for part in adapted:
        part._active_adapter = [name for name in part.active_adapters if (name == ASSISTANT) != assistant]
    try:
        yield
    finally:
        for part, value in zip(adapted, before, strict=True):
            part._active_adapter = value


def activate_assistant(module: nn.Module) -> None:
    """Makes the assistant of a module count beside what is trained, frozen."""
    for layer in (part for part in module.modules() if isinstance(part, BaseTunerLayer)):
        names = [ASSISTANT, *(name for name in layer.active_adapters if name != ASSISTANT)]
        layer._active_adapter = [name for name in names if name in getattr(layer, "lora_A", {})]
    for name, parameter in module.named_parameters():
        if f".{ASSISTANT}." in name:
            parameter.requires_grad_(False)


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Context in which a model keeps its activations, although gradient checkpointing is on: hooks that are
    gone before the backward pass could not be repeated there."""
    switched = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in switched:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in switched:
            part.gradient_checkpointing = True  # type: ignore[assignment]
