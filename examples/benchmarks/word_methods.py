"""Questions about the methods that learn words, on the quick subset of StickerBench: six held-out
drawings, eight prompts.

    python examples/benchmarks/word_methods.py context    CoRe with and without its parts
    python examples/benchmarks/word_methods.py single     from one image, whose caption does not name the
                                                          background: SingleInsert beside DreamBooth
    python examples/benchmarks/word_methods.py domain --domain_encoder RUN    a dozen steps beside hundreds

Prints a Markdown table with 95 % bootstrap intervals over subjects; images and scores are in --output.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from customize.app.bench.bench import Subject
from customize.app.bench.stickers import COMMON, LORA, RECIPES, WORD, Recipe, StickerBench
from customize.metrics import confidence_interval
from customize.quiet import quiet_libraries
from customize.stickers.bench import parse_prompt
from customize.stickers.judge import judge

CORE = f"{WORD} --num_vectors 4 --learning_rate 1e-2 --context_prompts stickers"
SINGLE = RECIPES["single_insert"]
DEMANDING = (
    "a red {} next to a bus on the beach",
    "a tiny blue {} in the snow",
    "two copies of a {} under a night sky",
    "a {} next to a apple against a brick wall",
    "a green {} with a white border on blue water",
    "a huge purple {} next to a car on a wooden table",
    "a {} at sunset in a wooden frame",
    "three copies of a golden {} on green grass",
)
SHOWN = ("subject_fidelity", "correlation", "prompt_fidelity", "background_leak", "class")


def context(options) -> dict[str, Recipe]:
    strong = f"{CORE} --norm_hold_end 0.6"
    embedding, attention = "--context_embedding_weight 0.1", "--context_attention_weight 300"
    without = "--context_embedding_weight 0", "--context_attention_weight 0"
    free = f"{CORE} --norm_hold_end 0.4"
    return {
        "base": RECIPES["base"],
        "textual_inversion": RECIPES["textual_inversion"],
        "dreambooth-no-prior": RECIPES["dreambooth-no-prior"],
        "CoRe": Recipe("", "core", "<subject>", CORE),
        "CoRe, weights of .1 and 300": Recipe("", "core", "<subject>", f"{strong} {embedding} {attention}"),
        "without L_emb": Recipe("", "core", "<subject>", f"{strong} {without[0]} {attention}"),
        "without L_attn": Recipe("", "core", "<subject>", f"{strong} {embedding} {without[1]}"),
        "without norm hold": Recipe("", "core", "<subject>", f"{free} {embedding} {attention}"),
    }


def single(options) -> dict[str, Recipe]:
    return {
        "SingleInsert": SINGLE,
        "SingleInsert without L_bg": SINGLE._replace(flags=f"{SINGLE.flags} --background_weight 0"),
        "DreamBooth LoRA": RECIPES["dreambooth-no-prior"],
        "DreamBooth LoRA, masked": RECIPES["dreambooth-no-prior"]._replace(masks=True),
    }


def domain(options) -> dict[str, Recipe]:
    flags = f"--domain_encoder {options.domain_encoder} --placeholder_token <subject>"
    tuned = Recipe(
        "", "domain_tuning", "<subject> {}", f"{flags} --learning_rate 1e-3 --token_learning_rate 1e-2"
    )
    still = tuned._replace(flags=f"{flags} --learning_rate 1e-12")
    hard = tuned._replace(flags=f"{tuned.flags} --hard_path 0.25")
    dreambooth = Recipe("", "dreambooth", "sks {}", LORA)
    return {
        "Domain encoder, 0 steps": still._replace(label="1"),
        "Domain encoder, 4 steps": tuned._replace(label="4"),
        "Domain encoder, 12 steps": tuned._replace(label="12"),
        "Domain encoder, 12 steps, hard path": hard._replace(label="12"),
        "DreamBooth, 12 steps": dreambooth._replace(label="12"),
        "DreamBooth, 100 steps": dreambooth._replace(label="100"),
        "DreamBooth, 400 steps": dreambooth._replace(label="400"),
    }


@dataclass(frozen=True, kw_only=True)
class Comparison(StickerBench):
    """Recipes of its own; a recipe's label is its number of steps, if it has one."""

    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    images: int = 4  # that teach

    def __post_init__(self) -> None:
        RECIPES.update(self.recipes)
        super().__post_init__()

    def training(self, name: str, subject: Subject) -> list[str]:
        recipe = RECIPES[name]
        steps = recipe.label if recipe.label.isdigit() else self.steps
        flags = recipe.flags.replace("{}", subject.word)
        return f"{recipe.method} {COMMON} --max_train_steps {steps} {flags}".split()

    def write_references(self, name: str, subject: Subject, folder: Path) -> list[Image.Image]:
        shown = super().write_references(name, subject, folder)
        for path in folder.glob("*"):
            if int(path.name[0]) >= self.images:
                path.unlink()
            elif path.suffix == ".txt" and self.images == 1:  # a caption that does not name the background
                path.write_text(f"a {self.words(name, subject)}", encoding="utf-8")
        return shown[: self.images]

    def images_to_score(self, *args):
        taken = super().images_to_score(*args)
        return taken.__class__(**{**vars(taken), "masks": taken.masks[: self.images]})

    def demanding(self, name: str) -> float:
        """Prompt fidelity of prompts that ask for several things at once, mean over the subjects."""
        found = []
        for subject in self.subjects:
            pipe, words = self.pipeline(name, subject), self.words(name, subject)
            generators = [torch.Generator().manual_seed(i) for i in range(len(DEMANDING))]
            prompts = [prompt.format(words) for prompt in DEMANDING]
            images = pipe(prompts, generator=generators, **self.sampling.options).images
            verdicts = judge(images)
            for i, prompt in enumerate(DEMANDING):
                found += verdicts.obeys(i, parse_prompt(prompt.format(subject.word))).values()
        return sum(found) / len(found)


QUESTIONS: dict[str, Callable] = {"context": context, "single": single, "domain": domain}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--domain_encoder", default="")
    parser.add_argument("--output", type=Path, default=Path("runs/word_methods"))
    options = parser.parse_args()
    quiet_libraries()
    recipes = QUESTIONS[options.question](options)
    bench = Comparison(
        folder=options.output / options.question,
        methods=list(recipes),
        recipes=recipes,
        repeats=1,
        quick=True,
        images=1 if options.question == "single" else 4,
    )
    columns = [*SHOWN, "demanding prompts", "s of training"]
    print(f"\n| | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
    for method in bench.run()["methods"]:
        cells = []
        for name in SHOWN:
            values = [s["scores"][name] for s in method["subjects"] if s["scores"].get(name) is not None]
            low, high = confidence_interval(values)
            cells.append(f"{sum(values) / len(values):.3f} ({low:.3f} to {high:.3f})")
        demanding = f"{bench.demanding(method['name']):.3f}" if options.question == "context" else ""
        seconds = [subject["cost"].get("training seconds", 0.0) for subject in method["subjects"]]
        print(f"| {method['name']} | {' | '.join(cells)} | {demanding} | {sum(seconds) / len(seconds):.0f} |")


if __name__ == "__main__":
    main()
