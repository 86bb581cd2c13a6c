"""Ranks that go on when a node dies: each node's task is a supervisor, and its ranks are processes.

The first node's supervisor leads. When a rank or a node is gone, it has all supervisors end their ranks and start new
ones, on as many of the nodes that are left as the work allows; the others wait as spares. What the new ranks need is on
disk. A job whose first node dies is queued again as a whole: that node ran its script.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import SubprocessError
from tempfile import TemporaryDirectory
from typing import Any

from common import elastic_rank
from common.command import STOP_SIGNALS, say
from common.errors import Interrupted, UserError
from common.loading import dump_recipe
from common.ranks import rank_and_world_size
from common.recipe import Recipe
from slurm import controller
from slurm.cluster import free_port

BEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0  # without a beat: the machine is gone, or its network
JOIN_SECONDS = 60.0  # for the supervisors to connect, after their rendezvous
SETTLE_SECONDS = 3.0  # after a loss: to hear what else is lost, or why
MOST_DEATHS = 3  # of ranks whose nodes are all there; then something is wrong that does not go away

FIRST_NODE_GONE = "the first node is gone: queued again, from the last checkpoint"

Outcome = dict[str, str]  # of a rank, and of all: empty, or one of "error", "interrupted", "failed" and a message


def supervise(recipe: Recipe, *, call: Mapping[str, Any], processes: int, node_counts: Sequence[int]) -> None:
    """The work of one node, `processes` ranks of it, in processes of their own.

    Args:
        call: module, function and arguments of `function(recipe, **arguments)`, which each rank calls.
        node_counts: numbers of nodes that may share the work, 1 among them.

    Raises UserError and Interrupted as a rank did, Interrupted too where the first node is gone, and RuntimeError where
    a rank failed otherwise.
    """
    node, nodes = rank_and_world_size()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    work = json.dumps({"recipe": dump_recipe(recipe), **call})
    leader = _Leader(nodes, processes, node_counts) if node == 0 else None
    with TemporaryDirectory(prefix="fpdm-ranks-") as folder, _handlers_restored():
        outcome = asyncio.run(_supervise(_Ranks(work, processes, address, Path(folder)), node, address, port, leader))
    if outcome.get("interrupted") == FIRST_NODE_GONE:  # SLURM keeps the job, without the script that ran it
        with suppress(OSError, KeyError, SubprocessError):
            controller.requeue(os.environ["SLURM_JOB_ID"])
    for kind, error in (("error", UserError), ("interrupted", Interrupted), ("failed", RuntimeError)):
        if kind in outcome:
            raise error(outcome[kind])


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """Around an event loop that handles signals: submitit's handlers hold again after it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _supervise(ranks: "_Ranks", node: int, address: str, port: int, leader: "_Leader | None") -> Outcome:
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, ranks.ask_to_stop)
    if leader is None:
        return await _follow(ranks, node, address, port)
    interface = "127.0.0.1" if leader.nodes == 1 else None  # None: all
    async with await asyncio.start_server(leader.attend, interface, port):
        outcome, _ = await asyncio.gather(leader.lead(), _follow(ranks, node, "127.0.0.1", port))
        return outcome


async def _follow(ranks: "_Ranks", node: int, address: str, port: int) -> Outcome:
    """Does what the leader says, until it says how all ended."""
    peer = await _connected(address, port)
    peer.send({"node": node})
    try:
        while (message := await peer.receive()) is not None:
            await ranks.end()
            if "outcome" in message:
                return message["outcome"]
            ranks.start(message, peer)
        return {"interrupted": FIRST_NODE_GONE}
    finally:
        await ranks.end()
        peer.close()


async def _connected(address: str, port: int) -> "_Peer":
    async with asyncio.timeout(JOIN_SECONDS):
        while True:
            with suppress(OSError):
                return _Peer(*await asyncio.open_connection(address, port))
            await asyncio.sleep(0.2)


class _Peer:
    """The other end of a connection: messages are lines of JSON, and beats are empty lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.beating = asyncio.create_task(self._beat())

    def send(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None where the other end is gone or silent."""
        while True:
            try:
                line = await asyncio.wait_for(self.reader.readline(), SILENT_SECONDS)
                if not line.isspace():
                    return json.loads(line)
            except (OSError, TimeoutError, ValueError):  # an empty line, at the end, is no JSON
                return None

    async def _beat(self) -> None:
        while not self.writer.is_closing():
            self.writer.write(b"\n")
            await asyncio.sleep(BEAT_SECONDS)

    def close(self) -> None:
        self.beating.cancel()
        self.writer.transport.abort()  # nothing waits for a machine that is gone


@dataclass
class _Leader:
    """Knows which nodes are there, and decides who works."""

    nodes: int
    processes: int
    node_counts: Sequence[int]
    peers: dict[int, _Peer] = field(default_factory=dict)  # by node
    news: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection, until its end; all that it says is news."""
        peer = _Peer(reader, writer)
        hello = await peer.receive()
        if isinstance(hello, dict) and isinstance(node := hello.get("node"), int):  # else it is no supervisor
            self.peers[node] = peer
            self.news.put_nowait(hello)
            while (message := await peer.receive()) is not None:
                self.news.put_nowait(message)
            del self.peers[node]
            self.news.put_nowait({"lost": node})
        peer.close()

    async def lead(self) -> Outcome:
        """Until all has ended, and the others know how."""
        await self._news_until(lambda: len(self.peers) == self.nodes)
        outcome = await self._until_the_end()
        for peer in self.peers.values():
            peer.send({"outcome": outcome})
        await self._news_until(lambda: not self.peers)
        return outcome

    async def _news_until(self, holds: Callable[[], bool]) -> None:
        """Waits for supervisors to come or to leave, as long as may be."""
        with suppress(TimeoutError):
            async with asyncio.timeout(JOIN_SECONDS):
                while not holds():
                    await self.news.get()

    async def _until_the_end(self) -> Outcome:
        deaths = 0
        for attempt in itertools.count():
            used = max(count for count in self.node_counts if count <= len(self.peers))
            group = sorted(self.peers)[:used]
            outcome = await self._work(attempt, group)
            if outcome is not None:
                return outcome
            deaths += set(group) <= self.peers.keys()
            if deaths > MOST_DEATHS:
                return {"failed": f"ranks died {deaths} times without a word, on nodes that are all there"}
        raise AssertionError

    async def _work(self, attempt: int, group: Sequence[int]) -> Outcome | None:
        """One group of ranks, to its end; None where some of it is lost."""
        world_size = len(group) * self.processes
        if attempt:
            left = f"{len(self.peers)} of {self.nodes} nodes are left"
            say(f"{left}; on {len(group)} of them the work goes on from the last checkpoint")
        start = {"attempt": attempt, "world_size": world_size, "port": free_port()}
        for node, peer in self.peers.items():
            peer.send({**start, "first": group.index(node) * self.processes if node in group else None})
        finished = 0
        while finished < world_size:
            message = await self.news.get()
            if message.get("attempt") == attempt and message["outcome"] is not None:
                if message["outcome"]:
                    return message["outcome"]
                finished += 1
            elif message.get("attempt") == attempt or message.get("lost") in group:
                return await self._why(attempt)
        return {}

    async def _why(self, attempt: int) -> Outcome | None:
        """What a rank said of its end: those that only lost it may have been heard before."""
        await asyncio.sleep(SETTLE_SECONDS)
        while not self.news.empty():
            message = self.news.get_nowait()
            if message.get("attempt") == attempt and message["outcome"]:
                return message["outcome"]
        return None


@dataclass
class _Ranks:
    """The ranks of this node."""

    work: str
    processes: int
    address: str
    folder: Path  # for their outcomes
    running: list[asyncio.Task[None]] = field(default_factory=list)
    alive: list[asyncio.subprocess.Process] = field(default_factory=list)
    asked_to_stop: bool = False

    def start(self, message: Mapping[str, Any], peer: _Peer) -> None:
        first = message["first"]
        if first is not None:  # else this node is a spare
            for local_rank in range(self.processes):
                self.running.append(asyncio.create_task(self._run(first + local_rank, local_rank, message, peer)))

    async def _run(self, rank: int, local_rank: int, message: Mapping[str, Any], peer: _Peer) -> None:
        attempt = message["attempt"]
        place = {"RANK": rank, "WORLD_SIZE": message["world_size"], "LOCAL_RANK": local_rank,
                 "LOCAL_WORLD_SIZE": self.processes, "MASTER_ADDR": self.address, "MASTER_PORT": message["port"],
                 elastic_rank.OUTCOME: self.folder / f"{attempt}-{rank}.json"}  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", elastic_rank.__name__),
            stdin=asyncio.subprocess.PIPE,
            env=os.environ | {name: str(value) for name, value in place.items()},
            start_new_session=True,  # a signal to this process's group reaches them through it alone
            preexec_fn=_wait_for_handlers,
        )
        self.alive.append(process)
        assert process.stdin is not None
        process.stdin.write(self.work.encode() + b"\n")
        if self.asked_to_stop:
            process.terminate()
        await process.wait()
        path = place[elastic_rank.OUTCOME]
        assert isinstance(path, Path)
        peer.send({"attempt": attempt, "outcome": json.loads(path.read_text()) if path.exists() else None})

    def ask_to_stop(self) -> None:
        self.asked_to_stop = True
        for process in self.alive:
            with suppress(ProcessLookupError):
                process.terminate()

    async def end(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        for process in self.alive:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self.running, self.alive = [], []


def _wait_for_handlers() -> None:
    """In a new process: stop signals wait until training handles them (`pipeline.training.signals`)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
