"""Makes the weights of anchor scores: which tokens will be needed once they have left the window?"""

from ahn.training.anchor_settings import AnchorSettings
from ahn.training.anchors.run import AnchorReport, check_anchor_settings, train_anchors

__all__ = ["AnchorReport", "AnchorSettings", "check_anchor_settings", "train_anchors"]
