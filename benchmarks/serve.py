"""What a server costs: sessions that write together, a document that was read before, and a rough load.

    python benchmarks/serve.py                                   # SmolLM2, about half an hour on two cores
    python benchmarks/serve.py --tokens 4000 --document 8000     # the same, shorter
    python benchmarks/serve.py --parts load                      # 200 requests, 16 at once, and a kill -9
    python benchmarks/serve.py --parts peer --tokens 4000        # beside `transformers serve`, over HTTP

The parts are independent. Ratios come from rounds that take turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

import ahn
from ahn.cli.loading import ModelChoice, load
from ahn.cli.texts import reference
from ahn.generation import Reader, forward, full_cache_bytes
from ahn.models import load_model, load_tokenizer
from ahn.models.text import text_tokens
from ahn.serving.batch import Batch, Row

Table = list[tuple[str, str]]
EARLY = 5_000
"""Tokens after which the bytes of sessions are counted for the first time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens that each writing session has read")
    parser.add_argument("--full", type=int, help="tokens that full attention has read; --tokens if left out")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--window", type=int, help="tokens of the window; the usual number if left out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--document", type=int, default=100_000, help="tokens of the document that is asked about")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--written", type=int, default=48, help="tokens of an answer, beside transformers serve")
    parser.add_argument("--parts", default="writing,document,load,peer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known: dict[str, Callable[[Any], Table]] = {
        "writing": writing,
        "document": document,
        "load": loaded_server,
        "peer": beside_transformers,
    }
    rows: Table = []
    for part in options.parts.split(","):
        for row in known[part](options):
            print(f"| {row[0]} | {row[1]} |", flush=True)
            rows.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps(dict(rows), indent=2) + "\n")


def long_text(tokenizer: Any, tokens: int) -> list[int]:
    """Tokens of Python's reference, from its beginning again where it is too short."""
    return list(itertools.islice(itertools.cycle(text_tokens(reference(), tokenizer)), tokens))


@torch.no_grad()
def writing(options: Any) -> Table:
    """Tokens per second of one session, of several, and of the base model with a cache that grows."""
    loaded = load(ModelChoice(options.model, window=options.window))
    model: Any = loaded.model.eval()
    ids = torch.tensor(long_text(loaded.tokenizer, options.tokens))
    first = min(EARLY, options.tokens // 2)
    with ahn.mode(model, "ahn", anchors=options.anchors):
        early = Reader(model, score=False)
        early.prefill(ids[:first])
        reader = Reader(model, fork_of(early), score=False)
        reader.prefill(ids[first:])
        steps = {
            "one session": steps_of(model, reader, 1),
            f"{options.sessions} sessions": steps_of(model, reader, options.sessions),
        }
        sizes = [bytes_of(model, each, options.sessions) for each in (early, reader)]
        full = options.full or options.tokens
        for rows in (1, 2):
            steps[f"full attention after {full:,} tokens, {rows} in a batch"] = full_steps(model, full, rows)
        seconds = interleaved(steps, options.rounds)
    table = [(f"{name}: tokens/s", f"{1 / each:.1f}") for name, each in seconds.items()]
    one, many, *others = seconds.values()
    whole = full_cache_bytes(model, full) * options.sessions
    return [
        *table,
        (f"{options.sessions} sessions against one", f"{one / many:.2f} times"),
        (f"{options.sessions} sessions against the best batch of full attention", f"{min(others) / many:.1f} times"),
        (f"bytes of {options.sessions} sessions after {first:,} tokens each", f"{sizes[0]:,}"),
        (f"bytes of {options.sessions} sessions after {options.tokens:,} tokens each", f"{sizes[1]:,}"),
        (f"bytes of full attention for {options.sessions} sessions of {full:,} tokens", f"{whole:,}"),
    ]


def steps_of(model: Any, reader: Reader, sessions: int) -> Callable[[], int]:
    """A step of sessions that have read the same."""
    batch = Batch(model, sessions)
    rows = [Row(fork_of(reader), reader.logits) for _ in range(sessions)]

    def step() -> int:
        batch.step(rows, [int(row.logits.argmax()) for row in rows])
        return sessions

    return step


def fork_of(reader: Reader) -> Any:
    cache: Any = reader.cache
    return cache.fork()


def bytes_of(model: Any, reader: Reader, sessions: int) -> int:
    batch = Batch(model, sessions)
    batch.step([Row(fork_of(reader), reader.logits) for _ in range(sessions)], [5] * sessions)
    return batch.nbytes


def full_steps(model: Any, tokens: int, rows: int) -> Callable[[], int]:
    """A step of the base model with its own cache, which is filled with random numbers: its speed is the same."""
    cache = DynamicCache(config=model.config)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = rows, config.num_key_value_heads, tokens, size
        cache.update(torch.randn(shape) * 0.1, torch.randn(shape) * 0.1, layer)
    ids = torch.full((rows, 1), 5)

    def step() -> int:
        with ahn.mode(model, "full"):
            forward(model, ids, cache)
        return rows

    return step


def interleaved(steps: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median seconds of a token, from rounds in which all take their turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            tokens = step()
            if round_:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / tokens)
    return {name: statistics.median(each) for name, each in seconds.items()}


@contextmanager
def server(options: Any, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ahn serve` in a process of its own."""
    command = [sys.executable, "-m", "ahn", "serve", options.model, "--port", "0", "--session-dir", str(folder)]
    command += [] if options.window is None else ["--window", str(options.window)]
    command += ["--anchors", str(options.anchors), "--max-sessions", str(options.sessions)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines: Any = process.stderr
            address = next(word for line in lines for word in line.split() if word.startswith("http://")).rstrip(",/")
            ThreadPoolExecutor(1).submit(lines.read)  # or it would wait for its log to be read
            wait_for(address)
            yield process, address
        finally:
            process.kill()


def wait_for(address: str) -> None:
    import httpx

    transport = httpx.HTTPTransport(retries=10)  # 0.5, 1, 2, ... seconds apart
    with httpx.Client(transport=transport, timeout=None) as client:
        client.get(f"{address}/health").raise_for_status()


@contextmanager
def transformers_server(options: Any, folder: Path) -> Iterator[str]:
    """`transformers serve` with the same base model, in a process of its own."""
    load_model(options.model, "float32").save_pretrained(folder)
    load_tokenizer(options.model).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(list(map(str, command)), **quiet) as process:  # type: ignore[call-overload]
        try:
            wait_for(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def beside_transformers(options: Any) -> Table:
    """Tokens per second of one and of several conversations about a long text, and of `transformers serve`."""
    tokenizer = load_tokenizer(options.model)
    text = tokenizer.decode(long_text(tokenizer, options.tokens))
    with tempfile.TemporaryDirectory() as folder, server(options, Path(folder)) as (_, address):
        written_per_second(address, options, options.model, text, 1)  # reads the text, which all others share
        one, several = (written_per_second(address, options, options.model, text, n) for n in (1, options.sessions))
    with tempfile.TemporaryDirectory() as folder, transformers_server(options, Path(folder)) as address:
        peer = written_per_second(address, options, folder, text, 1)
    return [
        (f"transformers serve, one conversation of {options.tokens:,} tokens", f"{peer:.2f} tokens a second"),
        (f"ahn serve, one conversation of {options.tokens:,} tokens", f"{one:.2f}, {one / peer:.1f} times"),
        (f"ahn serve, {options.sessions} conversations", f"{several:.2f}, {several / peer:.1f} times"),
    ]


def written_per_second(address: str, options: Any, model: str, text: str, conversations: int) -> float:
    """Tokens per second that conversations about a text write together, after their first word."""

    def write(number: int) -> float:
        told = [{"role": "user", "content": text}, {"role": "assistant", "content": "I have read it."}]
        asked = {"role": "user", "content": f"Tell a story of {number + 3} of its people, as long as you can."}
        body = {"model": model, "messages": [*told, asked], "max_tokens": options.written, "temperature": 0}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}, timeout=None) as got:
            arrivals = [time.perf_counter() for _ in contents(got)]
        if len(arrivals) < options.written // 2:
            raise SystemExit(f"{address} wrote {len(arrivals)} words of {options.written}")
        return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])

    import httpx

    with ThreadPoolExecutor(conversations) as pool:
        return sum(pool.map(write, range(conversations)))


def document(options: Any) -> Table:
    """Time to the first word of questions with a document that was read before, and without."""
    import httpx

    tokenizer = load_tokenizer(options.model)
    text = tokenizer.decode(long_text(tokenizer, options.document))
    with tempfile.TemporaryDirectory() as folder, server(options, Path(folder)) as (_, address):
        client = httpx.Client(base_url=address, timeout=None)
        file = client.post("/v1/files", files={"file": ("document.txt", text.encode())}).json()
        while (file := client.get(f"/v1/files/{file['id']}").json())["status"] == "uploaded":
            time.sleep(1)
        waits: dict[str | None, list[float]] = {None: [], file["id"]: []}
        for number in range(options.rounds + 1):
            for which, times in waits.items():
                words = f"Question {number}: what does the text say about number {random.random()}?"
                times.append(first_word(client, options.model, words, which))
        plain, asked = (statistics.median(times[1:]) for times in waits.values())
    return [
        ("document: tokens", f"{file['ahn']['tokens']:,}"),
        ("document: bytes of its cache", f"{file['ahn']['cache_bytes']:,}"),
        ("document: bytes of full attention", f"{file['ahn']['full_cache_bytes']:,}"),
        ("document: tokens read per second", f"{file['ahn']['tokens_per_second']:.0f}"),
        ("first word without a document", f"{plain:.2f} s"),
        ("first word about the document", f"{asked:.2f} s"),
        ("ratio", f"{asked / plain:.2f}"),
    ]


def first_word(client: Any, model: str, words: str, which: str | None) -> float:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "ahn": {"document": which},
    }
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        seconds = [time.perf_counter() - start for _ in contents(response)]
    return seconds[0]


def contents(response: Any) -> Iterator[str]:
    """The words of a stream, as they arrive."""
    for line in response.iter_lines():
        if line.startswith("data: {") and (words := json.loads(line[6:])["choices"][0]["delta"].get("content")):
            yield words


def loaded_server(options: Any) -> Table:
    """Many requests at once, some of which are wrong, slow or go away; a kill in between; the sessions that stay."""
    import httpx

    killed = options.requests // 2
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        with server(options, folder) as (process, address):
            alone = {number: answer(address, options.model, number) for number in range(10)}
            time.sleep(2)  # sessions are written in the background
            kinds = many_requests(address, options, range(killed + options.at_once), alone, (killed, process))
        files = len(list(folder.rglob("*.cache")))
        with server(options, folder) as (_, address):
            again = [answer(address, options.model, number) for number in range(10)]
            kinds += many_requests(address, options, range(killed + options.at_once, options.requests), alone)
            counts = metrics(address)
            healthy = httpx.get(f"{address}/health").status_code == 200
        seconds = time.perf_counter() - start
    same = sum(words == alone[number][0] for number, (words, _) in enumerate(again))
    return [
        (f"{options.requests} requests, {options.at_once} at once, a kill -9 in between", f"{seconds:.0f} s"),
        *((f"requests: {kind}", str(kinds.count(kind))) for kind in sorted(set(kinds))),
        ("answers still being written after them", counts["ahn_active"]),
        ("requests still waiting after them", counts["ahn_queue"]),
        ("stored sessions after the kill", str(files)),
        ("questions of before that find their session", f"{sum(cached > 0 for _, cached in again)} of 10"),
        ("answers that are the same as before", f"{same} of 10"),
        ("healthy at the end", str(healthy)),
    ]


def many_requests(
    address: str,
    options: Any,
    numbers: range,
    alone: dict[int, tuple[str, int]],
    kill: tuple[int, subprocess.Popen[str]] | None = None,
) -> list[str]:
    """Sends requests, some at once; at one of them a process is killed. What became of each."""
    import httpx

    def send(number: int) -> str:
        if kill is not None and number == kill[0]:
            kill[1].send_signal(signal.SIGKILL)
            return "the kill"
        try:
            return one_request(address, options, number, alone)
        except (httpx.TransportError, json.JSONDecodeError):
            return "cut off by the kill" if kill is not None else "CUT OFF"

    with ThreadPoolExecutor(options.at_once) as pool:
        return list(pool.map(send, numbers))


def question(model: str, number: int, **changes: Any) -> dict[str, Any]:
    words = f"Question {number % 10}: what is {number % 10} times three? Say it in one line."
    messages = [{"role": "user", "content": words}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **changes}


def answer(address: str, model: str, number: int) -> tuple[str, int]:
    import httpx

    told = httpx.post(f"{address}/v1/chat/completions", json=question(model, number), timeout=None).json()
    return told["choices"][0]["message"]["content"], told["usage"]["prompt_tokens_details"]["cached_tokens"]


def one_request(address: str, options: Any, number: int, alone: dict[int, tuple[str, int]]) -> str:
    """Sends one request; what kind it was, and whether it was answered as it should be."""
    import httpx

    url = f"{address}/v1/chat/completions"
    if number % 10 == 3:
        return "malformed, refused" if httpx.post(url, content=b"{").status_code == 400 else "malformed, WRONG"
    if number % 10 == 5:
        body = question(options.model, number, stream=True, max_tokens=2000)
        with httpx.stream("POST", url, json=body, timeout=None) as stream:
            list(itertools.islice(stream.iter_lines(), 4))
        return "gone in the middle"
    if number % 10 == 7:
        time.sleep(random.random())
        words = ""
        with httpx.stream("POST", url, json=question(options.model, number, stream=True), timeout=None) as stream:
            for more in contents(stream):
                time.sleep(0.1)
                words += more
        return "slow reader, right" if words == alone[number % 10][0] else "slow reader, WRONG"
    return "right" if answer(address, options.model, number)[0] == alone[number % 10][0] else "WRONG"


def metrics(address: str) -> dict[str, str]:
    import httpx

    time.sleep(1.5)
    page = httpx.get(f"{address}/metrics").text
    return dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    main()
