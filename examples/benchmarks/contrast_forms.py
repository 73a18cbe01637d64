"""Forms of CSCL, CustomContrast's cross-modal contrast: encoders of one budget and seed, each trained
from its start with one form, and what the last validation says of them.

    python examples/benchmarks/contrast_forms.py [--forms plain hard ...] [--steps 200]

`none` is trained without contrast. Over 32 held-out drawings: the denoising loss; the gain, by how much
it rises with another subject's references; how often the visual CLS state finds its own textual one, and
S+ of one view that of another; the gradient of the contrast, as a share of the denoising loss's. Means
over seeds.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

from customize.losses.contrastive import CsclForm
from customize.trainers.launch import run

FOLDER = Path("runs/contrast_forms")
SHOWN = ("validation_loss", "gain", "cross-modal retrieval", "retrieval", "spearman", "cscl gradient")


def trained(form: str, seed: int, options) -> dict[str, float]:
    """The numbers of the last validation; a run that is there already is read."""
    output = FOLDER / f"{form}-{seed}"
    weight = 0.0 if form == "none" else options.weight
    flags = f"--cscl_weight {weight} --macl_weight 0 --seed {seed} --max_train_steps {options.steps}"
    flags += f" --validation_steps {options.steps} --holdout 32 --output_dir {output}"
    if form != "none":
        flags += f" --cscl_form {form}"
    if not (output / "run.json").exists():
        run(["custom_contrast", *flags.split()])
    return json.loads((output / "validation.jsonl").read_text().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="*", default=["none", *get_args(CsclForm)])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--weight", type=float, default=0.02, help="of the contrast")
    options = parser.parse_args()
    found = {form: [trained(form, seed, options) for seed in range(options.seeds)] for form in options.forms}
    print(f"\n{options.steps} steps, {options.seeds} seeds\n\n| | {' | '.join(SHOWN)} |")
    print("|---" * (len(SHOWN) + 1) + "|")
    for form, results in found.items():
        cells = [[result[name] for result in results if name in result] for name in SHOWN]
        shown = [f"{sum(values) / len(values):.4f}" if values else "" for values in cells]
        print(f"| {form} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
