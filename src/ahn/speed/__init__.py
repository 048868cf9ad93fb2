"""Speed: the ways of reading side by side, next to what the hardware allows."""

from ahn.speed.measure import Speed, Timing, measure, read_seconds
from ahn.speed.timing import Spread

__all__ = ["Speed", "Spread", "Timing", "measure", "read_seconds"]
