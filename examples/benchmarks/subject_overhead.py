"""What a subject costs at inference: a denoising step with an encoder's injection against one of the plain
pipeline.

    python examples/benchmarks/subject_overhead.py [RUN]

Medians over interleaved repeats in one process, of one prompt with guidance and four reference images.
"""

import argparse
import itertools
import statistics
import time

import torch

from customize.pipelines import load_pipeline, load_subject_pipeline
from customize.stickers import World, draw_scene
from customize.stickers.bench import bench_subjects, reference_scenes


def steps_of(pipe, prompt: str, steps: int, **options) -> tuple[list[float], float]:
    """Seconds of each step but the first, and those before the second step began: encoders and first keys and
    values."""
    times = [time.perf_counter()]

    def note(pipe, step, t, kwargs):
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return kwargs

    pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=4.0,
        callback_on_step_end=note,
        output_type="latent",
        **options,
    )
    return [b - a for a, b in itertools.pairwise(times)], times[1] - times[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default="stickers")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    subject = bench_subjects()[0]
    references = [draw_scene(scene, World())[0] for scene in reference_scenes(subject)]
    plain, pipe = load_pipeline("stickers"), load_subject_pipeline(options.run)
    word = f"<s> {subject.word}" if pipe.adapter.has_words else subject.word
    cases = {
        "plain": (plain, f"a {subject.word} on the beach", {}),
        "subject, keys and values kept": (pipe, f"a {word} on the beach", {"subject_images": references}),
        "subject, nothing kept": (
            pipe,
            f"a {word} on the beach",
            {"subject_images": references, "subject_cache": False},
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    before: dict[str, list[float]] = {name: [] for name in cases}
    for each in (plain, pipe):
        each.set_progress_bar_config(disable=True)
    for repeat in range(options.repeats + 1):
        for name in list(cases)[:: 1 if repeat % 2 else -1]:  # none is always the first
            each, prompt, given = cases[name]
            seconds, first = steps_of(each, prompt, options.steps, **given)
            if repeat:  # the first round warms up
                found[name] += seconds
                before[name].append(first)
    base = statistics.median(found["plain"])
    for name in cases:
        step, first = statistics.median(found[name]), statistics.median(before[name])
        print(
            f"{name:32s} {1000 * step:7.1f} ms a step, {step / base:.2f} x plain; up to the first step "
            f"{1000 * first:.0f} ms"
        )


if __name__ == "__main__":
    main()
