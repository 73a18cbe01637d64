"""Training as jobs of the web page: one at a time, each a process of its own that runs the same command as
in a terminal.

A job is a file in WORK/.jobs, so that a closed page, and a page that is started again, lose nothing. It
is paused by the Ctrl-C that saves, and goes on from its last checkpoint.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from customize.errors import UserError
from customize.files import write_text
from customize.runs.folder import latest_checkpoint
from customize.runs.listing import is_written, progress_of, writer_of

FOLDER = ".jobs"
POLL = 0.2  # seconds
SAVES = "saving"  # message of a running job that was asked to stop
SAVING = 120.0  # seconds that a run may take to finish its step and save


@dataclass
class Job:
    """A training run that was asked for; its state is queued, running, done, paused, failed or
    cancelled."""

    id: str
    visitor: str
    method: str
    folder: str  # of the run
    settings: dict[str, Any]
    state: str = "queued"
    message: str = ""
    submitted: float = field(default_factory=time.time)
    resumes: bool = False  # from its last checkpoint
    started: bool = False  # at any time

    @property
    def run(self) -> Path:
        return Path(self.folder)


class Jobs:
    """The queue of a work folder. A thread starts one job after the other."""

    def __init__(self, work: Path, most_queued: int = 20):
        self.folder, self.most = work / FOLDER, most_queued
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock, self.closed = threading.RLock(), threading.Event()
        self.process: subprocess.Popen | None = None
        self.jobs = {job.id: job for job in sorted(self._read(), key=lambda job: job.submitted)}
        self.thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self.thread.start()

    def _read(self) -> list[Job]:
        """The jobs of earlier days. One that was running goes on being watched if its process still lives."""
        found = []
        for path in self.folder.glob("*.json"):
            with suppress(OSError, ValueError, TypeError):  # a file of another version
                found.append(Job(**json.loads(path.read_text(encoding="utf-8"))))
        return found

    def submit(
        self, visitor: str, method: str, folder: Path, settings: Mapping[str, Any], resumes: bool = False
    ) -> Job:
        """Adds a job to the queue, which goes on from the folder's last checkpoint if it `resumes`; UserError
        if the queue is full."""
        with self.lock:
            waiting = [job for job in self.jobs.values() if job.state == "queued"]
            if len(waiting) >= self.most:
                raise UserError(
                    f"{len(waiting)} runs are waiting already: try again when one of them is done."
                )
            job = Job(uuid.uuid4().hex[:12], visitor, method, str(folder), dict(settings), resumes=resumes)
            self.jobs[job.id] = job
            self._save(job)
        return job

    def of(self, visitor: str) -> list[Job]:
        """A visitor's jobs, the latest first."""
        with self.lock:
            return [job for job in reversed(self.jobs.values()) if job.visitor == visitor]

    def get(self, visitor: str, job_id: str) -> Job:
        """A visitor's own job; UserError for every other."""
        with self.lock:
            job = self.jobs.get(job_id)
        if job is None or job.visitor != visitor:
            raise UserError("There is no such run of yours: choose one from the list.")
        return job

    def position(self, job: Job) -> int:
        """How many jobs, of anybody, are done before this one."""
        with self.lock:
            before = [own for own in self.jobs.values() if own.state in ("queued", "running")]
        return before.index(job) if job in before else 0

    def pause(self, job: Job) -> None:
        """Takes a job out of the queue, or lets the running one save and end."""
        with self.lock:
            if job.state == "queued":
                self._end(job, "paused" if job.resumes else "cancelled")
            elif job.state == "running":
                job.message = SAVES
                _interrupt(job, self.process)

    def resume(self, job: Job) -> None:
        """Puts an ended job back into the queue; it goes on from its last checkpoint, if it has one."""
        end = time.time() + SAVING
        while job.state == "running" and job.message == SAVES and time.time() < end:
            time.sleep(POLL)  # until it has saved
        with self.lock:
            if job.state not in ("paused", "failed", "cancelled"):
                raise UserError("This run is not paused: it is in the queue, at work or done.")
            job.state, job.message, job.resumes = "queued", "", latest_checkpoint(job.run) is not None
            job.submitted = time.time()
            self.jobs[job.id] = self.jobs.pop(job.id)  # at the end of the queue
            self._save(job)

    def close(self) -> None:
        """Lets the running job save and end, as Ctrl-C does in a terminal; queued ones wait for the next
        start."""
        self.closed.set()
        for job in self.jobs.values():
            if job.state == "running":
                _interrupt(job, self.process)
        self.thread.join(SAVING)

    def _work(self) -> None:
        while not self.closed.wait(POLL):
            with self.lock:
                waiting = [job for job in self.jobs.values() if job.state in ("running", "queued")]
                job = min(waiting, key=lambda job: job.state != "running", default=None)
            if job is None:
                continue
            if job.state == "running":  # of an earlier start of the page
                self._watch(job)
            else:
                self._start(job)

    def _watch(self, job: Job) -> None:
        while is_written(job.run) and not self.closed.is_set():
            time.sleep(POLL)
        if not self.closed.is_set():
            last = progress_of(job.run)[-1:]
            done = bool(last) and last[0]["state"] == "done"
            self._end(job, "done" if done else "paused", "" if done else "the page was closed meanwhile")

    def _start(self, job: Job) -> None:
        """Runs a job to its end."""
        settings = self.folder / f"{job.id}.yaml"
        again = {"resume_from_checkpoint": "latest"} if job.resumes else {"overwrite_output_dir": job.started}
        write_text(settings, yaml.safe_dump(job.settings | {"output_dir": job.folder} | again))
        command = [sys.executable, "-m", "customize.trainers", job.method, str(settings)]
        with open(self.folder / f"{job.id}.log", "ab") as log:
            with self.lock:
                if job.state != "queued":
                    return
                options: dict[str, Any] = {"start_new_session": True} if os.name == "posix" else {}
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **options
                )
                job.state, job.message, job.started = "running", "", True
                self._save(job)
            code = self.process.wait()
        self._end(job, *self._outcome(job, code))

    def _outcome(self, job: Job, code: int) -> tuple[str, str]:
        """The state of a job whose process ended, and what its log says."""
        if code == 0:
            return "done", ""
        errors = re.findall(r"^error: (.*)$", self.log_of(job), re.MULTILINE)
        if errors and errors[-1].startswith("stopped at step"):
            return "paused", errors[-1].split(";")[0]
        if code in (130, -signal.SIGINT, -signal.SIGTERM):
            return "paused" if latest_checkpoint(job.run) else "cancelled", "stopped before it had saved"
        return "failed", errors[-1] if errors else f"it ended with code {code}; its log is in {FOLDER}"

    def log_of(self, job: Job) -> str:
        """What the process has printed."""
        try:
            return (self.folder / f"{job.id}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _end(self, job: Job, state: str, message: str = "") -> None:
        with self.lock:
            job.state, job.message, self.process = state, message, None
            self._save(job)

    def _save(self, job: Job) -> None:
        write_text(self.folder / f"{job.id}.json", json.dumps(asdict(job)))


def _interrupt(job: Job, process: subprocess.Popen | None) -> None:
    """Sends Ctrl-C to the process of a job."""
    pid = process.pid if process is not None and process.poll() is None else writer_of(job.run)
    if pid is not None:
        with suppress(OSError):
            os.kill(pid, signal.SIGINT)
