"""Which contexts a run measures, and how each is made anew from the seed and its own name."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.recall.haystack import from_text
from ahn.evaluation.recall.items import Builder, Item
from ahn.evaluation.recall.sheets import Amounts, Sheet
from ahn.evaluation.recall.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        arms: Ways to read, names of `ahn.evaluation.arms.ARMS`.
        tasks: Names of `TASKS`.
        lengths: Tokens of the prompts.
        depths: How many depths, evenly spread from the beginning of the text to its end.
        items: Contexts of each task, length and depth or number of facts.
        values: Values that the tasks with several of them ask for.
        facts: Numbers of facts that `capacity` hides.
        distractors: Wrong values that a right one is ranked among.
        seed: Of all that is drawn.
    """

    arms: tuple[str, ...] = ("full", "window", "ahn")
    tasks: tuple[str, ...] = ("number", "capacity")
    lengths: tuple[int, ...] = (1024,)
    depths: int = 5
    items: int = 2
    values: int = 4
    facts: tuple[int, ...] = (4, 8, 16, 32)
    distractors: int = 9
    seed: int = 0

    def depth(self, index: int) -> float:
        """The depth with this index, 0 to 1."""
        return index / max(1, self.depths - 1)

    @property
    def chance(self) -> float:
        """Share of values that come first among the wrong ones by chance."""
        return 1 / (1 + self.distractors)


@dataclasses.dataclass(frozen=True)
class Place:
    """One context of a run.

    Attributes:
        task: Name of its task.
        length: Tokens of its prompt.
        depth: Where its first needle is wanted, or `None` where facts are counted instead.
        facts: Number of facts, or `None`.
        number: Which of the contexts that are alike, from 0.
    """

    task: str
    length: int
    depth: float | None
    facts: int | None
    number: int

    @property
    def key(self) -> str:
        """Its name in the journal: "number/1024/depth 0.25/0"."""
        level = f"facts {self.facts}" if self.depth is None else f"depth {self.depth:.4g}"
        return f"{self.task}/{self.length}/{level}/{self.number}"


class Plan:
    """The contexts of a run.

    Args:
        settings: What to measure.
        builder: Makes items for the model.
        pieces: Sentences of the haystack.

    Raises:
        EvaluationError: A length has no room for the needles of a task, or the haystack is too short for it.

    Attributes:
        places: The contexts, in the order in which they are read.
        left_out: Lengths and numbers of facts that do not fit into them.
    """

    def __init__(self, settings: Settings, builder: Builder, pieces: Sequence[str]) -> None:
        self.settings, self.builder, self.pieces = settings, builder, pieces
        self.left_out: list[tuple[int, int]] = []
        self.places = [
            place for task in settings.tasks for length in settings.lengths for place in self._places(task, length)
        ]
        for first in {(place.task, place.length): place for place in self.places}.values():
            self.item(first)  # what cannot be made fails here, before anything is read
        for length in settings.lengths:
            if settings.tasks == ("capacity",) and all(place.length != length for place in self.places):
                raise EvaluationError(f"no number of facts fits into {length:,} tokens. Give fewer --facts.")

    def item(self, place: Place) -> Item:
        """The context of a place and its questions, the same every time."""
        rng = self._random(place)
        return self.builder.item(self._sheet(place, rng), from_text(self.pieces, rng), place.length)

    @property
    def tokens(self) -> int:
        """Tokens that all arms read together, about."""
        return sum(place.length for place in self.places) * len(self.settings.arms)

    def _places(self, task: str, length: int) -> list[Place]:
        of = self.settings
        if TASKS[task].by == "depth":
            depths = [of.depth(index) for index in range(of.depths)]
            return [Place(task, length, depth, None, number) for depth in depths for number in range(of.items)]
        places = []
        for facts in of.facts:
            alike = [Place(task, length, None, facts, number) for number in range(of.items)]
            if self.builder.fits(self._sheet(alike[0], self._random(alike[0])), length):
                places += alike
            else:
                self.left_out.append((length, facts))
        return places

    def _sheet(self, place: Place, rng: random.Random) -> Sheet:
        of = self.settings
        much = Amounts(place.depth or 0.0, of.values, of.distractors, place.facts or 0)
        return TASKS[place.task].make(rng, much)

    def _random(self, place: Place) -> random.Random:
        return random.Random(f"{self.settings.seed}/{place.key}")
