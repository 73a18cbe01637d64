"""Before an encoder: what drawings are called. `python examples/stickers/names.py custom_contrast|ip_adapter
[--minutes 15]`

The denoiser's loss alone teaches an encoder slowly on a CPU. Rendered scenes know their subjects' names, and
the text tower knows looks by name (stage 2), so an encoder is first fitted to it, some fifty scenes a second
on one core:

* its visual tokens to the text tower's states for "a flat fox": the first, the noun's, the end's, and one for
  each patch;
* S+ (custom_contrast): the states of "a <s> fox on the beach" to those of "a flat fox on the beach", at
  random times and slots,
  and of "a <s> sticker on the beach" too, where only the image can tell.

This carries over to drawings without a name. The visual branches then start from the text's own values, as
strong as suits the denoiser best. Writes .furnace/names-METHOD and goes on from it; so does training by
`--pretrained_adapter`.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from customize.adapters import holds
from customize.adapters.attention import text_layers
from customize.adapters.embedding_hooks import replaced_words
from customize.adapters.subject import add_subject_words
from customize.backbones.base import Backbone
from customize.backbones.families import wrap
from customize.backbones.load import load_base
from customize.config import parse
from customize.data.dataset import to_device
from customize.data.references import collate_references
from customize.data.rendered import Rendered, a_view
from customize.prompts import WORDS
from customize.stickers import Drawing
from customize.stickers.scene import PREFIXES, SIDE, caption, draw_factors
from customize.trainers.launch import configs
from customize.trainers.methods.encoder_method import SubjectMethod
from customize.trainers.registry import find_method
from customize.trainers.validation import validation_loss
from recipe import FURNACE, begin, stage, until
from text_tower import FIRST_PATCH, SECOND_PATCH

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the visual branches' first values, in the text's own


@torch.no_grad()
def token_targets(backbone: Backbone, drawings: list[Drawing]) -> Tensor:
    """What the visual tokens are fitted to, (drawings, 3 + patches, dim)."""
    found = []
    for start in range(0, len(drawings), 64):
        prompts = [f"a {drawing}" for drawing in drawings[start : start + 64]]
        states = backbone.encode_prompt(prompts)["encoder_hidden_states"]
        ends = torch.tensor([len(ids) - 1 for ids in backbone.tokenizers[0](prompts).input_ids])
        row = torch.arange(len(prompts))
        words = torch.stack([states[:, 0], states[row, ends - 1], states[row, ends]], 1)
        found.append(torch.cat([words, states[:, FIRST_PATCH:SECOND_PATCH]], 1))
    return torch.cat(found)


class PromptBatches(IterableDataset):
    """Endless batches of `data`; each worker of a loader makes its own."""

    def __init__(self, data: Rendered, size: int):
        self.data, self.size = data, size

    def __iter__(self):
        rng = np.random.default_rng(torch.initial_seed() % 2**63)  # another one in each worker
        while True:
            yield batch(self.data, rng, self.size)


def batch(data: Rendered, rng: np.random.Generator, size: int):
    """References, prompts with S+, the same prompts with the drawings' names, and the drawings' numbers."""
    images, prompts, names, numbers = [], [], [], []
    for _ in range(size):
        drawing = data.pool[rng.integers(len(data.pool))]
        scene = draw_factors(rng, data.world, [drawing], extras=0.1)
        noun = "sticker" if rng.random() < 0.5 else drawing.word
        prefix, setting = PREFIXES[rng.integers(len(PREFIXES))], rng.random() < 0.92
        view = a_view(drawing, data.world, rng)
        images.append(view.cut_out if rng.random() < 0.5 else view.image)
        prompts.append(caption(scene, f"{WORDS[0]} {noun}", prefix, setting=setting))
        names.append(caption(scene, str(drawing), prefix, setting=setting))
        numbers.append(data.number[drawing])
    return data.pixels(images), prompts, names, numbers


def word_loss(method: SubjectMethod, encoded, prompts: list[str], names: list[str]) -> Tensor:
    """How far the text states are from those of the names, each prompt with the S+ of a random slot."""
    adapter, backbone, count = method.adapter, method.backbone, len(prompts)
    device = backbone.device
    vectors = adapter.word_vectors(encoded, torch.ones(count, 1, device=device))[0]  # (slots, rows, 1, dim)
    own = vectors[
        torch.randint(adapter.text_blocks, (count,), device=device), torch.arange(count, device=device)
    ]
    with replaced_words(backbone.tokenizers, backbone.text_encoders, [WORDS[0]], [own]):
        states = backbone.encode_prompt(prompts)["encoder_hidden_states"]
    with torch.no_grad():
        target = backbone.encode_prompt(names)["encoder_hidden_states"]
    return F.mse_loss(states, target)


@torch.no_grad()
def start_values(method: SubjectMethod, batches: list[dict]) -> None:
    """Gives the visual branches the text's own values, at the strength of the lowest loss on held-out
    drawings."""
    adapter, losses = method.adapter, {}

    def use(strength: float):
        for number, name in text_layers(method.backbone.denoiser).items():
            adapter.branches[number].to_v_ip.weight.copy_(
                strength * method.backbone.denoiser.get_submodule(name).to_v.weight
            )

    for strength in STRENGTHS:
        use(strength)
        losses[strength] = validation_loss(method, batches, repeats=4)
    print("loss by strength of the visual branches:", {k: round(v, 4) for k, v in losses.items()}, flush=True)
    use(min(losses, key=losses.__getitem__))


def main():
    parser = stage(
        15, batch_size=64, lr=1e-3, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=["custom_contrast", "ip_adapter"])
    options = begin(parser)
    output, device = FURNACE / f"names-{options.method}", options.device
    words = [f"examples/stickers/{options.method}.yaml", "--resolution", str(SIDE)]
    words += ["--no_location"] if options.method == "custom_contrast" else []
    words += ["--pretrained_adapter", str(output)] if holds(output, "subject") else []
    backbone = wrap(load_base("stickers"), "stickers").to(device)
    _, config, _, settings = parse(configs(find_method(options.method)), words)
    method = find_method(options.method)(backbone, settings).to(device)
    adapter = method.adapter
    add_subject_words(backbone.tokenizers)
    data = Rendered(config, method.image_encoder.pixels, 0)
    targets = token_targets(backbone, data.pool)
    print(f"variance of the tokens {targets.var(0).mean():.4f}", flush=True)
    trained = [*adapter.encoder.parameters(), *adapter.starts.parameters()]
    optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=0.01, fused=True)
    loader = iter(DataLoader(PromptBatches(data, options.batch_size), None, num_workers=options.workers))
    elapsed, step, log = until(options.minutes), 0, []
    while (passed := elapsed()) < 1:
        pixels, prompts, names, numbers = next(loader)
        features = adapter.encoder.read(method.image_encoder(pixels.to(device))).unsqueeze(1)
        encoded = method.encode(features, torch.rand(len(pixels), device=device))
        losses = {"tokens": F.mse_loss(encoded.visual, targets[numbers])}
        if adapter.has_words:
            losses["words"] = word_loss(method, encoded, prompts, names)
        sum(losses.values()).backward()
        optimizer.param_groups[0]["lr"] = options.lr * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - passed))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.append({name: loss.item() for name, loss in losses.items()})
        if step % 50 == 0:
            means = {name: round(float(np.mean([entry[name] for entry in log])), 4) for name in losses}
            print(f"step {step} scenes {step * options.batch_size} {means}", flush=True)
            log = []
    held_out = Rendered(config, method.image_encoder.pixels, 0, validation=True)
    start_values(method, [to_device(collate_references([held_out[i] for i in range(32)]), device)])
    output.mkdir(parents=True, exist_ok=True)
    adapter.save(output)
    print(output)


if __name__ == "__main__":
    main()
