"""What training shows on standard error while it runs: live bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from polytask.training import Event


ROOM = 12  # jobs up to which each has its line from the start


class Progress:
    """One line for each job; where there are many, for each that runs. Give it to training as `on_event`.

    Loss and score are those of the last evaluation on the validation split, and the best.
    """

    def __init__(self, jobs: Sequence[str], *, quiet: bool = False) -> None:
        self.jobs = jobs
        self.quiet = quiet
        self._live: Any = None
        self._best: dict[int, float] = {}
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Live

            self._live = Live(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[says]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            for name in jobs:
                self._live.add_task(name, total=None, says="as it is", visible=len(jobs) <= ROOM)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line between the bars."""
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False, style="dim")
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def __call__(self, event: Event) -> None:
        if self.quiet:
            return
        name, metric = self.jobs[event.job], event.metric
        before = "as it is" if metric == "p(token)" else "frozen features"
        if event.kind in ("probe", "score"):
            self._best[event.job] = max(event.score, self._best.get(event.job, -1.0))
        if self._live is None:
            if event.kind == "probe":
                self.say(f"{name}: {before}, {metric} {event.score:.3f} on validation, {event.seconds:.1f} s")
            elif event.kind == "score":
                self.say(
                    f"{name}: epoch {event.epoch:g}, step {event.step}/{event.steps}, loss {event.loss:.3f}, "
                    f"{metric} {event.score:.3f} on validation, {event.seconds:.1f} s"
                )
            return
        best = self._best.get(event.job, 0.0)
        self._live.update(event.job, visible=True)
        if event.kind == "probe":
            self._live.update(event.job, says=f"{before} {metric} {event.score:.3f}")
        elif event.kind == "done":
            self._live.update(event.job, completed=event.steps, total=event.steps, says=f"done, {metric} {best:.3f}")
        else:
            says = f"epoch {event.epoch:4.1f}  loss {event.loss:.3f}  {metric} {best:.3f}"
            self._live.update(event.job, completed=event.step, total=event.steps, says=says)

    def finish(self, job: int) -> None:
        """A job that has no steps (frozen features alone) is done too."""
        if self._live is not None:
            self._live.update(job, completed=1, total=1, visible=len(self.jobs) <= ROOM)
