"""Who may see and do what on the page: each visitor has a folder, limits, and nothing else.

On the own computer (127.0.0.1 without --auth) there is one visitor, the owner: her folder is the work
folder, and nothing of hers is deleted. Otherwise every browser (or user name) has a folder of its own in
WORK/visitors, which is deleted when it was not used for a time.
"""

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from customize.errors import UserError
from customize.imaging import TooLarge, read_image
from customize.runs.folder import INFO, checkpoint_step
from customize.runs.listing import RunState, is_written, runs_in
from customize.runs.output import save_image

COOKIE = "customize_visitor"
HEADER = "x-customize-visitor"  # of programs, which keep no cookies
TOKEN = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"\w[\w .-]{0,59}")  # of runs
HUB = re.compile(r"[\w][\w.-]*/[\w.-]+")
MOST_PIXELS = 50_000_000
MOST_BYTES = 30 * 2**20


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for, so that nobody waits for one visitor alone."""

    images: int = 8
    steps: int = 100
    side: int = 1536
    uploads: int = 40
    training_steps: int = 100_000
    jobs: int = 20


OWNER = Limits()
GUEST = Limits(images=4, steps=50, side=1024, uploads=20, training_steps=2000, jobs=2)


@dataclass(frozen=True)
class Visitor:
    """Somebody with a folder of runs and images; `owner` is whose computer it is."""

    id: str
    folder: Path
    owner: bool

    @property
    def limits(self) -> Limits:
        return OWNER if self.owner else GUEST

    def runs(self) -> list[RunState]:
        return [run for run in runs_in(self.folder) if not run.name.startswith("visitors/")]

    def files(self) -> dict[str, Path]:
        """LoRA files that lie in the visitor's folder, by name."""
        return {
            path.name: path for path in sorted(self.folder.glob("*.safetensors")) if not path.is_symlink()
        }

    def run(self, name: str) -> Path:
        """The folder of one of the visitor's runs, or of a step of it (RUN/checkpoint-N); UserError for every
        other name: it is looked up in the list, never joined to a path unseen."""
        base, _, step = name.rpartition("/")
        is_step = step == "best" or checkpoint_step(Path(step)) is not None
        known = {run.name: run.folder for run in self.runs()}
        folder = known.get(base) if is_step else known.get(name)
        found = folder / step if folder and is_step else folder
        if found is None or not (found / INFO).exists() or found.is_symlink():
            raise UserError(f"There is no finished run '{name[:80]}' of yours: choose one from the list.")
        return found

    def new_run(self, name: str) -> Path:
        """A folder for a run of this name; a number is added where it is taken."""
        name = name.strip() or "my subject"
        if not NAME.fullmatch(name) or name in ("visitors", "generated") or name.endswith("."):
            raise UserError("The name may have letters, digits, spaces, dots and dashes, 60 of them at most.")
        stem, folder, number = name.replace(" ", "-"), self.folder / name.replace(" ", "-"), 2
        while folder.exists():
            folder, number = self.folder / f"{stem}-{number}", number + 1
        return folder

    def keep_images(self, paths: Sequence[str], folder: Path) -> list[Path]:
        """Copies uploads into a folder, as PNG files under names of our own; UserError for what is no image
        or too large."""
        if len(paths) > self.limits.uploads:
            raise UserError(f"{len(paths)} images are too many: {self.limits.uploads} at most.")
        images = [opened(path) for path in paths]
        folder.mkdir(parents=True, exist_ok=True)
        kept = [folder / f"{i:02d}.png" for i in range(len(images))]
        for image, path in zip(images, kept, strict=True):
            save_image(image, path)
        return kept


def files_in(gallery: Sequence | None) -> list[str]:
    """The files of a gallery's value, whose entries are files or (file, caption)."""
    return [entry[0] if isinstance(entry, tuple | list) else entry for entry in gallery or []]


def opened(path: str) -> Image.Image:
    """An uploaded image, upright; UserError for a file that is none, or too large."""
    file = Path(path)
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"An image is larger than {MOST_BYTES >> 20} MB: make it smaller first.")
    try:
        return read_image(file, MOST_PIXELS)
    except TooLarge:
        raise UserError(
            f"An image has more than {MOST_PIXELS // 10**6} million pixels: make it smaller first."
        ) from None
    except Exception as error:  # PIL's decoders raise all kinds
        raise UserError("A file is no image that can be read: upload PNG, JPEG or WebP.") from error


class Visitors:
    """The visitors of a page."""

    def __init__(
        self, work: Path, shared: bool, hours: float = 24.0, busy: Callable[[str], bool] | None = None
    ):
        self.work, self.shared, self.hours = work.resolve(), shared, hours
        self.busy = busy or (lambda visitor: False)
        self.work.mkdir(parents=True, exist_ok=True)

    def of(self, request: Any) -> Visitor:
        """Who sent a request of the page or the API."""
        if not self.shared:
            return Visitor("owner", self.work, True)
        name = self._name(request)
        folder = self.work / "visitors" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".seen").touch()
        return Visitor(name, folder, False)

    def _name(self, request: Any) -> str:
        """A folder's name from the user's name, the cookie or the header; never the text itself, unless it is
        a token of ours."""
        user = getattr(request, "username", None)
        if user:
            return hashlib.sha256(f"user {user}".encode()).hexdigest()[:32]
        for token in (request.headers.get(HEADER), request.cookies.get(COOKIE)):
            if token and TOKEN.fullmatch(token):
                return hashlib.sha256(f"token {token}".encode()).hexdigest()[:32]
        session = getattr(request, "session_hash", None) or secrets.token_hex(16)
        return hashlib.sha256(f"session {session}".encode()).hexdigest()[:32]

    def sweep(self) -> None:
        """Deletes the folders that were not used for `hours`, unless a run in them is at work or waits."""
        for folder in (self.work / "visitors").glob("*"):
            seen = folder / ".seen"
            if not (TOKEN.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()):
                continue
            age = time.time() - (seen if seen.exists() else folder).stat().st_mtime
            if (
                age > self.hours * 3600
                and not self.busy(folder.name)
                and not any(map(is_written, folder.glob("*")))
            ):
                shutil.rmtree(folder, ignore_errors=True)


class CookieMiddleware:
    """Gives a browser that comes for the first time a random token, which names its folder."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers") or [])
        known = COOKIE.encode() in headers.get(b"cookie", b"")

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start" and not known and scope.get("path") == "/":
                cookie = (
                    f"{COOKIE}={secrets.token_hex(16)}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
                )
                message.setdefault("headers", []).append((b"set-cookie", cookie.encode()))
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)
