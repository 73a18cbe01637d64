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


@contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """Context in which the LoRA layers of a module give what they gave before. What is trained stays so:
    peft's own switch makes everything trainable again."""
    adapted = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    before = [part._disable_adapters for part in adapted]
    for part in adapted:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part, value in zip(adapted, before, strict=True):
            part._disable_adapters = value


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
