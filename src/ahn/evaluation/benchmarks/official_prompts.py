"""Templates out of the files in which the benchmarks publish them, in the form that `read_prompts` reads.

| benchmark | file | form |
|---|---|---|
| LV-Eval | `config.py` | the dict `DATASET_PROMPT` |
| LongBench | `config/dataset2prompt.json` | an object of templates by task |
| InfiniteBench | `src/prompt.py` | a dict for each model: `gpt4_templates`, `yarn_mistral_templates`, ... |

Python files are parsed, never run.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ahn.evaluation.benchmarks import find
from ahn.evaluation.benchmarks.prompts import check_template, load_data, read_text
from ahn.evaluation.errors import EvaluationError

# InfiniteBench's script fills math_find's {prefix} with this sentence.
_WRITTEN_OUT = {"{prefix}": "What is {target} in the following list?"}
_SUFFIX = "_templates"


class OfficialPrompts(NamedTuple):
    """What a published file gave.

    Attributes:
        templates: Templates by the names of tasks.
        left_out: For the names of other entries, why they cannot be used here.
    """

    templates: dict[str, str]
    left_out: dict[str, str]


def read_official_prompts(file: Path, variant: str | None = None) -> OfficialPrompts:
    """Templates of a published file.

    Args:
        file: The file, as it is in the benchmark's repository.
        variant: Which of several dicts of a file: "yarn_mistral" for `yarn_mistral_templates`. A file with a single one
            does not look at it.

    Raises:
        EvaluationError: The file cannot be read, holds no templates, or holds several dicts and none is named.
    """
    entries = _chosen(dict(_dicts(file)), file, variant) if file.suffix == ".py" else load_data(file)
    if not isinstance(entries, dict) or not entries:
        raise EvaluationError(f"{file} holds no templates. Give the file in which the benchmark publishes its prompts.")
    prompts = OfficialPrompts({}, {})
    for name, template in entries.items():
        for published, ours in _WRITTEN_OUT.items():
            template = template.replace(published, ours) if isinstance(template, str) else template
        try:
            task = find(str(name)).task.name
        except EvaluationError:
            prompts.left_out[str(name)] = "no task that is built in"
            continue
        try:
            prompts.templates[task] = check_template(template, os.fspath(file))
        except EvaluationError as error:
            prompts.left_out[task] = str(error)
    if not prompts.templates:
        raise EvaluationError(f"{file} holds no template of a task that is known here. Check which file it is.")
    return prompts


def _chosen(dicts: dict[str, dict[str, object]], file: Path, variant: str | None) -> dict[str, object]:
    """The only dict, or the one with this name."""
    if len(dicts) == 1:
        return next(iter(dicts.values()))
    for name in (variant, f"{variant}{_SUFFIX}"):
        if name in dicts:
            return dicts[name]
    if not dicts:
        raise EvaluationError(f"{file} holds no templates. Give the file in which the benchmark publishes its prompts.")
    kinds = ", ".join(name.removesuffix(_SUFFIX) for name in dicts)
    wrong = "" if variant is None else f", but not {variant}"
    raise EvaluationError(f"{file} holds templates of {kinds}{wrong}. Name one of them with --variant.")


def _dicts(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The dicts of texts that a Python file assigns to names; what is no plain text is `None` in them."""
    try:
        tree = ast.parse(read_text(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise EvaluationError(f"{file} is no Python. Give the file as the benchmark publishes it.") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            entries = zip(map(_text, node.value.keys), map(_text, node.value.values))
            texts: dict[str, object] = {name: text for name, text in entries if name is not None}
            if any("{context}" in text for text in texts.values() if isinstance(text, str)):
                yield node.targets[0].id, texts


def _text(node: ast.expr | None) -> str | None:
    """A text, or several that are added to each other."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    return None
