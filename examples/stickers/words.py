"""Before the encoder: its words. `python examples/stickers/words.py [--minutes 6]`, about 60 scenes a second on one core.

The denoiser's loss alone teaches the textual Q-Former slowly on a CPU. Rendered scenes know their subjects' names, so S+ is
first fitted to them: the text states of "a <s> fox on the beach" to those of "a flat fox on the beach", at random times and
slots, and of "a <s> sticker on the beach" too, where only the picture can tell. The text tower knows looks (stage 1), so this
carries over to drawings without a name. Writes .furnace/words and goes on from it; so does `custom_contrast` by
`--pretrained_adapter .furnace/words`.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from customize.backbone import wrap
from customize.loading import load_base
from customize.stickers.scene import PREFIXES, caption, draw_factors
from customize.subject import FILE, WORDS, add_subject_words, save_adapter
from customize.tokens import replaced_words
from customize.trainers.custom_contrast import CustomContrast, CustomContrastConfig
from customize.trainers.references import ReferenceConfig, Rendered
from recipe import FURNACE

OUTPUT = FURNACE / "words"


def batch(data: Rendered, rng: np.random.Generator, size: int):
    """References, prompts with S+, and the same prompts with the drawings' names."""
    pictures, prompts, names = [], [], []
    for _ in range(size):
        drawing = data.pool[rng.integers(len(data.pool))]
        scene = draw_factors(rng, data.world, [drawing], extras=0.1)
        noun = "sticker" if rng.random() < 0.5 else drawing.word
        prefix, setting = PREFIXES[rng.integers(len(PREFIXES))], rng.random() < 0.92
        view = data.view(drawing, rng)
        pictures.append(view.cut_out if rng.random() < 0.5 else view.picture)
        prompts.append(caption(scene, f"{WORDS[0]} {noun}", prefix, setting=setting))
        names.append(caption(scene, str(drawing), prefix, setting=setting))
    return data.pixels(pictures), prompts, names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = wrap(load_base("stickers"), "stickers")
    sizes = {"dim": 192, "depth": 2, "heads": 6, "visual_queries": 12, "feature_layers": 3, "location": False}
    earlier = str(OUTPUT) if (OUTPUT / FILE).exists() else ""
    method = CustomContrast(backbone, CustomContrastConfig(**sizes, cscl_weight=0, macl_weight=0, pretrained_adapter=earlier))
    adapter, rng = method.adapter, np.random.default_rng()
    add_subject_words(backbone.tokenizers)
    data = Rendered(ReferenceConfig(world=str(FURNACE / "world"), resolution=64), method.tower.pixels, 0)
    trained = [*adapter.encoder.textual.parameters(), *adapter.encoder.heads.parameters(), *adapter.starts.parameters()]
    optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=0.01, fused=True)
    begin, step, log = time.time(), 0, []
    while (passed := (time.time() - begin) / 60 / options.minutes) < 1:
        pixels, prompts, names = batch(data, rng, options.batch_size)
        features = adapter.encoder.read(method.tower(pixels)).unsqueeze(1)
        encoded = method.encode(features, torch.rand(len(pixels)))
        vectors = adapter.word_vectors(encoded, torch.ones(len(pixels), 1))[0]  # (slots, rows, 1, dim)
        own = vectors[torch.randint(adapter.slots, (len(pixels),)), torch.arange(len(pixels))]
        with replaced_words(backbone.tokenizers, backbone.text_encoders, [WORDS[0]], [own]):
            states = backbone.encode_prompt(prompts)["encoder_hidden_states"]
        with torch.no_grad():
            target = backbone.encode_prompt(names)["encoder_hidden_states"]
        loss = F.mse_loss(states, target)
        loss.backward()
        optimizer.param_groups[0]["lr"] = options.lr * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - passed))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} scenes {step * options.batch_size} loss {np.mean(log):.4f}", flush=True)
            log = []
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print(save_adapter(adapter, OUTPUT))


if __name__ == "__main__":
    main()
