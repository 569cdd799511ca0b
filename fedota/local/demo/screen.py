"""What the terminal shows while the demo plays: what is done stays, what goes on moves in the last line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedota.events.rounds import RoundUpdated
from fedota.local.demo.example import Scores

_COUNTED: Final = {"selection": "waiting", "configuration": "selected"}
_ENDS: Final = ("completed", "abandoned")
_COLUMNS: Final = "  {round:>5}  {stage:<13} {reported:>8}  {examples:>8}  {metrics:<26}  {seconds:>6}"


class Screen:
    """Prints to `console`; a terminal also gets a line that moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._stage = ""
        self._rounds = 0

    def title(self, text: str) -> None:
        """What this is about."""
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def chapter(self, text: str) -> None:
        """What comes next."""
        self._console.print()
        self._console.print(Text(text, style="bold cyan"))

    def done(self, what: str, detail: str = "") -> None:
        """Something that is so from now on."""
        self._console.print(Text.assemble(("  ✓ ", "green"), f"{what:<14} ", (detail, "dim")), soft_wrap=True)

    def note(self, text: str) -> None:
        """Something to know."""
        self._console.print(Text(f"  {text}", style="yellow"), soft_wrap=True)

    @contextmanager
    def following(self, rounds: int) -> Iterator[None]:
        """Rounds are shown inside."""
        self._rounds = rounds
        head = _COLUMNS.format(
            round="round", stage="stage", reported="reported", examples="patients", metrics="metrics", seconds="time"
        )
        self._console.print(Text(head, style="dim"), soft_wrap=True)
        with Live(console=self._console, transient=True, refresh_per_second=12) as self._live:
            yield
        self._live = None

    def round(self, update: RoundUpdated) -> None:
        """A change of a round."""
        if update.stage in _ENDS:
            self._console.print(
                Text(_row(update), style="" if update.stage == "completed" else "yellow"), soft_wrap=True
            )
            if update.stage == "abandoned":
                self.note(update.reason)
        if self._live:
            self._live.update(self._moving(update))
        if not self._console.is_terminal and update.stage not in _ENDS and self._stage != update.stage:
            self._console.print(f"  {update.round:>5}  {update.stage:<13} {update.reason}", soft_wrap=True)
        self._stage = update.stage

    def _moving(self, update: RoundUpdated) -> RenderableType:
        counted = _COUNTED.get(update.stage, "reported")
        count: int = getattr(update, counted)
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=update.goal_count, completed=min(count, update.goal_count), width=20)
        words = f"{count} of {update.goal_count} {counted}"
        grid.add_row(Text(f"  round {update.round} of {self._rounds}"), Text(update.stage, style="cyan"), bar, words)
        return Group(grid, Text(f"  {update.reason}", style="dim"))

    def scores(self, scores: Scores, held_out: int) -> None:
        """Each hospital alone, federated, pooled."""
        table = Table(title=f"Accuracy on {held_out} held-out patients", title_justify="left")
        table.add_column("trained on")
        table.add_column("accuracy", justify="right")
        for name, accuracy in scores.alone.items():
            table.add_row(f"{name} alone", f"{accuracy:.1%}")
        table.add_section()
        table.add_row("federated: all three, data stays", f"{scores.federated:.1%}", style="bold green")
        table.add_row("pooled: all data in one place", f"{scores.pooled:.1%}", style="dim")
        self._console.print()
        self._console.print(table)


def _row(update: RoundUpdated) -> str:
    attempt = f"/{update.attempt}" if update.attempt > 1 else ""
    return _COLUMNS.format(
        round=f"{update.round}{attempt}",
        stage=update.stage,
        reported=f"{update.reported} of {update.goal_count}",
        examples=update.examples,
        metrics="  ".join(f"{name} {value:.3f}" for name, value in sorted(update.metrics.items(), reverse=True)),
        seconds=f"{update.seconds:.2f} s",
    )
