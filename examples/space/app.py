"""The page as a Hugging Face Space: each visitor has a folder of her own, deleted after a day."""

from pathlib import Path

from customize.app.web.page import start

if __name__ == "__main__":
    start(Path("work"), host="0.0.0.0", port=7860, auth=[], hours=24.0, share=False)
