"""StickerBench: how well a method teaches held-out drawings to the embedded base model, measured against
the truth."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from customize.adapters import holds_encoder
from customize.adapters.subject_files import adapter_file
from customize.app.bench.bench import Bench, ImagesToScore, Subject
from customize.app.bench.drawing import Sampling
from customize.app.bench.sticker_scores import METRICS, score
from customize.errors import UserError, nearest
from customize.metrics import ClipEncoder, load_sticker_clip
from customize.pipelines import load_subject_pipeline
from customize.runs.output import save_image
from customize.stickers import ENCODER, MODEL, Drawing, World, draw_scene
from customize.stickers.bench import (
    bench_prompts,
    bench_subjects,
    reference_scenes,
    true_scene,
    write_references,
)
from customize.stickers.judge import TRUSTED, accuracy, trusted
from customize.stickers.scene import SIDE

COMMON = f"--resolution {SIDE} --train_batch_size 4 --lr_scheduler cosine --checkpointing_steps 100000"
LORA = "--rank 16 --lora_layers all --learning_rate 1e-3"


class Recipe(NamedTuple):
    """A method at the embedded model's scale: `words` stand for the subject in prompts; `{}` is its class
    word. Methods with a subject `encoder` (`stickers`, or the folder of a run) are not trained for each
    subject."""

    label: str
    method: str
    words: str
    flags: str
    encoder: str = ""
    masks: bool = False  # whether the method is given masks beside the images


WORD = "--placeholder_token <subject> --initializer_token {}"
RECIPES = {
    "base": Recipe("Base model", "", "{}", ""),
    "real": Recipe("Real scenes", "", "{}", ""),
    "textual_inversion": Recipe(
        "Textual Inversion",
        "textual_inversion",
        "<subject>",
        f"{WORD} --num_vectors 4 --learning_rate 1e-2",
    ),
    "textual_inversion-output": Recipe(
        "ConES: Textual Inversion of outputs",
        "textual_inversion",
        "<subject>",
        f"{WORD} --num_vectors 4 --learning_rate 1e-2 --optimize output",
    ),
    "core": Recipe(
        "CoRe", "core", "<subject>", f"{WORD} --num_vectors 4 --learning_rate 1e-2 --context_prompts stickers"
    ),
    "single_insert": Recipe(
        "SingleInsert",
        "single_insert",
        "<subject> {}",
        f"{WORD} --num_vectors 4 --rank 16 --learning_rate 1e-3 --encoder_dim 128 --encoder_depth 2 "
        "--unmasked_weight 0",
        masks=True,
    ),
    "dreambooth-no-prior": Recipe("DreamBooth LoRA, no prior", "dreambooth", "sks {}", LORA),
    "dreambooth": Recipe(
        "DreamBooth LoRA", "dreambooth", "sks {}", f"{LORA} --with_prior_preservation --num_class_images 16"
    ),
    "dreambooth-teacher": Recipe(
        "DreamBooth LoRA, teacher prior",
        "dreambooth",
        "sks {}",
        f"{LORA} --with_prior_preservation --prior_source teacher",
    ),
    "dreambooth-fidelity": Recipe(
        "DreamBooth LoRA, subject fidelity",
        "dreambooth",
        "sks {}",
        f"{LORA} --with_prior_preservation --num_class_images 16 --prior_loss_weight 0 "
        "--fidelity_weight 1e-3",
    ),
    "pivotal_tuning": Recipe(
        "Pivotal tuning",
        "pivotal_tuning",
        "<subject> {}",
        f"{LORA} {WORD} --num_vectors 2 --token_learning_rate 1e-2",
    ),
    "custom_contrast": Recipe("CustomContrast encoder", "", "<s> {}", "", "stickers"),
}
GROUPS = {"known": "known class", "unknown": "unknown class"}


def drawings_of(group: str) -> list[Drawing]:
    """The benchmark's drawings of `known` or of `unknown` classes."""
    world = World()
    return [drawing for drawing in bench_subjects() if world.is_unknown(drawing.word) == (group == "unknown")]


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, or that of the folder of an encoder's run; UserError for others."""
    if name in RECIPES:
        return RECIPES[name]
    if holds_encoder(name):
        return Recipe(Path(name).name.replace("-", " ").replace("_", " "), "", "<s> {}", "", name)
    raise UserError(
        f"--methods: StickerBench has no recipe '{name}', nor is it a run of an encoder: "
        f"{', '.join(RECIPES)}."
        f"{nearest(name, RECIPES)}"
    )


def encoder_of(name: str) -> str:
    """The encoder that a method draws with; none for methods that are trained for each subject, and for
    finished runs."""
    return "" if name == "run" else find_recipe(name).encoder


class WithReferences:
    """A pipeline that adds the subject's reference images to every call."""

    def __init__(self, pipe, references: Sequence[Image.Image]):
        self.pipe, self.references = pipe, list(references)

    def __call__(self, prompts: list[str], **options):
        return self.pipe(prompts, subject_images=self.references, **options)


@lru_cache(maxsize=1)
def encoder_pipeline(encoder: str, device: str) -> Any:
    pipe = load_subject_pipeline(encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@dataclass(frozen=True, kw_only=True)
class StickerBench(Bench):
    """`methods` of `RECIPES` on 30 subjects with 25 prompts and 4 images each; `quick`: 6 subjects, 8
    prompts, 1 image."""

    sampling: Sampling = Sampling(num_inference_steps=25, guidance_scale=4.0, batch_size=16)
    quick: bool = False
    steps: int = 200
    group: str = "all"  # or one of `GROUPS`

    title = "StickerBench"

    def __post_init__(self):
        for name in self.methods:
            find_recipe(name)

    @cached_property
    def clip(self) -> ClipEncoder:
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
            for drawing in self.drawings
        ]

    @property
    def drawings(self) -> list[Drawing]:
        """Twenty held-out drawings of known classes and ten of unknown ones; `quick`: the first six of
        them."""
        if self.group == "all":
            return bench_subjects(self.quick)
        chosen = drawings_of(self.group)
        return chosen[: len(bench_subjects(quick=True))] if self.quick else chosen

    def drawing(self) -> dict[str, str]:
        prompts = bench_prompts(self.quick)
        of_group = f" of {self.group} classes" if self.group != "all" else ""
        model = hashlib.sha256((MODEL / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
        return {
            "bench": "StickerBench" + (", quick subset" if self.quick else ""),
            "base model": f"stickers, denoiser sha256 {model.hexdigest()[:12]}",
            "subjects": (
                f"{len(self.subjects)} held-out drawings{of_group}, four captioned reference images each"
            ),
            "prompts": (
                f"{len(prompts)}, sha256 {hashlib.sha256(chr(10).join(prompts).encode()).hexdigest()[:12]}"
            ),
            "images": f"{self.repeats} for each prompt, seeds from {self.seed}",
            "sampling": str(self.sampling),
        }

    def teaching(self, name: str) -> str:
        recipe = find_recipe(name)
        if recipe.encoder:
            file = ENCODER if recipe.encoder == "stickers" else adapter_file(recipe.encoder)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
            return f"encoder sha256 {digest}, no training for a subject"
        return (
            f"{recipe.method}, {self.steps} steps, {COMMON} {recipe.flags}" if recipe.method else recipe.label
        )

    def scoring(self) -> dict[str, str]:
        return {
            "encoder": self.clip.stamp,
            "judge's own accuracy": ", ".join(f"{k} {v:.1%}" for k, v in accuracy().items() if k != "scenes"),
            "not quoted": (
                f"what the judge gets right in less than {TRUSTED:.0%}; subject fidelity of changed drawings"
            ),
            "pairing": "CLIP-I: every image with every reference; CLIP-T: every image with its own prompt",
            "averages": (
                "over images within a subject, then over subjects; intervals are 95 % bootstrap over subjects"
            ),
        }

    def label(self, name: str) -> str:
        return find_recipe(name).label

    def words(self, name: str, subject: Subject) -> str:
        return find_recipe(name).words.format(subject.word)

    def trains(self, name: str) -> bool:
        return not encoder_of(name)

    def training(self, name: str, subject: Subject) -> list[str]:
        recipe = find_recipe(name)
        flags = recipe.flags.format(subject.word)
        return f"{recipe.method} {COMMON} --max_train_steps {self.steps} {flags}".split()

    def pipeline(self, name: str, subject: Subject) -> Any:
        if not (encoder := encoder_of(name)):
            return super().pipeline(name, subject)
        references = [draw_scene(scene, World())[0] for scene in reference_scenes(subject.source, self.seed)]
        return WithReferences(encoder_pipeline(encoder, self.sampling.device), references)

    def prior(self, name: str, subject: Subject, load: Callable) -> list[Image.Image]:
        """An encoder leaves the base model unchanged, so the class word alone is drawn by the base model."""
        if encoder_of(name):
            return super().prior("base", subject, lambda: super(StickerBench, self).pipeline("base", subject))
        return super().prior(name, subject, load)

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        words, masks = self.words(name, subject), name != "run" and find_recipe(name).masks
        return write_references(folder, subject.source, words, self.seed, masks)

    def real(self, subject: Subject, folder: Path) -> list[Image.Image]:
        """Rendered scenes as the prompts ask: what a perfect method could draw."""
        shots = self.shots(subject, subject.word)
        images = [true_scene(subject.source, shot.prompt, 10_000 + shot.seed) for shot in shots]
        for shot, image in zip(shots, images, strict=True):
            save_image(image, folder / f"{shot.name}.png")
        return images

    def images_to_score(
        self,
        subject: Subject,
        images: list[Image.Image],
        references: list[Image.Image],
        prior: list[Image.Image],
        before: list[Image.Image],
    ) -> ImagesToScore:
        masks = [draw_scene(scene, World())[1] for scene in reference_scenes(subject.source, self.seed)]
        return replace(super().images_to_score(subject, images, references, prior, before), masks=masks)

    def score(self, taken: ImagesToScore) -> tuple[dict, dict, list[dict]]:
        return score(taken, self.clip, self.seed)

    def results(self, protocol: dict[str, str], methods: list[dict]) -> dict:
        title = f"{self.title} (quick)" if self.quick else self.title
        fidelity = "subject_fidelity" if trusted("drawing") else "correlation"
        rows = [subject["scores"] for method in methods for subject in method["subjects"]]
        metrics = {name: METRICS[name] for name in METRICS if any(row.get(name) is not None for row in rows)}
        return {
            "title": title,
            "protocol": protocol,
            "axes": ["prompt_fidelity", fidelity],
            "metrics": metrics,
            "methods": methods,
        }
