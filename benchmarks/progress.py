"""Signs of life: a bar on an interactive terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console

from .store import Store


class Progress:
    """Tells what is going on.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._done = self._total = 0

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def watch(self, store: Store, total: int) -> Iterator[None]:
        """Follow the runs that appear in a folder, whichever process writes them."""
        self._done, self._total = 0, total
        if not self.console.is_terminal:
            yield
            return
        columns = (
            rich_progress.TextColumn("[progress.description]{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        before, stop = len(store.read().runs), threading.Event()
        with rich_progress.Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("starting workers", total=total)

            def poll() -> None:
                while not stop.wait(0.5):
                    done = len(store.read().runs) - before
                    bar.update(task, completed=done, description="training" if done else "starting workers")

            thread = threading.Thread(target=poll, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def finished(self, suite: str, seed: int, runs: int) -> None:
        """A seed is done."""
        self._done += runs
        if not self.console.is_terminal:
            self.say(f"{suite}: seed {seed}: {runs} done ({self._done} of {self._total})")
