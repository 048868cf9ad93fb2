"""What a kernel is to read or write is checked before it takes any address."""

from __future__ import annotations

from torch import Tensor

from ahn.errors import ShapeError


def check_shapes(*due: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Checks the shapes of tensors.

    Args:
        *due: Each tensor with the shape that it must have; `None` is passed over.

    Raises:
        ShapeError: One has another shape.
    """
    for tensor, shape in due:
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"a kernel takes a tensor of shape {list(shape)}, but it was given {list(tensor.shape)}")


def check_groups(heads: int, groups: int) -> None:
    """Checks that query heads share key/value heads evenly.

    Raises:
        ShapeError: They do not.
    """
    if groups == 0 or heads % groups:
        raise ShapeError(f"{heads} query heads do not share {groups} key/value heads evenly")
