"""Stage 2: tokenizer and text tower. `python examples/stickers/text_tower.py [--minutes 15]`, resumable.

What hundreds of millions of images give CLIP's text tower, this one is told directly: what a drawing looks
like. From the noun on, its states must let a linear layer read the drawing's thumbnail, and from the second
noun on that of the second drawing; padding positions `FIRST_PATCH` and up each give one 4 x 4 patch of the
first, `SECOND_PATCH` and up of the second, so that the denoiser can route patches to places; the pooled state
and the padding name every other factor. Noise on the word vectors keeps the space around words usable for
methods that learn new ones.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from supply import Piece, Supply
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
from recipe import FURNACE, Run, autocast, begin, part, stage, until, worlds

LENGTH, FIRST_PATCH, SECOND_PATCH, LOOK = 56, 24, 40, 128
PAIRS, PIECE = 0.3, 2048  # share of captions that name two things; captions made at a time
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
    words = " ".join(
        [*phrases, *world.classes, *world.studios, *RARE, "a next to the of and in on with style"]
    ).split()
    core = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=20000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    core.train_from_iterator(sorted(words), trainer)
    merges = [tuple(pair) for pair in __import__("json").loads(core.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {
        piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    }
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
    """16 x 16 images with premultiplied alpha, values around 0, shape (drawings, 16, 16, 4)."""
    small = [
        np.asarray(Image.fromarray(world.sprite(d)).resize((16, 16), Image.Resampling.BOX), np.float32) / 255
        for d in drawings
    ]
    return (
        np.stack([np.concatenate([(s[..., :3] - 0.5) * s[..., 3:], s[..., 3:] - 0.5], -1) for s in small]) * 2
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers as every stage reads captions, (n, LENGTH)."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids


class Looks:
    """The thumbnail of every drawing that pretraining may see, and a short code for it (its principal
    components)."""

    def __init__(self, world):
        drawings = world.drawings()
        self.index = {d: i for i, d in enumerate(drawings)}
        images = thumbnails(world, drawings)
        flat = torch.from_numpy(images).flatten(1)
        _, _, axes = torch.pca_lowrank(flat - flat.mean(0), LOOK, niter=6)
        code = (flat - flat.mean(0)) @ axes
        self.code = (
            code / code.std(0).sqrt() / code.std(0).sqrt().mean()
        )  # halfway to whitened: outlines count too
        patches = (
            torch.from_numpy(images).unflatten(2, (4, 4)).unflatten(1, (4, 4))
        )  # (n, row, y, column, x, 4)
        self.patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)  # (n, 16, 64)


class Teacher(nn.Module):
    """The text model and the linear read-outs that tell it what to know."""

    def __init__(self, text: CLIPTextModel):
        super().__init__()
        self.text = text
        dim = text.config.hidden_size
        self.look, self.patch = nn.Linear(dim, LOOK), nn.Linear(dim, 64)
        self.subject, self.companion = nn.Linear(dim, LOOK), nn.Linear(dim, LOOK)
        self.factors = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in READ.items()})
        text.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, _, args, embedded):
        """Between no noise and a third of a word vector's own length."""
        if not self.training:
            return embedded
        amount = torch.rand(len(embedded), 1, 1, device=embedded.device) * 0.33 * embedded.detach().std()
        return embedded + amount * torch.randn_like(embedded)

    def forward(
        self, ids: Tensor, nouns: Tensor, looks: Tensor, patches: Tensor, factors: dict
    ) -> dict[str, Tensor]:
        """`nouns` (batch, 2): the positions of the nouns' last tokens, 0 where there is none; `looks` (batch,
        2, LOOK) and `patches` (batch, 2, 16, 64) of the things that they name."""
        output = self.text(ids)
        states, position = output.last_hidden_state, torch.arange(LENGTH, device=ids.device)
        first, second = nouns[:, :1], nouns[:, 1:]
        # the second noun's look from itself to the patches of the first thing, and at the patches of the
        # second
        is_second = (second > 0) & (
            ((position >= second) & (position < FIRST_PATCH)) | (position >= SECOND_PATCH)
        )
        target = torch.where(is_second[..., None], looks[:, 1:], looks[:, :1])
        after = ((position >= first) & (first > 0) & (is_second | (position < SECOND_PATCH))).float()
        # the nouns and the words after them count most: attention to words should find looks there
        weight = after * (1 + 8 * ((position == first) | (position == second)).float())
        error = (self.look(states) - target).square().mean(-1)
        found = self.patch(states[:, FIRST_PATCH:]).unflatten(1, (2, -1))
        pooled = output.pooler_output
        rows = torch.arange(len(states), device=ids.device)
        padding = states[rows, torch.randint(FIRST_PATCH, LENGTH, (len(states),), device=ids.device)]
        losses = {
            "look": (weight * error).sum() / weight.sum(),
            "patch": (found - patches).square().mean((0, 2, 3)).sum() / 0.3,
            # without its own term the pooled state forgets the subject, as the tower that ships did
            "subject": 0.3 * (self.subject(pooled) - looks[:, 0]).square().mean(),
            "companion": 0.3 * (self.companion(pooled) - looks[:, 1]).square().mean(),
        }
        for name, head in self.factors.items():
            read = (F.cross_entropy(head(states), factors[name]) for states in (pooled, padding))
            losses[name] = 0.1 * sum(read, torch.zeros((), device=ids.device))
        return losses


def draw_batch(rng, world, pools, looks: Looks, tokenizer, count: int):
    """Captions and all that they say: token numbers (count, LENGTH), where the two nouns end and which
    drawings they name (both (count, 2); 0 and -1 where there is none), and each factor."""
    captions, before, drawings, factors = [], [], [], {name: [] for name in READ}
    for _ in range(count):
        pool = pools[int(rng.random() < 0.6)]
        scene = draw_factors(rng, world, pool, extras=0.5)
        if rng.random() < PAIRS:
            scene = replace(scene, companion=pool[rng.integers(len(pool))], count=1)
        style, setting = rng.random() < 0.8, rng.random() < 0.85
        noun, beside = ((str(d) if style else d.word) if d else "" for d in (scene.subject, scene.companion))
        if rng.random() < 0.1:
            noun = RARE[rng.integers(len(RARE))] + " " + noun
        empty = rng.random() < 0.02
        text = "" if empty else caption(scene, noun, PREFIXES[rng.integers(len(PREFIXES))], style, setting)
        captions.append(text)
        before += ["" if empty else text[: text.index(noun) + len(noun)]]
        beside = f"next to a {beside}" if beside and not empty else ""
        before += [text[: text.index(beside) + len(beside)] if beside else ""]
        drawings += [-1 if empty or d is None else looks.index[d] for d in (scene.subject, scene.companion)]
        said = {name: values[0] if empty else getattr(scene, name) for name, values in READ.items()}
        said["background"] = said["background"] if setting else None
        for name, values in READ.items():
            factors[name].append(values.index(said[name]))
    ids = token_ids(tokenizer, captions)
    nouns = [len(i) - 2 if text else 0 for i, text in zip(tokenizer(before).input_ids, before, strict=True)]
    numbers = torch.tensor(nouns).view(-1, 2), torch.tensor(drawings).view(-1, 2)
    return ids, *numbers, {k: torch.tensor(v) for k, v in factors.items()}


class Pieces:
    """Captions and all that they say, of any drawing and of the core vocabulary; of drawings their numbers
    only."""

    def __init__(self):
        world = worlds()
        self.looks, self.tokenizer = (
            Looks(world),
            CLIPTokenizer.from_pretrained(FURNACE / "model" / "tokenizer"),
        )
        self.world, self.pools = world, (world.drawings(), world.drawings(core=True))

    def __call__(self, rng: np.random.Generator, spread: float) -> Piece:
        ids, nouns, shown, factors = draw_batch(
            rng, self.world, self.pools, self.looks, self.tokenizer, PIECE
        )
        return ids, nouns, shown, *factors.values()


def main():
    options = begin(stage(15, batch_size=128, lr=2e-3, threads=1))
    world, large = worlds(), options.device.type != "cpu"
    tokenizer, folder = train_tokenizer(world), FURNACE / "model" / "tokenizer"
    if not folder.exists():
        tokenizer.save_pretrained(folder)
    looks, teacher = Looks(world), Teacher(build(tokenizer)).to(options.device)
    code, patches = looks.code.to(options.device), looks.patches.to(options.device)
    weights = part("text_encoder") / "model.safetensors"
    run = Run("text_tower", teacher, options.lr, ema=0.998, shipped=weights, part=teacher.text)
    supply = Supply(Pieces, run.step + 3, options.workers, options.device, kept=64 if large else 4, shows=1)
    elapsed = until(options.minutes)
    for ids, nouns, shown, *factors in supply.batches(options.batch_size, elapsed):
        known = (shown >= 0)[..., None]
        said = dict(zip(READ, factors, strict=True))
        with autocast(options.device):
            losses = teacher(ids, nouns, code[shown] * known, patches[shown] * known[..., None], said)
        run.update(losses, len(ids), (elapsed() - 0.4) / 0.6)
        run.report()
        run.save(500)
    supply.close()
    run.save()
    teacher.load_state_dict(run.average)
    teacher.eval()
    with torch.no_grad():
        losses = teacher(ids, nouns, code[shown] * known, patches[shown] * known[..., None], said)
    print(
        "without noise:",
        {k: round(v.item(), 4) for k, v in losses.items()},
        "look variance",
        code.var(0).mean().item(),
    )
    teacher.text.half().save_pretrained(FURNACE / "model" / "text_encoder")


if __name__ == "__main__":
    main()
