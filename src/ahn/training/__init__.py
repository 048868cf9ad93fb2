"""Self-distillation: a model teaches its own memories what full attention would have read.

`train` runs a whole training from settings; `AHNTrainer` is a `transformers.Trainer` for those who have their own
data and arguments; `distillation_loss` and `transfer_loss` are the objectives alone.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ahn.training.batches import Piece, Pieces, PieceStream, collate
    from ahn.training.data import Cut, load_pieces, stream_pieces
    from ahn.training.distiller import Distiller
    from ahn.training.initialization import set_initial_decay
    from ahn.training.losses import LossOutput, distillation_loss
    from ahn.training.run import Outcome, train
    from ahn.training.sampling import Span, SpanDraw
    from ahn.training.settings import TrainSettings
    from ahn.training.sources import DataError
    from ahn.training.trainer import AHNTrainer
    from ahn.training.transfer import transfer_loss

_PLACES = {
    "batches": ("Piece", "PieceStream", "Pieces", "collate"),
    "data": ("Cut", "load_pieces", "stream_pieces"),
    "distiller": ("Distiller",),
    "initialization": ("set_initial_decay",),
    "losses": ("LossOutput", "distillation_loss"),
    "run": ("Outcome", "train"),
    "sampling": ("Span", "SpanDraw"),
    "settings": ("TrainSettings",),
    "sources": ("DataError",),
    "trainer": ("AHNTrainer",),
    "transfer": ("transfer_loss",),
}

__all__ = [
    "AHNTrainer",
    "Cut",
    "DataError",
    "Distiller",
    "LossOutput",
    "Outcome",
    "Piece",
    "PieceStream",
    "Pieces",
    "Span",
    "SpanDraw",
    "TrainSettings",
    "collate",
    "distillation_loss",
    "load_pieces",
    "set_initial_decay",
    "stream_pieces",
    "train",
    "transfer_loss",
]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: the Trainer alone takes seconds."""
    for file, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"ahn.training.{file}"), name)
    raise AttributeError(f"module 'ahn.training' has no attribute {name!r}")
