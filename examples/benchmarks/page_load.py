"""The web page under load: requests of several clients at once, and its memory over many images.

    python examples/benchmarks/page_load.py --clients 5 --requests 20 --generations 50

Each client asks for other prompts and seeds; the settings in the answered images say whether any were
mixed up. Prints the seconds of all requests, and the page's resident memory as it goes.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
from gradio_client import Client
from PIL import Image

PLACES = ("on the beach", "in the snow", "on grass", "under a night sky")


def draw(page: Client, prompt: str, seed: int, steps: int) -> dict:
    """The settings in the image that a request is answered with."""
    options = {"number": 1, "steps": steps, "seed": seed, "new_seed": False}
    images, _, _ = page.predict(prompt, **options, api_name="/draw")
    with Image.open(images[0]["image"]) as image:
        return json.loads(image.info["parameters"])


def together(address: str, clients: int, requests: int, steps: int) -> tuple[int, float]:
    """How many of the requests were answered with what they asked for, and the seconds of all."""
    pages = [
        Client(address, headers={"x-customize-visitor": f"{i:032x}"}, verbose=False) for i in range(clients)
    ]

    def ask(number: int) -> bool:
        prompt = f"a fox {PLACES[number % len(PLACES)]}"
        found = draw(pages[number % clients], prompt, number, steps)
        return (found["prompt"], found["seed"]) == (prompt, number)

    begin = time.time()
    with ThreadPoolExecutor(requests) as pool:
        right = sum(pool.map(ask, range(requests)))
    return right, time.time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--generations", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--port", type=int, default=7899)
    options = parser.parse_args()
    with TemporaryDirectory() as work:
        words = ["--work_folder", work, "--port", str(options.port), "--host", "0.0.0.0"]
        page = subprocess.Popen([sys.executable, "-m", "customize.app.cli", "app", *words])
        address, begin = f"http://127.0.0.1:{options.port}", time.time()
        try:
            wait(address)
            print(f"page served after {time.time() - begin:.1f} s")
            right, seconds = together(address, options.clients, options.requests, options.steps)
            print(
                f"{right} of {options.requests} requests of {options.clients} clients right, {seconds:.1f} s"
            )
            own, process = Client(address, verbose=False), psutil.Process(page.pid)
            for number in range(options.generations):
                draw(own, "a fox on grass", number, options.steps)
                if number % 10 == 9:
                    print(f"after {number + 1} images: {process.memory_info().rss / 2**20:.0f} MiB")
            print(f"{len(list(Path(work).rglob('*.png')))} images in the visitors' folders")
        finally:
            page.terminate()
            page.wait(60)


def wait(address: str) -> None:
    while True:
        try:
            if httpx.get(address, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
