"""Prompts: templates filled from a record, and templates of one's own from a file."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ahn.errors import one_line
from ahn.evaluation.benchmarks import find
from ahn.evaluation.benchmarks.schema import Sample, Scoring
from ahn.evaluation.benchmarks.truncation import truncate
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.libraries import library

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# `{input}` is the name that the published templates give to the question.
PLACEHOLDERS = (
    *("context", "question", "input", "OPTION_A", "OPTION_B", "OPTION_C", "OPTION_D"),
    *("func", "func_call", "target"),
)
_CALL = re.compile(r"(func_\d+)\(-?\d+\)")
_TARGET = re.compile(r"the \w+ number", re.IGNORECASE)


def build_prompt(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    *,
    scoring: Scoring = "official",
    templates: Mapping[str, str] | None = None,
    chat: bool = False,
) -> str:
    """What a model reads for a record: the filled prompt, truncated, then in the chat template.

    Args:
        sample: The record.
        tokenizer: The model's tokenizer.
        max_tokens: Tokens of the prompt at most, without those of the chat template; the rules' own number if left out,
            and no limit where they have none.
        scoring: Whose rules.
        templates: Prompts to use in place of the built-in ones, by the names of tasks, as `read_prompts` gives them.
        chat: Whether to put it into the tokenizer's chat template, where the rules allow it.

    Raises:
        EvaluationError: The prompt cannot be filled from this record.
        ConfigError: `max_tokens` leaves no room.
    """
    task = sample.target.task
    rules = task.rules(scoring)
    template = (templates or {}).get(task.name, rules.prompt)
    prompt = fill(template, sample)
    limit = rules.max_tokens if max_tokens is None else max_tokens
    if limit is not None:
        prompt = truncate(prompt, tokenizer, limit, rules.truncation, rules.new_tokens)
    if not (chat and rules.chat):
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def fill(template: str, sample: Sample) -> str:
    """A template with a record's texts in it.

    Args:
        template: With placeholders of `PLACEHOLDERS` in braces.
        sample: The record.

    Raises:
        EvaluationError: The record has not what a placeholder stands for.
    """
    values = {}
    for name in _placeholders(template):
        if (value := _value(name, sample)) is None:
            raise EvaluationError(f"{sample.where}: nothing in the record fills {{{name}}} of the prompt. Correct it.")
        values[name] = value
    return template.format(**values)


def read_prompts(file: Path) -> dict[str, str]:
    """Templates from a JSON or YAML file, such as the published ones.

    Args:
        file: An object that gives a template to names of tasks; a template serves all lengths of its task. Tasks
            without one keep their built-in prompts.

    Raises:
        EvaluationError: The file cannot be read, names an unknown task, or holds a template that cannot be filled.
    """
    templates = load_data(file)
    if not isinstance(templates, dict):
        raise EvaluationError(f"{file} is no object of templates. Give one that maps names of tasks to templates.")
    checked = {}
    for name, template in templates.items():
        try:
            task = find(str(name)).task
        except EvaluationError as error:
            raise EvaluationError(f"{file}: {error}") from None
        checked[task.name] = check_template(template, f"{file}, {name}")
    return checked


def check_template(template: object, where: str) -> str:
    """A template that can be filled.

    Args:
        template: What is to be one.
        where: Its place, for messages.

    Raises:
        EvaluationError: It cannot be filled.
    """
    if not isinstance(template, str):
        raise EvaluationError(f"{where}: the template is no text. Correct it.")
    try:
        names = _placeholders(template)
    except ValueError as error:
        raise EvaluationError(f"{where}: the braces are wrong ({error}). Write {{{{ for one that is text.") from None
    if unknown := [name for name in names if name not in PLACEHOLDERS]:
        known = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise EvaluationError(f"{where}: the placeholder {{{unknown[0]}}} is unknown. Known are {known}.")
    if "context" not in names:
        raise EvaluationError(f"{where}: the template has no {{context}}. Put it where the long text belongs.")
    return template


def _placeholders(template: str) -> list[str]:
    """The names in a template's braces, in their order."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _value(name: str, sample: Sample) -> str | None:
    """What a placeholder stands for; `None` if the record does not have it."""
    if name.startswith("OPTION_"):
        index = "ABCD".index(name[-1])
        return sample.options[index] if index < len(sample.options) else None
    if name in ("func", "func_call"):
        call = _CALL.search(sample.question)
        return None if call is None else call[1 if name == "func" else 0]
    if name == "target":
        target = _TARGET.search(sample.question)
        return None if target is None else target[0].lower()
    return sample.context if name == "context" else sample.question


def load_data(file: Path) -> object:
    """What a JSON or YAML file holds.

    Raises:
        EvaluationError: It cannot be read.
    """
    text = read_text(file)
    if file.suffix in (".yaml", ".yml"):
        yaml = library("yaml", "reading YAML")
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise EvaluationError(f"{file} is no YAML ({one_line(error)}). Correct it.") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{file} is no JSON ({error.msg}, line {error.lineno}). Correct it.") from None


def read_text(file: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        EvaluationError: It cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EvaluationError(f"{file} is not UTF-8. Convert it with iconv.") from None
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read ({error.strerror}). Check the path.") from None
