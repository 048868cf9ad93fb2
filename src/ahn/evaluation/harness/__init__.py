"""lm-evaluation-harness asks a model with a memory: importing this package registers the model class `ahn`.

It needs lm-evaluation-harness, of the extra `eval`. `python -m ahn.evaluation.harness` is its command line with the
class registered, for example `--model ahn --model_args base=smollm2-135m,mode=ahn --tasks niah_single_1`.
"""

from ahn.evaluation.libraries import library

# With it the harness registers its own classes, which it does by itself only as long as there is no other.
library("lm_eval.models", "a task of lm-evaluation-harness")

from ahn.evaluation.harness.model import HarnessModel  # noqa: E402 (the line above says what is missing)

__all__ = ["HarnessModel"]
