"""Faults that tests plant in a training process before it begins."""

import errno
import functools
import json
import os
import resource
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def nan_in_sample(index: int) -> None:
    """Sample `index` of the data set comes with a NaN in its latents."""
    from pipeline.training.data import Batch, Stream

    read = Stream.batch

    def changed(self: Stream, positions: "Tensor") -> Batch:
        batch = read(self, positions)
        batch.latents[self.order.indices(positions) == index, 0, 0, 0] = float("nan")
        return batch

    Stream.batch = changed  # type: ignore[method-assign]


def loss_spike_at(samples_seen: int) -> None:
    """The latents of the step that starts there are a hundred times too large."""
    from pipeline.training.data import Batch, Stream

    read = Stream.batch

    def changed(self: Stream, positions: "Tensor") -> Batch:
        batch = read(self, positions)
        batch.latents[positions // self.recipe.train.batch_size == samples_seen // self.recipe.train.batch_size] *= 100
        return batch

    Stream.batch = changed  # type: ignore[method-assign]


def disk_full_at_save(number: int) -> None:
    """From the run's `number`th checkpoint on, no file of this process may grow beyond 64 KiB: the kernel refuses."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))

    _at_call("pipeline.training.checkpoint", "write", number, limit)


def disk_full_at_log_line(number: int) -> None:
    """The disk does not take the `number`th line of `metrics.jsonl` and `events.jsonl`."""

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_call("pipeline.training.log", "append_line", number, fail)


def killed_at_sync(number: int) -> None:
    """kill -9 when rank 0 syncs what it wrote for the `number`th time: before, inside or after a save."""
    if os.environ["RANK"] == "0":
        _at_call("common.files", "sync", number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_at_byte(save: int, size: int) -> None:
    """Rank 0 is killed by the kernel inside the write of its `save`th checkpoint that makes a file larger than `size`.

    The file keeps what was written until then, as after a kill -9.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and raises an OSError
        _at_call("pipeline.training.checkpoint", "write", save, limit)


def recording(path: Path) -> None:
    """Writes a line for each sample of each batch: its position, its id, and a checksum of its tensors."""
    from pipeline.training.data import Batch, Stream

    read = Stream.batch

    def changed(self: Stream, positions: "Tensor") -> Batch:
        batch = read(self, positions)
        ids = self.order.indices(positions).tolist()
        with open(f"{path}.{os.environ['RANK']}", "a") as lines:
            for number, position in enumerate(positions.tolist()):
                drawn = b"".join(tensor[number].numpy().tobytes() for tensor in vars(batch).values())
                lines.write(json.dumps([position, ids[number], zlib.crc32(drawn)]) + "\n")
        return batch

    Stream.batch = changed  # type: ignore[method-assign]


def an_older_listing() -> None:
    """Rank 1 does not see the newest checkpoint yet, as can happen on a network file system."""
    from pipeline.training import checkpoint

    listed = checkpoint.complete_checkpoints
    if os.environ["RANK"] == "1":
        checkpoint.complete_checkpoints = lambda recipe: listed(recipe)[:-1]


def fp16_on_a_cpu() -> None:
    """Allows fp16 on CPUs, which training, and DeepSpeed on most CPUs, refuse."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from pipeline.training import deepspeed_config, trainer

    allowed = functools.partial(deepspeed_config.deepspeed_config, on_gpu=True)
    deepspeed_config.deepspeed_config = trainer.deepspeed_config = allowed
    CPU_Accelerator.is_fp16_supported = lambda self: True  # type: ignore[method-assign]


def without_wandb() -> None:
    """The package cannot be imported, whether it is installed or not."""
    import sys

    sys.modules["wandb"] = None  # type: ignore[assignment]


def planted(fault: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    """`fault(*arguments)` as `before` of `run_ranks`."""
    return functools.partial(fault, *arguments)


def _at_call(module: str, name: str, number: int, effect: Callable[[], None]) -> None:
    """Calls `effect` just before the `number`th call of a function."""
    import importlib

    owner = importlib.import_module(module)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            effect()
        return function(*arguments, **named)

    setattr(owner, name, counted)
