"""Progress on standard error, for whatever takes more than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 2.0


class Bar:
    """A progress bar that shows itself once two seconds have passed, on a terminal only."""

    def __init__(self, title: str) -> None:
        self.title, self.started = title, time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` pieces are finished."""
        if self.bar is None and time.monotonic() - self.started > PATIENCE_S:
            self._start(total)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)

    def _start(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task(self.title, total=total)
        self.bar.start()


class Status:
    """A line that says what goes on: a spinner on a terminal, plain lines elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.spinner: Any = None
        self.timer = threading.Timer(PATIENCE_S, self._start)
        self.timer.daemon = True
        self.lock = threading.Lock()
        self.closed = False

    def __enter__(self) -> Self:
        self.timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.timer.cancel()
        with self.lock:
            self.closed = True
            if self.spinner is not None:
                self.spinner.stop()

    def say(self, text: str) -> None:
        """Say what goes on now."""
        self.title = text
        with self.lock:
            if self.spinner is not None:
                self.spinner.update(f"{text} ...")
        if not sys.stderr.isatty():
            print(f"meshwise: {text} ...", file=sys.stderr, flush=True)

    def _start(self) -> None:
        from rich.console import Console

        with self.lock:
            if not self.closed and sys.stderr.isatty():
                self.spinner = Console(stderr=True).status(f"{self.title} ...")
                self.spinner.start()
