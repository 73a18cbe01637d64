"""Stage 2: tokenizer and text tower. `python examples/stickers/text_tower.py [--minutes 15]`, resumable.

What hundreds of millions of pictures give CLIP's text tower, this one is told directly: what a drawing looks like. From
the noun on, its states must let a linear layer read the drawing's thumbnail; padding positions `FIRST_PATCH` and up each
give one 4 x 4 patch of it, so that the denoiser can route patches to places; the pooled state names every other factor.
Noise on the word vectors keeps the space around words usable for methods that learn new ones.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from customize.stickers.backgrounds import BACKGROUNDS
from customize.stickers.scene import (
    BORDERS,
    COUNTS,
    FACTORS,
    FRAMES,
    LIGHTS,
    ORIENTATIONS,
    PREFIXES,
    SIZES,
    TINTS,
    WEATHERS,
    caption,
    draw_factors,
)
from recipe import FURNACE, Run, part, until, worlds

LENGTH, FIRST_PATCH, LOOK = 40, 24, 128
RARE = ("sks", "zwx", "ohwx", "snq")  # words without meaning, for methods that bind a subject to one
READ = FACTORS | {"background": (None, *BACKGROUNDS)}  # a caption may leave the setting out


def train_tokenizer(world) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's format whose merges go on until every word of the world is one token."""
    phrases = [
        *BACKGROUNDS.values(),
        *TINTS,
        *SIZES,
        *ORIENTATIONS,
        *LIGHTS,
        *WEATHERS,
        *BORDERS,
        *FRAMES,
        *COUNTS.values(),
        *PREFIXES,
    ]
    words = " ".join([*phrases, *world.classes, *world.studios, *RARE, "a next to the of and in on with style"]).split()
    core = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=20000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    core.train_from_iterator(sorted(words), trainer)
    merges = [tuple(pair) for pair in __import__("json").loads(core.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def thumbnails(world, drawings) -> np.ndarray:
    """16 x 16 pictures with premultiplied alpha, values around 0, shape (drawings, 16, 16, 4)."""
    small = [
        np.asarray(Image.fromarray(world.sprite(d)).resize((16, 16), Image.Resampling.BOX), np.float32) / 255 for d in drawings
    ]
    return np.stack([np.concatenate([(s[..., :3] - 0.5) * s[..., 3:], s[..., 3:] - 0.5], -1) for s in small]) * 2


class Looks:
    """The thumbnail of every drawing that pretraining may see, and a short code for it (its principal components)."""

    def __init__(self, world):
        drawings = world.drawings()
        self.index = {d: i for i, d in enumerate(drawings)}
        pictures = thumbnails(world, drawings)
        flat = torch.from_numpy(pictures).flatten(1)
        _, _, axes = torch.pca_lowrank(flat - flat.mean(0), LOOK, niter=6)
        code = (flat - flat.mean(0)) @ axes
        self.code = code / code.std(0).sqrt() / code.std(0).sqrt().mean()  # halfway to whitened: outlines count too
        patches = torch.from_numpy(pictures).unflatten(2, (4, 4)).unflatten(1, (4, 4))  # (n, row, y, column, x, 4)
        self.patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)  # (n, 16, 64)


class Teacher(nn.Module):
    """The text model and the linear read-outs that tell it what to know."""

    def __init__(self, text: CLIPTextModel):
        super().__init__()
        self.text = text
        dim = text.config.hidden_size
        self.look, self.companion, self.patch = nn.Linear(dim, LOOK), nn.Linear(dim, LOOK), nn.Linear(dim, 64)
        self.factors = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in READ.items()})
        text.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, _, args, embedded):
        """Between no noise and a third of a word vector's own length."""
        if not self.training:
            return embedded
        amount = torch.rand(len(embedded), 1, 1) * 0.33 * embedded.detach().std()
        return embedded + amount * torch.randn_like(embedded)

    def forward(
        self, ids: Tensor, noun: Tensor, look: Tensor, patches: Tensor, companion: Tensor, factors: dict
    ) -> dict[str, Tensor]:
        """`noun` (batch,): the position of the noun's last token, 0 where there is no subject."""
        output = self.text(ids)
        states, position = output.last_hidden_state, torch.arange(LENGTH)
        after = ((position >= noun[:, None]) & (noun[:, None] > 0)).float()
        # the noun and the word after it count most: attention to words should find looks there
        weight = after * (1 + 8 * (position == noun[:, None]).float())
        error = (self.look(states) - look[:, None]).square().mean(-1)
        pooled = output.pooler_output
        losses = {
            "look": (weight * error).sum() / weight.sum(),
            "patch": (self.patch(states[:, FIRST_PATCH:]) - patches).square().mean() / 0.3,
            "companion": 0.3 * (self.companion(pooled) - companion).square().mean(),
        }
        for name, head in self.factors.items():
            losses[name] = 0.1 * F.cross_entropy(head(pooled), factors[name])
        return losses


def draw_batch(rng, world, pools, looks: Looks, tokenizer, count: int):
    """Captions, and all that they say."""
    captions, nouns, subjects, companions, factors = [], [], [], [], {name: [] for name in READ}
    for _ in range(count):
        scene = draw_factors(rng, world, pools[int(rng.random() < 0.6)], extras=0.5)
        style, setting = rng.random() < 0.8, rng.random() < 0.85
        noun = str(scene.subject) if style else scene.subject.word
        if rng.random() < 0.1:
            noun = RARE[rng.integers(len(RARE))] + " " + noun
        empty = rng.random() < 0.02
        text = "" if empty else caption(scene, noun, PREFIXES[rng.integers(len(PREFIXES))], style, setting)
        captions.append(text)
        nouns.append("" if empty else text[: text.index(noun) + len(noun)])
        subjects.append(-1 if empty else looks.index[scene.subject])
        companions.append(-1 if empty or scene.companion is None else looks.index[scene.companion])
        said = {name: values[0] if empty else getattr(scene, name) for name, values in READ.items()}
        said["background"] = said["background"] if setting else None
        for name, values in READ.items():
            factors[name].append(values.index(said[name]))
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    position = torch.tensor([len(i) - 2 if n else 0 for i, n in zip(tokenizer(nouns).input_ids, nouns, strict=True)])
    subject, companion = torch.tensor(subjects), torch.tensor(companions)
    known, beside = (subject >= 0).float()[:, None], (companion >= 0).float()[:, None]
    look, patches = looks.code[subject] * known, looks.patches[subject] * known[..., None]
    return ids, position, look, patches, looks.code[companion] * beside, {k: torch.tensor(v) for k, v in factors.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    world = worlds()
    tokenizer = train_tokenizer(world)
    looks, teacher = Looks(world), Teacher(build(tokenizer))
    weights = part("text_encoder") / "model.safetensors"
    run = Run("text_tower", teacher, options.lr, ema=0.998, shipped=weights, part=teacher.text)
    rng, elapsed = np.random.default_rng(run.step), until(options.minutes)
    pools = world.drawings(), world.drawings(core=True)
    while (passed := elapsed()) < 1:
        run.update(
            teacher(*draw_batch(rng, world, pools, looks, tokenizer, options.batch_size)),
            options.batch_size,
            (passed - 0.4) / 0.6,
        )
        run.report()
        run.save(200)
    run.save()
    teacher.load_state_dict(run.average)
    teacher.eval()
    with torch.no_grad():
        batch = draw_batch(rng, world, pools, looks, tokenizer, 512)
        losses = teacher(*batch)
    print(
        "without noise:", {k: round(v.item(), 4) for k, v in losses.items()}, "look variance", looks.code.var(0).mean().item()
    )
    teacher.text.save_pretrained(FURNACE / "model" / "text_encoder")
    tokenizer.save_pretrained(FURNACE / "model" / "tokenizer")


if __name__ == "__main__":
    main()
