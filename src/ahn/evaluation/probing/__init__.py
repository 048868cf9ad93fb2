"""What a memory has kept of a text: which evicted tokens the student still lacks, how full its state is, its gates.

`token_gradients` and `trace_state` measure on one text; `plots` draws state and gates, `shading` shows the text. All
of it needs torch.
"""

from ahn.evaluation.probing.gradients import Positions, TokenGradients, token_gradients
from ahn.evaluation.probing.state import StateTrace, effective_rank, trace_state

__all__ = ["Positions", "StateTrace", "TokenGradients", "effective_rank", "token_gradients", "trace_state"]
