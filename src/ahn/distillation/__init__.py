"""What teacher and student are compared by: which positions count, their logits, and the losses on them.

Training lowers these losses; evaluation asks what they still hang on.
"""

from ahn.distillation.head import Head
from ahn.distillation.targets import IGNORED, CePairs, Targets, find_targets
from ahn.distillation.vocabulary import vocabulary_losses

__all__ = ["IGNORED", "CePairs", "Head", "Targets", "find_targets", "vocabulary_losses"]
