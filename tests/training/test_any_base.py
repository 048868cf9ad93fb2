"""One command makes memory and anchors for any base: weights of the choice, both trained together, one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ahn
from ahn.attachment import attachment_of
from ahn.cli import main
from ahn.config import USUAL_ANCHORS
from ahn.generation import read
from tests.scripts import ROOT
from tests.tiny import byte_tokenizer
from tests.training.common import write_base

STORY = "It was late. The rain had stopped before the evening came at last. Nobody came to the house any more. " * 200
JOINT = (
    "arguments: {use_cpu: true}\nsinks: 4\ndtype: float32\nanchor_documents: 6\ninitial_texts: 2\nreport_tokens: 400\n"
)


def test_one_command_makes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The weights that choose anchors are made once, trained with, saved beside the memory, and loaded with it."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "joint.yaml").write_text(JOINT)
    words = ["train", "--model", "./base", "--data", "story.txt", "--out", "both", "--config", "joint.yaml"]
    words += ["--anchors", "0,8", "--steps", "2", "--length", "128", "--window", "16", "--held-out", "0.2"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "making the weights that choose anchors from 6 texts" in shown.err
    assert "ahn+8" in shown.out
    assert "with 8 anchors wins back" in shown.out or "wins back" not in shown.out
    assert "with 128 anchors; anchors=0 for none" in (tmp_path / "both" / "README.md").read_text()
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert set(report["nll"]) == {"full", "window", "ahn", "ahn+8"}
    weights = (tmp_path / "both" / "anchors.safetensors").read_bytes()
    assert main(["train", "--out", "both", "--resume"]) == 0
    assert "making the weights" not in capsys.readouterr().err
    assert (tmp_path / "both" / "anchors.safetensors").read_bytes() == weights
    model = ahn.from_pretrained("./base", adapter="both")
    assert attachment_of(model).config.anchors == USUAL_ANCHORS
    assert any(layer.anchor_weights for layer in attachment_of(model).layers)


def test_several_processes_are_told_to_make_the_weights_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from ahn.errors import ConfigError
    from ahn.training.anchors.joint import load_score_weights
    from ahn.training.settings import TrainSettings
    from tests.tiny import with_memory

    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = TrainSettings(("story.txt",), str(tmp_path / "out"), anchors=(8,), model="./base")
    with pytest.raises(ConfigError, match="make them first with `ahn train anchors`"):
        load_score_weights(with_memory(), settings, print)


LENGTH, WINDOW, SINKS, STEPS = 256, 32, 4, 200
TRAIN = f"""
arguments: {{use_cpu: true}}
dtype: float32
anchors: [0, 32, 128]
anchor_documents: 12
sinks: {SINKS}
window: {WINDOW}
totals: [{WINDOW + SINKS}, 48, 96]
sink_counts: [{SINKS}]
length: {LENGTH}
accumulation: 4
steps: 24
lr: 3.0e-3
weight_decay: 0.0
held_out: 0.1
eval_every: 0
save_every: 24
report_tokens: 2000
"""


def write_trained_base(folder: Path, text: str) -> None:
    """A llama of two layers that has learned a text byte by byte: other head counts and another width than SmolLM2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, head_dim=32, vocab_size=259, max_position_embeddings=1024, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    optimizer = torch.optim.AdamW(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(ids.numel() - LENGTH, (4,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_a_base_trained_here_gains_from_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, memory and anchors from scratch; with both it predicts held-out text better than with the window alone."""
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))[6_000:]
    write_trained_base(tmp_path / "base", text)
    Path("texts.txt").write_text(text, encoding="utf-8")
    Path("train.yaml").write_text(TRAIN)
    command = ["train", "--config", "train.yaml", "--model", "./base", "--data", "texts.txt", "--out", "both"]
    assert main(command) == 0
    nats = json.loads(Path("both/report.json").read_text())["nll"]
    assert nats["ahn+128"] < nats["window"], nats
    model = ahn.from_pretrained("./base", adapter="both")
    assert attachment_of(model).config.anchors == USUAL_ANCHORS
    ids = byte_tokenizer()(text[:LENGTH], return_tensors="pt").input_ids[0]
    both = read(model, ids).nll
    with ahn.mode(model, "ahn", anchors=0):
        assert not torch.equal(read(model, ids).nll, both)
    with ahn.mode(model, "window"):
        assert not torch.equal(read(model, ids).nll, both)
