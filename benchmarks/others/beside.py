"""Other platforms beside ours: the same shapes, on the same machine, one after the other in the same run."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from benchmarks.figures import Figure, Figures
from benchmarks.others import flare, flower
from benchmarks.others.environments import NotInstalledError
from benchmarks.rounds import Measured, Shape, ours_of
from benchmarks.world import World

Theirs = Callable[[Path, Shape], Awaitable[Measured]]
FLOWER: Final = (Shape(8, 40, 3), Shape(4, 4, 4))  # its rounds take long
FLARE: Final = (Shape(8, 40, 5), Shape(4, 4, 6))
_OURS: Final = 4  # rounds, at least: ours are short


async def measure_flower(world: World) -> Figures:
    """`flower.*`."""
    return await _beside(world, "flower", flower.NAME, flower.flower_of, FLOWER)


async def measure_flare(world: World) -> Figures:
    """`flare.*`."""
    return await _beside(world, "flare", flare.NAME, flare.flare_of, FLARE)


async def _beside(world: World, name: str, title: str, theirs_of: Theirs, shapes: tuple[Shape, ...]) -> Figures:
    """Theirs, with ours as the anchor; nothing where they cannot be installed, which is said."""
    figures: Figures = {}
    for shape in shapes:
        try:
            theirs = await theirs_of(world.directory, shape)
        except NotInstalledError as error:
            print(f"{title} is left out, for it cannot be installed: {error}", flush=True)
            return {}
        ours = await ours_of(world, shape._replace(rounds=max(shape.rounds, _OURS)))
        against = f"ours; this is {title}"
        figures |= {
            f"{name}.seconds.{shape}": Figure(theirs.seconds, "s", ours.seconds, against),
            f"{name}.server_mb.{shape}": Figure(theirs.megabytes, "MB", ours.megabytes, against),
        }
    return figures
