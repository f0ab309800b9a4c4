"""Processes that run a function together, as the ranks of one gloo group.

They are started once and kept, since starting them takes longer than most tests: ``run_on_ranks(body, *arguments)``. A
rank that fails or hangs ends them all, and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import datetime
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.multiprocessing

__all__ = ["needs_fully_shard", "run_on_launched_ranks", "run_on_ranks", "start_group"]

needs_fully_shard = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"),
    reason="torch before 2.6 has no torch.distributed.fsdp.fully_shard",
)

_LIMIT = 120.0  # seconds, for one body
_PATIENCE = 5.0  # seconds, for the other ranks once one has raised
_pools: dict[int, _Pool] = {}


def run_on_ranks(body: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """Call ``body(*arguments)`` in every rank and return what the ranks return, in order.

    Args:
        body: A function of a module; every rank calls it with a default stream seeded with 0.
        *arguments: Arguments that can be pickled.
        ranks: How many processes.

    Raises:
        AssertionError: If a rank raises, with its traceback, or takes too long.
    """
    if ranks not in _pools:
        _pools[ranks] = _Pool(ranks)
    try:
        return _pools[ranks].run(body, arguments)
    except BaseException:
        _pools.pop(ranks).end()
        raise


def run_on_launched_ranks(body: Callable[[int, Path], None], folder: Path, ranks: int = 2) -> None:
    """Call ``body(rank, folder)`` in new processes, as torchrun starts them: their framework makes the group.

    Args:
        body: A function of a module; it hands back what it has to say in files.
        folder: For those.
        ranks: How many processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_launched, (body, folder, ranks, port), nprocs=ranks, start_method="spawn")


def _launched(rank: int, body: Callable[[int, Path], None], folder: Path, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    body(rank, folder)


def start_group(rank: int, ranks: int, meeting_point: str, timeout: float = 60) -> None:
    """Join the gloo group of ``ranks`` processes that meet at a file.

    Args:
        rank: Which of them this process is.
        ranks: How many there are.
        meeting_point: A file that does not exist yet.
        timeout: Seconds after which an operation that waits for another rank raises.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=Path(meeting_point).absolute().as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )


class _Pool:
    def __init__(self, ranks: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = torch.multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, ranks, f"{self._folder.name}/meeting", theirs), daemon=True
            )
            process.start()
            self._connections.append(ours)
            self._processes.append(process)
        atexit.register(self.end)

    def run(self, body: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        deadline = time.monotonic() + _LIMIT
        for connection in self._connections:
            connection.send((body, arguments))
        outcomes = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                outcomes.append((f"rank {rank} gave no answer", None))
                continue
            error, answer = connection.recv()
            if error is not None:
                deadline = min(deadline, time.monotonic() + _PATIENCE)  # the others may wait for this rank forever
            outcomes.append((error and f"rank {rank} raised\n{error}", answer))
        errors = [error for error, _ in outcomes if error is not None]
        if errors:
            raise AssertionError("\n".join(errors))
        return [pickle.loads(answer) for _, answer in outcomes]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()
        atexit.unregister(self.end)


def _work(rank: int, ranks: int, meeting_point: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    start_group(rank, ranks, meeting_point)
    while True:
        try:
            body, arguments = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            # Pickled here, a tensor travels by value and not as memory shared with a process that may be gone.
            connection.send((None, pickle.dumps(body(*arguments))))
        except BaseException:
            connection.send((traceback.format_exc(), None))
