"""Uploading a finished run: a list of its own files, without paths of the user's machine."""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image, PngImagePlugin

from customize.errors import UserError, first_line
from customize.files import header, read_json
from customize.runs.card import last_sample
from customize.runs.checkpoint import open_run
from customize.runs.folder import CARD, INFO
from customize.runs.privacy import names_place, without_paths, without_places

Content = Path | bytes


def push(
    run: str | Path, repo_id: str, private: bool = True, samples: Sequence[str] = (), dry_run: bool = False
) -> str:
    """Uploads a run and returns the address of its repository; `dry_run` only says what would be uploaded.

    Uploaded are the files that `run.json` lists, the model card with its image, and `samples` (files of
    images), all without paths of this machine. UserError if the run is damaged, the repository is public
    but was not to be, or cannot be reached.
    """
    folder = Path(run)
    contents = upload_list(folder, repo_id, samples)
    listing = "\n".join(f"  {name} ({size(content)})" for name, content in contents.items())
    kind = "private" if private else "public"
    print(
        f"uploading to the {kind} repository {repo_id}:\n{listing}"
        if not dry_run
        else f"would be uploaded:\n{listing}"
    )
    if dry_run:
        return "nothing was uploaded (--dry_run)"
    try:
        return upload(contents, repo_id, private, f"Upload {folder.resolve().name}")
    except UserError:
        raise
    except Exception as error:  # of the network, the hub's own, of a wrong name: all kinds
        reason = first_line(error)
        raise UserError(
            f"the run '{run}' is complete, but was not uploaded ({reason}); when the hub can be reached: "
            f"customize push {run} {repo_id}"
        ) from error


def upload_list(folder: Path, repo_id: str, samples: Sequence[str] = ()) -> dict[str, Content]:
    """What belongs to a run, by its name in the repository."""
    info = open_run(folder)
    if "files" not in info:
        raise UserError(
            f"'{folder}' is of an earlier version and lists no files; train it again to upload it."
        )
    contents = {name: shared(folder / name, repo_id) for name in info["files"]}
    changed = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
        if isinstance(content, bytes)
    }
    described = without_places(info) | {"files": info["files"] | changed}
    contents[INFO] = json.dumps(described, indent=2).encode()
    for path in [*filter(None, [last_sample(folder)]), *map(Path, samples)]:
        if (name := f"samples/{path.stem}.png") in contents:
            raise UserError(f"--samples: two images are called '{path.stem}'; rename one of them.")
        contents[name] = image_bytes(path)
    return contents


def shared(path: Path, repo_id: str) -> Content:
    """A file as it is uploaded: the path, or bytes without what names a place on this machine."""
    if path.name == CARD:
        return card_text(path.read_text(encoding="utf-8"), repo_id).encode()
    if path.suffix == ".json":
        content = read_json(path)
        cleaned = without_places(content)
        return path if cleaned == content else json.dumps(cleaned, indent=2).encode()
    if path.suffix == ".safetensors" and names_place(header(path)):
        raise UserError(
            f"'{path}' names a folder of this machine in its header; train the run again to upload it."
        )
    return path


def card_text(text: str, repo_id: str) -> str:
    """The model card with the repository in the place of the folder that stock diffusers loads from."""
    named = re.sub(r'\.(load_lora_weights|load_textual_inversion)\("[^"]*"', rf'.\1("{repo_id}"', text)
    return without_paths(named)


def image_bytes(path: Path) -> bytes:
    """An image as PNG, with none of its metadata but the settings that it was drawn with."""
    if not path.is_file():
        raise UserError(f"--samples: there is no file '{path}'.")
    try:
        with Image.open(path) as image:
            info, data = PngImagePlugin.PngInfo(), io.BytesIO()
            if isinstance(parameters := image.info.get("parameters"), str):
                info.add_text("parameters", scrubbed(parameters))
            image.convert("RGB").save(data, format="PNG", pnginfo=info)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--samples: '{path}' cannot be read as an image ({error}).") from error
    return data.getvalue()


def scrubbed(parameters: str) -> str:
    try:
        return json.dumps(without_places(json.loads(parameters)))
    except ValueError:
        return without_paths(parameters)


def size(content: Content) -> str:
    count = len(content) if isinstance(content, bytes) else content.stat().st_size
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def upload(contents: dict[str, Content], repo_id: str, private: bool, message: str) -> str:
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise UserError(
            f"the repository {repo_id} is public: choose another, or upload into it with --no_private."
        )
    added = (
        (name, content if isinstance(content, bytes) else str(content)) for name, content in contents.items()
    )
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in added]
    api.create_commit(repo_id, operations, commit_message=message)
    return str(address)
