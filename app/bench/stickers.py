"""StickerBench: how well a method teaches held-out drawings to the embedded base model, measured against the truth."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from customize.app.bench.bench import Bench, Subject, Taken
from customize.app.bench.drawing import Sampling
from customize.app.bench.sticker_scores import METRICS, score
from customize.errors import UserError, nearest
from customize.metrics import load_sticker_clip
from customize.pictures import save_picture
from customize.stickers import MODEL, World, draw_scene
from customize.stickers.bench import bench_prompts, bench_subjects, reference_scenes, true_scene, write_references
from customize.stickers.judge import TRUSTED, accuracy, trusted

COMMON = "--resolution 64 --train_batch_size 4 --lr_scheduler cosine --checkpointing_steps 100000"
LORA = "--rank 16 --lora_layers all --learning_rate 1e-3"


class Recipe(NamedTuple):
    """A method at the embedded model's scale: `words` stand for the subject in prompts; `{}` is its class word."""

    label: str
    method: str
    words: str
    flags: str


RECIPES = {
    "base": Recipe("Base model", "", "{}", ""),
    "real": Recipe("Real scenes", "", "{}", ""),
    "textual_inversion": Recipe(
        "Textual Inversion",
        "textual_inversion",
        "<subject>",
        "--placeholder_token <subject> --initializer_token {} --num_vectors 4 --learning_rate 1e-2",
    ),
    "dreambooth-no-prior": Recipe("DreamBooth LoRA, no prior", "dreambooth", "sks {}", LORA),
    "dreambooth": Recipe("DreamBooth LoRA", "dreambooth", "sks {}", f"{LORA} --with_prior_preservation --num_class_images 16"),
    "dreambooth-teacher": Recipe(
        "DreamBooth LoRA, teacher prior", "dreambooth", "sks {}", f"{LORA} --with_prior_preservation --prior_source teacher"
    ),
    "pivotal_tuning": Recipe(
        "Pivotal tuning",
        "pivotal_tuning",
        "<subject> {}",
        f"{LORA} --placeholder_token <subject> --initializer_token {{}} --num_vectors 2 --token_learning_rate 1e-2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StickerBench(Bench):
    """`methods` of `RECIPES` on 30 subjects, 25 prompts, 4 pictures each, or on the `quick` subset: 6, 8 and 1."""

    sampling: Sampling = Sampling(num_inference_steps=25, guidance_scale=4.0, batch_size=16)
    quick: bool = False
    steps: int = 200

    title = "StickerBench"

    def __post_init__(self):
        for name in self.methods:
            if name not in RECIPES:
                raise UserError(
                    f"--methods: StickerBench has no recipe '{name}': {', '.join(RECIPES)}.{nearest(name, RECIPES)}"
                )

    @cached_property
    def clip(self):
        return load_sticker_clip()

    @cached_property
    def subjects(self) -> Sequence[Subject]:  # type: ignore[override]
        world, prompts = World(), tuple(bench_prompts(self.quick))
        return [
            Subject(
                str(drawing).replace(" ", "-"),
                drawing.word,
                "unknown class" if world.is_unknown(drawing.word) else "known class",
                prompts,
                drawing,
            )
            for drawing in bench_subjects(self.quick)
        ]

    def drawing(self):
        prompts = bench_prompts(self.quick)
        model = hashlib.sha256((MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
        return {
            "bench": "StickerBench" + (", quick subset" if self.quick else ""),
            "base model": f"stickers, denoiser sha256 {model.hexdigest()[:12]}",
            "subjects": f"{len(self.subjects)} held-out drawings, four captioned reference pictures each",
            "prompts": f"{len(prompts)}, sha256 {hashlib.sha256(chr(10).join(prompts).encode()).hexdigest()[:12]}",
            "pictures": f"{self.repeats} for each prompt, seeds from {self.seed}",
            "sampling": str(self.sampling),
        }

    def teaching(self, name):
        recipe = RECIPES[name]
        return f"{recipe.method}, {self.steps} steps, {COMMON} {recipe.flags}" if recipe.method else recipe.label

    def scoring(self):
        return {
            "encoder": self.clip.stamp,
            "judge's own accuracy": ", ".join(f"{k} {v:.1%}" for k, v in accuracy().items() if k != "scenes"),
            "not quoted": f"what the judge gets right in less than {TRUSTED:.0%}; identity of changed drawings",
            "pairing": "CLIP-I: every picture with every reference; CLIP-T: every picture with its own prompt",
            "averages": "over pictures within a subject, then over subjects; intervals are 95 % bootstrap over subjects",
        }

    def label(self, name):
        return RECIPES[name].label

    def words(self, name, subject):
        return RECIPES[name].words.format(subject.word)

    def training(self, name, subject):
        recipe = RECIPES[name]
        return f"{recipe.method} {COMMON} --max_train_steps {self.steps} {recipe.flags.format(subject.word)}".split()

    def write_references(self, name, subject, folder):
        return write_references(folder, subject.source, self.words(name, subject), self.seed)

    def real(self, subject: Subject, folder: Path) -> list[Image.Image]:
        """What a perfect method could draw."""
        shots = self.shots(subject, subject.word)
        pictures = [true_scene(subject.source, shot.prompt, 10_000 + shot.seed) for shot in shots]
        for shot, picture in zip(shots, pictures, strict=True):
            save_picture(picture, folder / f"{shot.name}.png")
        return pictures

    def taken(self, subject, pictures, references, prior, before):
        masks = [draw_scene(scene, World())[1] for scene in reference_scenes(subject.source, self.seed)]
        return replace(super().taken(subject, pictures, references, prior, before), masks=masks)

    def score(self, taken: Taken):
        return score(taken, self.clip, self.seed)

    def results(self, protocol, methods):
        title = f"{self.title} (quick)" if self.quick else self.title
        likeness = "identity" if trusted("drawing") else "likeness"
        rows = [subject["scores"] for method in methods for subject in method["subjects"]]
        metrics = {name: METRICS[name] for name in METRICS if any(row[name] is not None for row in rows)}
        return {"title": title, "protocol": protocol, "axes": ["control", likeness], "metrics": metrics, "methods": methods}
