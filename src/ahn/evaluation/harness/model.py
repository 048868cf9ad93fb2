"""A model with a memory as lm-evaluation-harness sees it: three kinds of requests, each read in one arm."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import ahn
from ahn.attachment import attachment_of, find_attachment
from ahn.errors import ConfigError
from ahn.evaluation.arms import ArmReader, arm_reader
from ahn.evaluation.driver import Job, complete
from ahn.evaluation.journal import Journal
from ahn.models import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Show = Callable[[int], None]
Bar = Callable[[int], contextlib.AbstractContextManager[Show]]

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("ahn")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model read in one arm. Requests are answered one at a time; the harness' `batch_size` changes nothing.

    Args:
        base: As for `ahn.from_pretrained`.
        adapter: As for `ahn.from_pretrained`; "none" for an untrained memory. Left out, what ships for this model is
            taken.
        mode: An arm of `ahn.evaluation.arms`: full, window, ahn, ct_max, ct_mean or tail.
        window: Tokens of the window; the memory's own setting if left out.
        sinks: Number of sinks; the memory's own setting if left out.
        sink_positions: "bounded" or "absolute"; the memory's own setting if left out.
        max_length: Tokens of a request at most, its answer included; a longer context loses its beginning, as in the
            harness' own classes. Without it nothing is left out.
        max_gen_toks: Tokens of an answer where the task does not say.
        model: A model with a memory attached, in place of `base` and `adapter`.
        tokenizer: Its tokenizer; needed with `model`.
        journal: Where answers are kept at once and looked up; in memory only if left out.
        bar: Shows the progress of a number of requests; tqdm if left out.
        **ignored: What the harness gives every model: batch sizes and a device.

    Raises:
        ConfigError: Arguments do not fit together.
        ModelError: The base model cannot be found, loaded or given a memory.
        CheckpointError: The adapter cannot be read or does not fit.
    """

    def __init__(
        self,
        base: str = "smollm2-135m",
        adapter: str | None = None,
        mode: str = "ahn",
        window: int | None = None,
        sinks: int | None = None,
        sink_positions: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        journal: Journal | None = None,
        bar: Bar | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(ignored) - {"batch_size", "max_batch_size", "device"}):
            raise ConfigError(f"unknown model argument {unknown[0]}; known are base, adapter, mode, window, sinks, ...")
        if (model is None) != (tokenizer is None):
            raise ConfigError("model and tokenizer go together; give both or neither")
        self.base, self.arm = base, mode
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        if model is None:
            self.model, self.tokenizer = _loaded(base, adapter)
        self.settings = {"window": window, "sinks": sinks, "sink_positions": sink_positions}
        self.max_length, self.max_gen_toks = max_length, max_gen_toks
        self.journal = Journal(None, {}) if journal is None else journal
        self._bar = _tqdm if bar is None else bar
        self._stop = prompts.stop_ids(self.model, self.tokenizer)
        self._reader().prefill(torch.tensor([self.prefix_token_id]))  # an arm or a setting that cannot be fails here

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer, for what the harness caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns of a chat as the model's template writes them.

        Args:
            chat_history: Turns with `role` and `content`.
            add_generation_prompt: Whether the model's own turn begins at the end; else the last turn is left open.
        """
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; what opens a text is not put before one that has it already.

        Args:
            string: The text.
            add_special_tokens: Whether the tokenizer's special tokens are added; as fits if `None`.
            **_: Not used.
        """
        if add_special_tokens is None:
            opening = self.tokenizer.bos_token
            add_special_tokens = not (opening and string.startswith(opening))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; contexts that follow each other are read once where they are the same."""
        last: tuple[list[int], ArmReader] | None = None

        def answer(context: list[int], continuation: list[int]) -> dict[str, Any]:
            nonlocal last
            ids = self._shortened(context, len(continuation))
            if last is None or last[0] != ids:
                last = (ids, self._read(ids))
            value, greedy = _continuation(last[1].fork(), continuation)
            return {"loglikelihood": value, "greedy": greedy}

        jobs = (self._job("loglikelihood", answer, context, rest) for _, context, rest in requests)
        records = self._complete(jobs, len(requests), disable_tqdm)
        return [(record["loglikelihood"], record["greedy"]) for record in records]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each read once from its beginning to its end.

        The harness' own classes cut a text into windows that know nothing of each other. Here the arm reads it as a
        stream: every token is predicted from all that the arm keeps of the text before it.

        Args:
            requests: With the text as their only argument.
            disable_tqdm: Whether to show no progress.
        """

        def answer(ids: list[int]) -> dict[str, Any]:
            self._check(len(ids))
            reader = self._reader(score=True)
            reader.prefill(torch.tensor([self.prefix_token_id, *ids]))
            return {"loglikelihood": -float(reader.nll.double().sum())}

        texts = (self.tok_encode(request.args[0], add_special_tokens=False) for request in requests)
        jobs = (self._job("rolling", answer, ids) for ids in texts)
        return [record["loglikelihood"] for record in self._complete(jobs, len(requests), disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers.

        Args:
            requests: With the context and the settings of the answer: `until`, `max_gen_toks`.
            disable_tqdm: Whether to show no progress.

        Raises:
            ConfigError: The task wants samples drawn at random.
        """

        def answer(ids: list[int], limit: int, until: list[str]) -> dict[str, Any]:
            reader = self._read(self._shortened(ids, limit))
            return {"text": reader.answer(self.tokenizer, limit, self._stop, until)}

        arguments = (request.args for request in requests)
        jobs = (
            self._job("generate", answer, self.tok_encode(context), *self._limits(settings))
            for context, settings in arguments
        )
        return [record["text"] for record in self._complete(jobs, len(requests), disable_tqdm)]

    def _job(self, kind: str, answer: Callable[..., dict[str, Any]], *request: Any) -> Job:
        """A request under a name that is the same in every run of this arm."""
        content = json.dumps([self.max_length, kind, *request])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        return Job(f"harness/{self.arm}/{name}", lambda _: answer(*request))

    def _complete(self, jobs: Iterable[Job], total: int, hidden: bool) -> Iterator[dict[str, Any]]:
        with contextlib.nullcontext(lambda done: None) if hidden else self._bar(total) as show:
            yield from complete(jobs, self.journal, show)

    def _limits(self, settings: dict[str, Any]) -> tuple[int, list[str]]:
        """Tokens of an answer at most, and the texts that end it."""
        if settings.get("do_sample") and settings.get("temperature") != 0:
            raise ConfigError("the task draws its answers at random, but arms answer greedily; set do_sample=False")
        until = settings.get("until") or []
        limit = next((settings[name] for name in _LIMITS if settings.get(name) is not None), self.max_gen_toks)
        return int(limit), [until] if isinstance(until, str) else list(until)

    def _shortened(self, context: list[int], more: int) -> list[int]:
        """A context that leaves room for a number of tokens more."""
        if self.max_length is not None and len(context) + more > self.max_length:
            if more >= self.max_length:
                raise ConfigError(f"max_length {self.max_length:,} has no room for {more:,} tokens; raise it")
            context = context[more - self.max_length :]
        self._check(len(context) + more)
        return context

    def _check(self, tokens: int) -> None:
        """Refuses to read more than the model knows positions for, which would give a wrong answer silently."""
        positions = attachment_of(self.model).trained_context
        if self.arm == "full" and tokens > positions:
            raise ConfigError(
                f"a request has {tokens:,} tokens with its answer, more than the {positions:,} positions that the "
                f"model knows in full. Shorten requests (max_length={positions}; ahn eval run: --max-tokens) or leave "
                "full out."
            )

    def _read(self, ids: list[int]) -> ArmReader:
        reader = self._reader()
        reader.prefill(torch.tensor(ids or [self.prefix_token_id]))
        return reader

    def _reader(self, score: bool = False) -> ArmReader:
        """A reader with the settings of this run, which it takes when it is made."""
        with ahn.mode(self.model, "ahn", **self.settings):  # type: ignore[arg-type]
            return arm_reader(self.model, self.arm, score=score)


def _loaded(base: str, adapter: str | None) -> tuple[Any, Any]:
    """The model with its memory, and its tokenizer."""
    from ahn.checkpoint.files import shipped_for
    from ahn.models import load_tokenizer

    chosen = shipped_for(base) if adapter is None else None if adapter == "none" else adapter
    model = ahn.from_pretrained(base, chosen)
    if find_attachment(model) is None:
        ahn.attach(model, ahn.AHNConfig(window=1024, sinks=32, sink_positions="bounded"))
    return model, load_tokenizer(base)


def _continuation(reader: ArmReader, ids: list[int]) -> tuple[float, bool]:
    """Log-likelihood of tokens, and whether each is the likeliest; read one by one only as long as they are."""
    matched = 0
    while matched < len(ids) and int(reader.logits.argmax()) == ids[matched]:
        reader.prefill(torch.tensor(ids[matched : matched + 1]))
        matched += 1
    if rest := ids[matched:]:
        reader.prefill(torch.tensor(rest))
    return -float(reader.nll.double().sum()), not rest


@contextlib.contextmanager
def _tqdm(total: int) -> Iterator[Show]:
    with tqdm(total=total, desc="requests") as bar:
        yield lambda done: bar.update(done - bar.n)
