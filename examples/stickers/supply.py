"""What a stage learns from, made by processes of their own, so that training never waits for it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Full

import numpy as np
import torch
import torch.multiprocessing as processes
from torch import Tensor

Piece = tuple[Tensor, ...]  # as many rows in each


def _work(queue, seed: int, start: Callable, spread) -> None:
    """Fills the queue with pieces; ends with the process that reads them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader, which ends this process
    torch.set_num_threads(1)
    os.nice(5)  # training comes first: it has earlier pieces to go on with
    make, rng = start(), np.random.default_rng(seed)
    while True:
        _offer(queue, make(rng, spread.value))


def _offer(queue, piece: Piece) -> None:
    """Puts a piece into the queue as soon as there is room; ends this process if the reader's was killed."""
    while processes.parent_process().is_alive():
        with suppress(Full):
            return queue.put(piece, timeout=5)
    os._exit(0)


class Supply:
    """The last `kept` pieces, from which batches are drawn at random; each row is shown about `shows` times.

    `start()`, called once in each worker, gives a function that makes a piece from a random generator and the
    spread of poses. `prepare` is what the reader does with a piece, on its device.
    """

    def __init__(
        self,
        start: Callable[[], Callable[[np.random.Generator, float], Piece]],
        seed: int,
        workers: int = 1,
        device: torch.device | str = "cpu",
        kept: int = 16,
        shows: int = 6,
        spread: float = 1.0,
        prepare: Callable[[Piece], Piece] | None = None,
    ):
        context = processes.get_context("spawn")
        self.queue, self.spread = context.Queue(2 * workers), context.Value("d", spread)
        self.workers = [
            context.Process(target=_work, args=(self.queue, seed * 1000 + i, start, self.spread), daemon=True)
            for i in range(workers)
        ]
        for worker in self.workers:
            worker.start()
        self.device, self.kept, self.shows, self.prepare = device, kept, shows, prepare
        self.rows: list[Tensor] = []
        self.size = self.taken = 0

    def take(self, seconds: float) -> bool:
        """Takes the next piece in place of the oldest, if one comes within so many seconds."""
        try:
            piece = tuple(rows.to(self.device) for rows in self.queue.get(timeout=seconds))
        except Empty:
            return False
        piece = self.prepare(piece) if self.prepare else piece
        if not self.rows:
            self.size = len(piece[0])
            self.rows = [rows.new_empty((self.kept * self.size, *rows.shape[1:])) for rows in piece]
        place = self.taken % self.kept * self.size
        for rows, new in zip(self.rows, piece, strict=True):
            rows[place : place + self.size] = new
        self.taken += 1
        return True

    def batches(self, size: int, stop: Callable[[], float]) -> Iterator[Piece]:
        """BucketBatches until `stop()` is 1. New pieces are taken as they come until all is full, then as old
        ones are used up."""
        used = 0
        while stop() < 1:
            while not self.taken and stop() < 1:
                self.take(1)
            if self.taken and (self.taken < self.kept or used >= self.shows * self.size) and self.take(0.001):
                used = 0
            if self.taken:
                used += size
                rows = torch.randint(min(self.taken, self.kept) * self.size, (size,), device=self.device)
                yield tuple(every[rows] for every in self.rows)

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join()
