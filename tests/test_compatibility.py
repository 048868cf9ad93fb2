"""What works with a memory and what is refused: docs/compatibility.md is written by this file, and every row is tried.

python -m tests.test_compatibility > docs/compatibility.md   # needs peft, torchao, optimum-quanto and bitsandbytes
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ahn
from ahn import checkpoint
from ahn.backbone.compat import CACHE
from tests.multimodal import IMAGES, MAKERS, multimodal
from tests.test_seams import QUANTISED
from tests.tiny import FAMILIES, awaken, read, text, tiny, with_memory

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
INTRODUCTION = """# Compatibility

Which base models, libraries and calls go with a memory. A test makes every row with a tiny random model, and this page
is written by `python -m tests.test_compatibility > docs/compatibility.md`.

- **exact**: mode `full` gives the base model's logits bit for bit, or the call gives what it gives without the library.
  Chunks and single tokens agree to 1e-4.
- **works**: the same, but for the library's own rounding.
- **refused**: one line says why.
"""
IDS = text(1, 40).clamp(max=110)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


class MissingError(Exception):
    """A package that a row needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the page.

    Attributes:
        name: What is tried.
        try_it: Tries it; returns "exact" or "works", or raises what refuses it.
    """

    name: str
    try_it: Callable[[], str]


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingError(package) from None


def differs(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean difference as a share of the mean."""
    return float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean().clamp(min=1e-9))


def by_cache(model: Any, cache: Any, sizes: list[int]) -> torch.Tensor:
    parts = IDS.split(sizes, dim=1)
    return torch.cat([model(input_ids=part, **{CACHE: cache}).logits for part in parts], dim=1)


def with_base(model: Any) -> str:
    """Attaches to a base model, and reads with it in every way."""
    sizes = [7, 9, 1, 1, 1, 1, 20]
    try:
        expected = model(input_ids=IDS).logits
    except Exception:
        ahn.attach(model)  # which says why it cannot
        raise
    rounding = differs(by_cache(model, transformers.DynamicCache(config=model.config), sizes), expected)
    ahn.attach(model, ahn.AHNConfig(window=9, sinks=3))
    awaken(model)
    with ahn.mode(model, "full"):
        same = torch.equal(model(input_ids=IDS).logits, expected)
    whole = model(input_ids=IDS).logits
    apart = differs(by_cache(model, ahn.HippocampalCache(model), sizes), whole)
    assert differs(whole, expected) > 1e-3, "the memory does nothing"
    assert model.generate(input_ids=IDS, **GREEDY).shape == (1, 44)
    assert same, "mode full is not the base model"
    assert apart < max(1e-4, 6 * rounding), f"chunks differ by {apart:.1e}, of the base alone by {rounding:.1e}"
    return "exact" if apart < 1e-4 else "works"


def quantised_by_bitsandbytes(bits: str) -> str:
    need("bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        tiny(hidden_size=128, head_dim=64, intermediate_size=128).save_pretrained(folder)  # its blocks are of 64
        settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}": True})
        return with_base(
            transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
        )


def quantised(kind: str) -> str:
    for package in {"quanto": ["optimum.quanto"], "torchao": ["torchao"]}.get(kind, []):
        need(package)
    return with_base(QUANTISED[kind](tiny(hidden_size=64, head_dim=16)))


def offloaded(kind: str) -> str:
    accelerate, model = need("accelerate"), tiny()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "disk":
            accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
        elif kind == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            model = with_memory(window=9, sinks=3)
            expected = read(model, IDS)
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            return exact(read(model, IDS), expected, read(model, IDS, 1))
        return with_base(model)


def exact(found: torch.Tensor, expected: torch.Tensor, *others: torch.Tensor) -> str:
    for each in (found, *others):
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-4)
    return "exact"


def with_image(name: str) -> str:
    model, call = multimodal(name), IMAGES[name]()
    base = copy.deepcopy(model)
    ahn.attach(model, ahn.AHNConfig(window=60, sinks=4))
    assert torch.equal(model.generate(**call, **GREEDY), base.generate(**call, **GREEDY))
    return exact(model(**call).logits, base(**call).logits)


def peft_lora_on_the_base() -> str:
    peft = need("peft")
    return with_base(
        peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    )


def peft_on_the_memory(**settings: Any) -> str:
    peft, model = need("peft"), with_memory(window=9, sinks=3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings)).eval()
    return exact(read(wrapped, IDS, 1), read(wrapped, IDS))


def peft_prefix() -> str:
    peft, model = need("peft"), with_memory(window=9, sinks=3)
    wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    return exact(wrapped(input_ids=IDS).logits, read(model, IDS))


def compiled() -> str:
    model = tiny(num_hidden_layers=1)
    wrapper = torch.compile(model, backend="eager")
    ahn.attach(wrapper, ahn.AHNConfig(window=9, sinks=3))
    awaken(model)
    return exact(wrapper(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def after_pickling() -> str:
    model, file = with_memory(window=9, sinks=3), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    return exact(read(again, IDS), read(model, IDS), read(again, IDS, 1))


def copied_cache() -> str:
    model = with_memory(window=9, sinks=3)
    cache = ahn.HippocampalCache(model)
    read(model, IDS[:, :30], 30, cache=cache)
    return exact(read(model, IDS[:, 30:], 10, cache=copy.deepcopy(cache)), read(model, IDS)[:, 30:])


def pickled_cache() -> str:
    model = with_memory(window=9, sinks=3)
    torch.save(ahn.HippocampalCache(model), io.BytesIO())
    return "works"


def inference_mode() -> str:
    model = with_memory(window=9, sinks=3)
    cache = ahn.HippocampalCache(model)
    with torch.inference_mode():
        model(IDS[:, :30], **{CACHE: cache})
    rest = torch.cat([model(part, **{CACHE: cache}).logits for part in IDS[:, 30:].split(1, dim=1)], dim=1)
    return exact(rest, read(model, IDS)[:, 30:])


def autocast(first: bool, second: bool) -> str:
    model = with_memory(window=9, sinks=3)
    cache, parts = ahn.HippocampalCache(model), []
    for is_on, ids in ((first, [IDS[:, :30]]), (second, IDS[:, 30:].split(1, dim=1))):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            parts += [model(part, **{CACHE: cache}).logits.float() for part in ids]
    assert differs(torch.cat(parts, dim=1), read(model, IDS)) < 0.05
    return "works"


def saved(by_trainer: bool) -> str:
    model = with_memory(window=9, sinks=3)
    with tempfile.TemporaryDirectory() as folder:
        if by_trainer:
            arguments = transformers.TrainingArguments(output_dir=folder, report_to=[], use_cpu=True)
            transformers.Trainer(model=model, args=arguments).save_model(folder)
        else:
            model.save_pretrained(folder)
        return exact(read(ahn.from_pretrained(folder), IDS), read(model, IDS))


def merged() -> str:
    base, model = tiny("qwen3"), with_memory("qwen3", window=9, sinks=3)
    with tempfile.TemporaryDirectory() as place:
        base.save_pretrained(f"{place}/base")
        ahn.save(model, f"{place}/memory")
        checkpoint.merge(f"{place}/base", f"{place}/memory", f"{place}/merged")
        return exact(read(ahn.from_pretrained(f"{place}/merged"), IDS), read(model, IDS))


def attached(action: Callable[[Any], Any]) -> str:
    """What a model with a memory does that is asked for something else."""
    action(with_memory(window=9, sinks=3))
    return "works"


def packed() -> str:
    model = with_memory(window=9, sinks=3)
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    alone = [model(part, use_cache=False).logits for part in IDS.split([25, 15], dim=1)]
    return exact(model(IDS, position_ids=positions, use_cache=False).logits, torch.cat(alone, dim=1))


def filled_cache(model: Any) -> None:
    cache = transformers.DynamicCache(config=model.config)
    ahn.detach(model)
    model(IDS[:, :20], **{CACHE: cache})
    ahn.attach(model, ahn.AHNConfig(window=9, sinks=3))
    model(IDS[:, 20:], **{CACHE: cache})


def other_implementation(model: Any) -> None:
    model.set_attn_implementation("eager")
    model(IDS)


def with_cache_of(model: Any, new: torch.Tensor) -> Any:
    cache = ahn.HippocampalCache(model)
    model(IDS[:, :30], **{CACHE: cache})
    return model.generate(new, **GREEDY, **{CACHE: cache})


def bloom() -> str:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=128)
    return with_base(transformers.AutoModelForCausalLM.from_config(config).eval())


def on_meta() -> str:
    with torch.device("meta"):
        ahn.attach(transformers.AutoModelForCausalLM.from_config(tiny().config))
    return "works"


def asks(**arguments: Any) -> Callable[[], str]:
    return partial(attached, lambda model: model(IDS, **arguments))


def generates(**arguments: Any) -> Callable[[], str]:
    return partial(attached, lambda model: model.generate(IDS, **{**GREEDY, **arguments}))


SECTIONS: dict[str, list[Row]] = {
    "Base models": [
        *(Row(f"`{family}`", partial(lambda name: with_base(tiny(name)), family)) for family in FAMILIES),
        Row("`bloom`, with attention code of its own", bloom),
    ],
    "Base models that also see images": [
        *(Row(f"`{name}`, text", partial(lambda name: with_base(multimodal(name)), name)) for name in MAKERS),
        *(Row(f"`{name}`, an image", partial(with_image, name)) for name in IMAGES),
    ],
    "Quantised bases": [
        Row("bitsandbytes, 8 bit", partial(quantised_by_bitsandbytes, "8bit")),
        Row("bitsandbytes, 4 bit", partial(quantised_by_bitsandbytes, "4bit")),
        Row("torchao, int8 weights", partial(quantised, "torchao")),
        Row("optimum-quanto, int8 weights", partial(quantised, "quanto")),
        Row("torch.ao, dynamic", partial(quantised, "torch.ao")),
        Row("weights in buffers, as GPTQ and AWQ keep them", partial(quantised, "buffers")),
        Row("weights in float8 with scales, as FP8 checkpoints keep them", partial(quantised, "float8")),
        Row("weights in float8 without scales", lambda: with_base(tiny().to(torch.float8_e4m3fn))),
    ],
    "Offloaded bases": [
        Row("accelerate, offloaded to the CPU", partial(offloaded, "cpu")),
        Row("accelerate, offloaded to the disk", partial(offloaded, "disk")),
        Row("accelerate, offloaded after the memory was attached", partial(offloaded, "later")),
        Row("weights on the meta device", on_meta),
    ],
    "Wrappers and copies": [
        Row("peft: LoRA on the base", peft_lora_on_the_base),
        Row(
            "peft: LoRA on the memory's own maps too, `all-linear`",
            partial(peft_on_the_memory, target_modules="all-linear"),
        ),
        Row(
            "peft: `modules_to_save=['memory']`",
            partial(peft_on_the_memory, target_modules=["q_proj"], modules_to_save=["memory"]),
        ),
        Row("peft: prefix tuning", peft_prefix),
        Row("`torch.compile`", compiled),
        Row("`torch.save(model)` and `torch.load`", after_pickling),
        Row("`copy.deepcopy(cache)`", copied_cache),
        Row("`torch.save(cache)`", pickled_cache),
        Row("`save_pretrained`, then `ahn.from_pretrained`", partial(saved, by_trainer=False)),
        Row("`Trainer.save_model`, then `ahn.from_pretrained`", partial(saved, by_trainer=True)),
        Row("`ahn merge`, then `ahn.from_pretrained`", merged),
    ],
    "Calls": [
        Row("prefill in `torch.inference_mode`, decoding outside", inference_mode),
        Row("autocast", partial(autocast, True, True)),
        Row("prefill in autocast, decoding outside", partial(autocast, True, False)),
        Row("decoding in autocast, prefill outside", partial(autocast, False, True)),
        Row("packed rows", packed),
        Row("`is_causal=False`", asks(is_causal=False)),
        Row("a mask of four dimensions", asks(attention_mask=torch.zeros(1, 1, 40, 40))),
        Row("`output_attentions=True`", asks(output_attentions=True)),
        Row("`set_attn_implementation` after `ahn.attach`", partial(attached, other_implementation)),
        Row("a cache of the base model that was filled before", partial(attached, filled_cache)),
        Row("`generate` with beams", generates(num_beams=2)),
        Row("`generate` with sampling", generates(do_sample=True)),
        Row("`generate` with `prefill_chunk_size`", generates(prefill_chunk_size=7)),
        Row("`generate` with prompt lookup, which takes tokens back", generates(prompt_lookup_num_tokens=3)),
        Row("`generate` with a static cache", generates(cache_implementation="static")),
        Row(
            "`generate` with new tokens alone and a cache",
            partial(attached, lambda model: with_cache_of(model, IDS[:, 30:])),
        ),
        Row("`generate_batch` (continuous batching)", partial(attached, lambda model: model.generate_batch([[3, 4]]))),
    ],
}


def outcome(row: Row) -> tuple[str, str]:
    """What comes of a row, and what it says.

    Raises:
        MissingError: A package is not installed.
    """
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return row.try_it(), ""
        except ahn.AHNError as error:
            return "refused", str(error)


def line(row: Row, result: tuple[str, str]) -> str:
    """A line of the page."""
    kind, words = (each.replace("|", "\\|") for each in result)
    return f"| {row.name} | {kind} | {words} |"


def page() -> str:
    """The page, from what really comes of every row."""
    lines = [INTRODUCTION.rstrip()]
    for section, rows in SECTIONS.items():
        lines += ["", f"## {section}", "", "| what | outcome | it says |", "|---|---|---|"]
        lines += [line(row, outcome(row)) for row in rows]
    return "\n".join(lines) + "\n"


ROWS = {row.name: row for rows in SECTIONS.values() for row in rows}


@pytest.mark.skipif(CACHE != "cache", reason="the page is made with transformers 5.24 or newer")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "compile" in name else name for name in ROWS]
)
def test_a_row_is_true(name: str) -> None:
    row, before = ROWS[name], logging.getLogger("transformers").level
    try:
        expected = line(row, outcome(row))
    except MissingError as missing:
        pytest.skip(f"{missing} is not installed")
    finally:
        logging.getLogger("transformers").setLevel(before)
    assert expected in PAGE.read_text().splitlines()


def test_the_page_has_these_rows_and_no_other() -> None:
    found = [row.split(" | ")[0].removeprefix("| ") for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    assert [name for name in found if name != "what"] == list(ROWS)
    assert PAGE.read_text().startswith(INTRODUCTION)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(page(), end="")
