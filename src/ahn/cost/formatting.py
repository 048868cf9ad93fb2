"""Numbers for people: rounded exactly, in a unit that suits them."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

_BYTES = {3: "kB", 6: "MB", 9: "GB", 12: "TB", 15: "PB"}


def fixed(value: Fraction | int, digits: int) -> str:
    """A number with this many decimals, halves rounded up.

    The paper prints 25.95 % as 26.0 and 25.85 % as 25.9; binary floats would round both down.

    Args:
        value: The number, at least 0.
        digits: Decimals.
    """
    scaled = math.floor(Fraction(value) * 10**digits + Fraction(1, 2))
    return f"{Decimal(scaled).scaleb(-digits):,f}"


def percent(part: int, whole: int, digits: int = 1) -> str:
    """A share: "59.4 %"."""
    return f"{fixed(Fraction(100 * part, whole), digits)} %"


def thousands(value: int) -> int:
    """The power of ten, a multiple of 3, in which a number is written with one to three digits before the point."""
    return 3 * ((len(str(value)) - 1) // 3)


def scaled(value: int, power: int) -> str:
    """A number in a unit of 10^power, with two decimals."""
    return fixed(Fraction(value, 10**power), 2)


def byte_unit(power: int) -> str:
    """The name of 10^power bytes: "GB"."""
    return _BYTES.get(power, "B")
