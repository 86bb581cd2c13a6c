"""The training loop's own numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.training.throughput import Interval

WINDOW = 100  # losses of the last updates, which a loss spike is compared with


@dataclass(frozen=True)
class TrainState:
    """Everything that training resumes from, beside the recipe and a checkpoint's tensors.

    A new one replaces it at each step, so that a checkpoint can be written while training goes on.

    samples_seen: over all ranks.
    seconds: that training took before the last step began, as rank 0 measured them.
    updates: of the optimizer.
    skipped: consecutive steps, up to now, whose loss or gradient was not finite.
    interval: sums since the last log line.
    recent_losses: of at most WINDOW updates, without loss spikes; the newest comes last.
    scaler: `pipeline.training.engine.scaler_state`, set when a checkpoint is saved.
    """

    samples_seen: int = 0
    seconds: float = 0.0
    updates: int = 0
    skipped: int = 0
    interval: Interval = field(default_factory=Interval)
    recent_losses: tuple[float, ...] = ()
    scaler: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, samples_seen: int, progress: Any) -> "TrainState":
        """The inverse of `to_json`; `progress` has the form `checkpoint_form.ProgressForm`."""
        sums, losses = progress["interval"], tuple(progress["recent_losses"])
        quartiles = {name: tuple(sums[name]) for name in ("quartile_losses", "quartile_counts")}
        interval = Interval(**{**sums, **quartiles})
        rest = {name: progress[name] for name in ("updates", "skipped", "scaler")}
        seconds = progress.get("seconds", 0.0)  # younger than the form
        return cls(samples_seen, seconds, interval=interval, recent_losses=losses, **rest)

    def to_json(self) -> dict[str, Any]:
        """All but `samples_seen`, which a checkpoint holds beside it."""
        values = asdict(self)
        del values["samples_seen"]
        return values

    def updated(self, sums: Sequence[float], batch_size: int, *, spike: bool) -> "TrainState":
        """After an update; `sums` over all ranks: those of `StepResult`."""
        return replace(
            self,
            samples_seen=self.samples_seen + batch_size,
            updates=self.updates + 1,
            skipped=0,
            interval=self.interval.plus(sums, batch_size),
            recent_losses=self.recent_losses if spike else (*self.recent_losses, sums[0] / batch_size)[-WINDOW:],
        )

    def passed_over(self, batch_size: int, *, scaling: bool) -> "TrainState":
        """After a step that updated nothing; `scaling`: because the fp16 loss scaler looks for its scale."""
        return replace(
            self,
            samples_seen=self.samples_seen + batch_size,
            skipped=self.skipped + (0 if scaling else 1),
            interval=replace(self.interval, skipped=self.interval.skipped + 1),
        )
