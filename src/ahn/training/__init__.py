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
    "AHNTrainer": "trainer",
    "Cut": "data",
    "DataError": "sources",
    "Distiller": "distiller",
    "LossOutput": "losses",
    "Outcome": "run",
    "Piece": "batches",
    "PieceStream": "batches",
    "Pieces": "batches",
    "Span": "draws",
    "SpanDraw": "draws",
    "TrainSettings": "settings",
    "collate": "batches",
    "distillation_loss": "losses",
    "load_pieces": "data",
    "set_initial_decay": "start",
    "stream_pieces": "data",
    "train": "run",
    "transfer_loss": "transfer",
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
    if name not in _PLACES:
        raise AttributeError(f"module 'ahn.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ahn.training.{_PLACES[name]}"), name)
