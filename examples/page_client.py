"""The web page as an HTTP API, from Python.

    customize app --port 7860            # in one terminal
    python examples/page_client.py runs/demo/images --word fox

teaches the page's model the subject of a folder of images, waits, and saves what it draws.
"""

import argparse
import secrets
import shutil
import time
from pathlib import Path

from gradio_client import Client, handle_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of images of one thing")
    parser.add_argument("--word", default="fox", help="what they show, in one word")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--page", default="http://127.0.0.1:7860")
    parser.add_argument("--output", type=Path, default=Path("drawn.png"))
    options = parser.parse_args()
    # of a page with several visitors: names our folder, as a cookie does for a browser; keep it to come back
    headers = {"x-customize-visitor": secrets.token_hex(16)}
    page = Client(options.page, headers=headers, verbose=False)
    paths = sorted(options.images.glob("*.png")) + sorted(options.images.glob("*.jpg"))
    run, _ = page.predict(
        images=[{"image": handle_file(path), "caption": None} for path in paths],
        words=options.word,
        name=f"my {options.word}",
        settings=f'{{"max_train_steps": {options.steps}}}',
        api_name="/teach",
    )
    name = run["value"] if isinstance(run, dict) else run
    while (state := state_of(page, name))["state"] not in ("done", "failed", "cancelled"):
        print(f"{name}: {state['state']}, step {state['step']} of {state['steps']}")
        time.sleep(2)
    images, note, _ = page.predict(
        f"a sks {options.word} on the beach", model=name, number=1, api_name="/draw"
    )
    shutil.copy(images[0]["image"], options.output)
    print(f"{options.output}: {note}")


def state_of(page: Client, name: str) -> dict:
    """What a run does: its state, step and steps."""
    return next(run for run in page.predict(api_name="/jobs") if run["name"] == name)


if __name__ == "__main__":
    main()
