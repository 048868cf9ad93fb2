"""Names and values that no text holds, drawn at random: what a needle says, and what it might have said instead."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Collection

_ADJECTIVES = """
amber ancient azure bitter bold brass brave bright broad bronze calm clever cold copper crimson crooked dark deep
distant dusty eager early faint famous fierce frozen gentle giant gilded golden green happy hidden hollow honest
hungry icy idle ivory jolly kind late lazy lively lonely loud lucky mellow merry misty modest narrow noble northern
old pale patient plain proud purple quick quiet rapid royal rusty salty scarlet secret shiny silent silver sleepy slow
smooth solid southern steady stormy sunny swift tall tender tiny velvet
"""
_NOUNS = """
anchor apple arrow badger barrel basket beacon bell bottle bridge bucket button candle canyon castle cellar cherry
clock cloud comet cradle crown daisy desert diamond dolphin dragon drum eagle ember falcon feather ferry fiddle forest
fountain fox garden glacier goblet guitar hammer harbour harvest hazel heron island ivy jacket kettle ladder lantern
lemon lion lobster maple marble meadow mirror monkey mountain needle oak ocean orchard otter oyster paddle parrot
pebble pepper piano pigeon pillow planet quarry rabbit raven river rocket saddle sailor spider temple thunder tiger
tower valley violin
"""
_FIRST, _SECOND = _ADJECTIVES.split(), _NOUNS.split()
_TRIES = 30
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def name(rng: random.Random) -> str:
    """Two words, such as "quiet-harbour": one of some 7,000."""
    return f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"


def number(rng: random.Random) -> str:
    """Seven digits, the first of them not zero."""
    return str(rng.randrange(10**6, 10**7))


def identifier(rng: random.Random) -> str:
    """A random UUID, 36 characters."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def variable(rng: random.Random) -> str:
    """Name of a variable: five capital letters."""
    return "".join(rng.choices(_LETTERS, k=5))


def new(rng: random.Random, draw: Callable[[random.Random], str], count: int, taken: Collection[str] = ()) -> list[str]:
    """Values that differ from one another and from others.

    Args:
        rng: Source of the random numbers.
        draw: A function of this module.
        count: How many.
        taken: What must not come again.
    """
    values: list[str] = []
    seen = set(taken)
    while len(values) < count:
        value = next((value for value in (draw(rng) for _ in range(_TRIES)) if value not in seen), None)
        if value is None:  # nearly all names are taken, so that a longer one is needed
            last = draw(rng)
            value = f"{rng.choice(_FIRST)}-{last}"
        if value not in seen:
            seen.add(value)
            values.append(value)
    return values
