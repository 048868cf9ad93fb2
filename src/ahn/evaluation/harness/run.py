"""Tasks of lm-evaluation-harness in several arms, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ahn.evaluation.harness.model import HarnessModel

Row = dict[str, Any]


def evaluate(models: Mapping[str, HarnessModel], tasks: Sequence[Any], limit: int | None, chat: bool) -> list[Row]:
    """Asks tasks in every arm.

    Args:
        models: One for each arm, by its name.
        tasks: As `ahn.evaluation.harness.tasks.load_tasks` gives them.
        limit: Records of a task at most.
        chat: Whether contexts go into the tokenizer's chat template.

    Returns:
        A row for every metric of every task: `task`, `metric`, `items`, `scores` by arm and `errors` by arm, as the
        harness gives them; the standard error is `None` where it has none.
    """
    from lm_eval import simple_evaluate

    found = {
        arm: simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=1000,
            log_samples=False,
        )
        for arm, model in models.items()
    }
    first = next(iter(found.values()))
    rows: list[Row] = []
    for task, metrics in first["results"].items():
        for metric in [name for name, value in metrics.items() if _is_score(name, value)]:
            name, _, filtered = metric.partition(",")
            of = {arm: each["results"][task] for arm, each in found.items()}
            scores = {arm: float(values[metric]) for arm, values in of.items()}
            if set(scores.values()) == {-1.0}:  # RULER's mark for a length that was not asked
                continue
            errors = {arm: _number(values.get(f"{name}_stderr,{filtered}")) for arm, values in of.items()}
            items = first["n-samples"][task]["effective"] if task in first.get("n-samples", {}) else None
            rows.append({"task": task, "metric": name, "items": items, "scores": scores, "errors": errors})
    return rows


def _is_score(name: str, value: object) -> bool:
    return "," in name and "_stderr," not in name and isinstance(value, (int, float))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
