"""How teacher and student are compared: the positions that count, their logits, and the losses on them.

Training lowers these losses. Evaluation asks which tokens they still depend on.
"""

from ahn.distillation.head import Head
from ahn.distillation.targets import IGNORED, CePairs, Targets, find_targets
from ahn.distillation.vocabulary import vocabulary_losses

__all__ = ["IGNORED", "CePairs", "Head", "Targets", "find_targets", "vocabulary_losses"]
