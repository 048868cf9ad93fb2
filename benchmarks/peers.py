"""This library against kvpress at equal bytes: facts in long texts, and the loss of held-out text.

    make peers TEXTS=FOLDER                       # all steps, in two environments; the same command again goes on
    make peers TEXTS=FOLDER ARGS="--limit 6"      # the first six texts only

kvpress needs an older transformers, so it has an environment of its own. The steps speak to each other in JSON:

    .venv/bin/python benchmarks/peers.py items --texts FOLDER     # texts, questions, and bytes for all
    .venv/bin/python benchmarks/peers.py ahn                      # reads them with this library
    .venv-peers/bin/python benchmarks/peers.py kvpress            # and with kvpress
    .venv/bin/python benchmarks/peers.py page                     # writes docs/peers.md

Every method keeps at most the bytes of a window of 256, 32 sinks, a memory and 128 anchors. A kvpress method takes as
many tokens instead, all of them its own choice. It is used in two ways:

- once: the context is read in full attention and compressed at its end, as its pipeline does. The peak is that of full
  attention.
- stepwise: its `DecodingPress` compresses to the same size after every 128 tokens, so that the cache stays small.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
WORK, PAGE, KEPT = (
    HERE.parent / ".results" / "peers",
    HERE.parent / "docs" / "peers.md",
    HERE / "results" / "peers.json",
)
MODEL, MEMORY = "smollm2-135m", "gated_delta_net+linearized_attention"
WINDOW, SINKS, ANCHORS = 256, 32, 128
BYTES = 24_215_040
"""What each method may keep: a window of 256, 32 sinks, the state of Gated DeltaNet in all layers, and 128 anchors."""
STEP = 128
"""Tokens between two compressions of a stepwise press: enough for SnapKV, which looks from the last 64."""
TASKS, LENGTHS = ("number", "word", "uuid"), (2048, 4096)
OURS = "memory and anchors"
Item = dict[str, Any]
Result = dict[str, Any]


def make_items(options: argparse.Namespace) -> None:
    """Writes texts with facts as tokens, and how much every method may keep."""
    from ahn.evaluation.recall.items import ItemMaker
    from ahn.evaluation.recall.tasks import EVICTED, RecallSettings
    from ahn.models import load_tokenizer, prompts, resolve
    from ahn.models.text import sentences

    haystack = [part for file in sorted(options.texts.glob("*.txt")) for part in sentences(file.read_text())]
    settings = RecallSettings(TASKS, tuple(options.lengths), depths=5, items=options.items, arms=(), seed=options.seed)
    maker = ItemMaker(settings, load_tokenizer(MODEL), WINDOW, SINKS, haystack)
    model = _model()
    items = []
    for spec in maker.specs:
        item = maker.item(spec)
        [(question, [value])] = item.questions.items()
        if item.labels[value] != EVICTED:
            continue
        facts = {"key": spec.key, "task": spec.task, "length": spec.length, "depth": spec.depth, "value": value.text}
        tokens = {"context": list(item.context), "closing": list(maker.closing(question)), "fact": sorted(item.needles)}
        items.append({**facts, **tokens, "limit": maker.limit([value])})
    about = {"folder": str(resolve(MODEL)), "stop": sorted(prompts.stop_ids(model, maker.tokenizer))}
    _write(WORK / "items.json", {**about, **_sizes(model, max(options.lengths)), "items": _mixed(items, options.seed)})


def _mixed(items: list[Item], seed: int) -> list[Item]:
    """Items in a random order, the lengths in turn, so that the first ones stand for all."""
    by_length: dict[int, list[Item]] = {}
    for item in random.Random(seed).sample(items, len(items)):
        by_length.setdefault(item["length"], []).append(item)
    return [item for row in itertools.zip_longest(*by_length.values()) for item in row if item is not None]


def _model() -> Any:
    """The model with its memory and the weights that choose anchors."""
    import ahn

    config = ahn.AHNConfig(MEMORY, WINDOW, SINKS)
    return ahn.from_pretrained(MODEL, f"{MODEL}/hybrid", config, "float32")


def _sizes(model: Any, tokens: int) -> Item:
    """The arms and how much each may keep: its window and its name, its bytes, and the tokens of a press."""
    import ahn
    from ahn.evaluation.perplexity.cache_sizes import CacheSizes

    def taken(window: int, arm: str) -> int:
        with ahn.mode(model, "ahn", window=window):
            return CacheSizes(model, tokens).bytes_of(arm) or 0

    per_token = taken(WINDOW + 1, "window") - taken(WINDOW, "window")
    spare = (BYTES - taken(WINDOW, "window")) // per_token
    arms = {
        "window": (WINDOW + spare, "window"),
        "memory": (
            WINDOW + (BYTES - taken(WINDOW, "ahn")) // (taken(WINDOW + 1, "ahn") - taken(WINDOW, "ahn")),
            "ahn",
        ),
        "anchors": (WINDOW, f"anchors+{spare}"),
        OURS: (WINDOW, f"ahn+{ANCHORS}"),
    }
    sizes = {name: taken(*arm) for name, arm in arms.items()}
    return {"bytes": BYTES, "tokens": BYTES // per_token, "arms": arms, "arm_bytes": sizes}


def read_with_ahn(known: Item, done: dict[str, Result]) -> Iterator[tuple[str, Result]]:
    """Reads the items with this library, one arm after the other."""
    import ahn
    from ahn.evaluation.arms import arm_reader
    from ahn.models import load_tokenizer

    model, tokenizer = _model(), load_tokenizer(MODEL)
    arms = {"full attention": (WINDOW, "full"), **known["arms"]}
    for item in known["items"]:
        for name, (window, arm) in arms.items():
            if (key := f"{item['key']}/{name}") in done:
                continue
            with ahn.mode(model, "ahn", window=window):
                reader = arm_reader(model, arm)
            reader.prefill(torch.tensor(item["context"]))
            losses = reader.nll.tolist()
            reader.prefill(torch.tensor(item["closing"]))
            answer = reader.answer(tokenizer, item["limit"], known["stop"])
            yield key, _result(item, name, answer, losses, known["tokens"])


def read_with_kvpress(known: Item, done: dict[str, Result]) -> Iterator[tuple[str, Result]]:
    """Reads the items with each press of kvpress, in both ways."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(known["folder"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(known["folder"])

    def result(item: Item, method: str, cache: Any, losses: list[float], tokens: int) -> tuple[str, Result]:
        written = _answer(model, cache, [*item["context"][tokens:], *item["closing"]], tokens, item, known)
        answer = tokenizer.decode(written, skip_special_tokens=True)
        return f"{item['key']}/{method}", _result(item, method, answer, losses, known["tokens"])

    for item in known["items"]:
        with torch.no_grad():
            if f"{item['key']}/{next(iter(_presses()))}, once" not in done:
                for name, cache in _read_once(model, item["context"], known["tokens"]).items():
                    yield result(item, f"{name}, once", cache, [], len(item["context"]))
            for name, press in _presses().items():
                if f"{item['key']}/{name}, stepwise" not in done:
                    yield result(
                        item, f"{name}, stepwise", *_read_stepwise(model, press, item["context"], known["tokens"])
                    )


def _presses() -> dict[str, Any]:
    """The methods of kvpress, each with the settings that it has by itself."""
    import kvpress

    return {
        "StreamingLLM": kvpress.StreamingLLMPress(),
        "KeyDiff": kvpress.KeyDiffPress(),
        "SnapKV": kvpress.SnapKVPress(),
        "Expected Attention": kvpress.ExpectedAttentionPress(),
    }


def _read_once(model: Any, context: list[int], kept: int) -> dict[str, Any]:
    """The whole context in one pass, compressed at its end by each press; their caches.

    What a press keeps changes nothing of the pass itself, so one pass serves all.
    """
    from kvpress import BasePress
    from transformers import DynamicCache

    caches = {name: DynamicCache() for name in _presses()}

    class Each(BasePress):
        """Compresses a layer by every press, into a cache of its own."""

        def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, *more: Any) -> tuple[Any, Any]:
            for name, press in presses.items():
                caches[name].update(*press.compress(module, hidden_states, keys, values, *more), module.layer_idx)
            return keys, values

    presses = _presses()
    for press in presses.values():
        press.compression_ratio = 1 - (kept + 0.5) / len(context)  # rounded down it keeps exactly so many
        press.post_init_from_model(model)
    with Each()(model):
        model(torch.tensor([context]), past_key_values=DynamicCache(), logits_to_keep=1)
    for cache in caches.values():
        _check_size(cache, kept)
    return caches


def _read_stepwise(model: Any, press: Any, context: list[int], kept: int) -> tuple[Any, list[float], int]:
    """Step by step, compressed after each; the loss of every token given those that were kept."""
    from kvpress import DecodingPress
    from transformers import DynamicCache

    cache, losses, end = DynamicCache(), [], len(context) // STEP * STEP  # the rest is read with the question
    if hasattr(press, "n_sink") and type(press).__name__.startswith("Streaming"):
        press.compress = functools.partial(_keep_in_order, press.n_sink, kept)
    decoding = DecodingPress(press, compression_interval=1, target_size=kept, hidden_states_buffer_size=STEP)
    with decoding(model):
        for start in range(0, end, STEP):
            places = torch.arange(start, start + STEP)
            ids = torch.tensor([context[start : start + STEP]])
            logits = model(ids, past_key_values=cache, position_ids=places[None]).logits[0].float()
            nexts = torch.tensor(context[start + 1 : start + STEP + 1])
            losses += (-logits[: len(nexts)].log_softmax(-1).gather(1, nexts[:, None])[:, 0]).tolist()
    _check_size(cache, kept)
    return cache, losses, end


def _keep_in_order(sinks: int, kept: int, module: Any, hidden: Any, *tensors: Any) -> tuple[Any, Any]:
    """What StreamingLLM keeps, in the order of the text.

    kvpress 0.5.5 returns what it keeps in no order, and this press goes by the order: the second time it would drop
    tokens at random.
    """
    keys, values = (
        torch.cat((each[:, :, :sinks], each[:, :, sinks:][:, :, -(kept - sinks) :]), dim=2) for each in tensors[:2]
    )
    return keys, values


def _check_size(cache: Any, kept: int) -> None:
    """Checks that every layer holds as many tokens as it may.

    Raises:
        SystemExit: One does not.
    """
    sizes = {layer.keys.size(2) for layer in cache.layers}
    if sizes != {kept}:
        raise SystemExit(f"kvpress kept {sizes} tokens instead of {kept}")


def _answer(model: Any, cache: Any, question: list[int], place: int, item: Item, known: Item) -> list[int]:
    """Tokens of an answer, the likeliest each time, as kvpress's pipeline writes it: nothing more is compressed."""
    ids, written = torch.tensor([question]), []
    while len(written) < item["limit"]:
        places = torch.arange(place, place + ids.size(1))[None]
        token = int(model(ids, past_key_values=cache, position_ids=places, logits_to_keep=1).logits[0, -1].argmax())
        if token in known["stop"]:
            break
        written.append(token)
        place, ids = place + ids.size(1), torch.tensor([[token]])
    return written


def _result(item: Item, method: str, answer: str, losses: list[float], kept: int) -> Result:
    """What is kept of a method and an item: its answer, and its loss where all methods have begun to forget."""
    end, facts = len(item["context"]) // STEP * STEP, set(item["fact"])
    counted = [loss for place, loss in enumerate(losses, 1) if kept <= place < end and place not in facts]
    facts_of = {name: item[name] for name in ("task", "length", "depth", "value")}
    nats = sum(counted) / len(counted) if counted else None
    return {**facts_of, "method": method, "answer": answer, "nats": nats, "tokens": len(counted)}


def read(step: Callable[[Item, dict[str, Result]], Iterator[tuple[str, Result]]], file: Path, limit: int) -> None:
    """Reads all items that are not read yet; each result is on disk before the next begins."""
    known = json.loads((WORK / "items.json").read_text())
    done = json.loads(file.read_text()) if file.exists() else {}
    known["items"] = known["items"][:limit]
    for key, result in step(known, done):
        done[key] = result
        _write(file, done)
        print(f"{key}: {result['answer'].split(chr(10))[0][:60]!r}, {result['nats']}", flush=True)


def page() -> None:
    """Writes the tables, from what all steps left."""
    known = json.loads((WORK / "items.json").read_text())
    results = [each for name in ("ahn", "kvpress") for each in json.loads((WORK / f"{name}.json").read_text()).values()]
    read_by: dict[tuple[str, int, float, str], set[str]] = {}
    for each in results:
        read_by.setdefault(_place(each), set()).add(each["method"])
    methods = list(dict.fromkeys(each["method"] for each in results))
    complete = {place for place, by in read_by.items() if by == set(methods)}
    kept = {name: known[name] for name in ("bytes", "tokens", "arms", "arm_bytes")}
    results = [each for each in results if _place(each) in complete]
    _write(KEPT, {**kept, "results": results})
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->")
    PAGE.write_text(f"{before}<!-- table -->\n{table(results, methods)}<!-- /table -->{after}")


def _place(result: Result) -> tuple[str, int, float, str]:
    return result["task"], result["length"], result["depth"], result["value"]


def table(results: list[Result], methods: list[str]) -> str:
    """Facts found and nats per token of each method, by length, and how many more than ours; Markdown."""
    lengths = sorted({each["length"] for each in results})
    names = [name for n in lengths for name in (f"facts, {n:,}", f"nats, {n:,}", f"more than `{OURS}` (95 %)")]
    lines = [f"| method | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for method in methods:
        cells = []
        for length in lengths:
            mine, ours = (
                [each for each in results if (each["method"], each["length"]) == (name, length)]
                for name in (method, OURS)
            )
            found = f"{sum(_is_found(each) for each in mine)} of {len(mine)}"
            cells += [found, _mean(mine), _more(mine, ours) if method != OURS else ""]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _more(results: list[Result], ours: list[Result]) -> str:
    """Nats per token that a method needs more than ours on the same texts, with the interval over texts."""
    from ahn.evaluation.bootstrap import interval

    ours_of = {_place(each): each for each in ours}
    pairs = [(each, ours_of[_place(each)]) for each in results if each["nats"] is not None and _place(each) in ours_of]
    if not pairs:
        return ""
    rows = np.array([((their["nats"] - our["nats"]) * their["tokens"], their["tokens"]) for their, our in pairs])
    more = float(rows[:, 0].sum() / rows[:, 1].sum())
    low, high = interval(rows, lambda drawn: float(drawn[:, 0].sum() / drawn[:, 1].sum()))
    return f"{more:+.4f}" + ("" if math.isnan(low) else f" ({low:+.4f} to {high:+.4f})")


def _is_found(result: Result) -> bool:
    from ahn.evaluation.recall.findings import in_answer

    return in_answer(result["value"], result["answer"])


def _mean(results: list[Result]) -> str:
    """Nats per token over all tokens of some results, or nothing where a method reads in full attention."""
    total, tokens = 0.0, 0
    for each in results:
        if each["nats"] is not None:
            total, tokens = total + each["nats"] * each["tokens"], tokens + each["tokens"]
    return f"{total / tokens:.4f}" if tokens else ""


def _write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(file)


def main() -> None:
    """Runs one step."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("step", choices=("items", "ahn", "kvpress", "page"))
    arguments.add_argument("--texts", type=Path, help="a folder of texts that no memory was trained on")
    arguments.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    arguments.add_argument("--items", type=int, default=2, help="texts of each task, length and depth")
    arguments.add_argument("--limit", type=int, default=10**6, help="read so many of the texts only")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    steps = {"ahn": read_with_ahn, "kvpress": read_with_kvpress}
    if options.step == "items":
        make_items(options)
    elif options.step == "page":
        page()
    else:
        read(steps[options.step], WORK / f"{options.step}.json", options.limit)


if __name__ == "__main__":
    main()
