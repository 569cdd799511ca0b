"""When the rounds of another platform were over, as its app writes it into a file: a line of Unix seconds for each."""

from pathlib import Path


def stamps_of(path: Path) -> list[float]:
    """What is there so far. A line that is being written is not."""
    return [float(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def seconds_of(stamps: list[float]) -> float:
    """Seconds of a round. The first line stands for the start of the first round, which warms up and is left out."""
    _, first, *_, last = stamps
    return (last - first) / (len(stamps) - 2)
