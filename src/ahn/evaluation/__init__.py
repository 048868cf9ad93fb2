"""What a model that reads with bounded memory keeps of its text.

The names below belong to the public benchmarks, in three parts, none of which needs torch:

- `metrics/`: the metrics of LV-Eval, InfiniteBench and LongBench, as pure functions of texts.
- `benchmarks/`: what each benchmark asks, as data; its records (`load_samples`); the prompts made of them
  (`build_prompt`, `read_prompts`).
- Predictions: `read_predictions` reads this library's files and the official ones, `score_predictions` and `averages`
  score them, with no model.

What a model says itself is measured elsewhere: `arms` are compared, item by item, by the one loop of `driver`, which
keeps a `journal`. `perplexity/` scores texts, `recall/` hides facts, `probing/` shows what a memory has kept. `report`,
`page`, `tables`, `drawing` and `bootstrap` serve all of them, and `differences` sets two reports beside each other.
"""

from ahn.evaluation.benchmarks import BENCHMARKS
from ahn.evaluation.benchmarks.prompts import build_prompt, read_prompts
from ahn.evaluation.benchmarks.samples import load_samples
from ahn.evaluation.benchmarks.schema import Benchmark, Sample, Target, Task
from ahn.evaluation.errors import AnswerError, EvaluationError
from ahn.evaluation.metrics import METRICS
from ahn.evaluation.predictions import Prediction, read_predictions
from ahn.evaluation.set_scores import Average, SetScore, averages, score_predictions

__all__ = [
    "BENCHMARKS",
    "METRICS",
    "AnswerError",
    "Average",
    "Benchmark",
    "EvaluationError",
    "Prediction",
    "Sample",
    "SetScore",
    "Target",
    "Task",
    "averages",
    "build_prompt",
    "load_samples",
    "read_predictions",
    "read_prompts",
    "score_predictions",
]
