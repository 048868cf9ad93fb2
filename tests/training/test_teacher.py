"""What the teacher has read before: the same to the bit, per text and per base model, and never half a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn.errors import ConfigError
from ahn.training.distiller import Distiller
from ahn.training.teacher import TeacherCache
from tests.tiny import text, with_memory

SPAN = (16, 4)


def losses(distiller: Distiller, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return distiller(**batch, spans=[SPAN] * batch["input_ids"].size(0))["kl"]


def passes_of_the_teacher(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each mode that the model is run in."""
    modes: list[str] = []
    mode = ahn.mode
    monkeypatch.setattr(ahn, "mode", lambda model, name, **span: modes.append(name) or mode(model, name, **span))
    return modes


def test_a_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_memory("llama")
    plain, batch = Distiller(model), {"input_ids": text(2, 48)}
    expected = losses(plain, batch)
    modes = passes_of_the_teacher(model, monkeypatch)
    for read in (["full", "ahn"], ["ahn"]):  # the second time by the student alone
        cached = Distiller(model, teacher=TeacherCache(tmp_path, model))
        modes.clear()
        assert torch.equal(losses(cached, batch), expected)
        assert modes == [*read, "full", "full"]  # the head of each
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_kept(tmp_path: Path, side: str) -> None:
    """A row that was read with padding serves the same row without it."""
    model = with_memory("llama")
    cached = Distiller(model, teacher=TeacherCache(tmp_path, model))
    short, long = text(1, 40, seed=1), text(1, 48, seed=2)
    padding = (8, 0) if side == "left" else (0, 8)
    mask = torch.nn.functional.pad(torch.ones_like(short), padding)
    batch = {
        "input_ids": torch.cat((torch.nn.functional.pad(short, padding), long)),
        "attention_mask": torch.cat((mask, torch.ones_like(long))),
    }
    expected = losses(Distiller(model), batch)
    for _ in range(2):
        torch.testing.assert_close(losses(cached, batch), expected)
    alone = losses(Distiller(model), {"input_ids": short})
    torch.testing.assert_close(losses(cached, {"input_ids": short}), alone, rtol=1e-4, atol=1e-5)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_models_do_not_share_states(tmp_path: Path) -> None:
    models = [with_memory("llama"), with_memory("llama")]
    models[1].lm_head.weight[0, 0] += 1
    folders = {TeacherCache(tmp_path, model).folder for model in models}
    assert len(folders) == 2
    assert TeacherCache(tmp_path, models[0]).folder in folders


def test_half_a_file_is_read_again(tmp_path: Path) -> None:
    model, batch = with_memory("llama"), {"input_ids": text(1, 48)}
    cached = Distiller(model, teacher=TeacherCache(tmp_path, model))
    expected = losses(cached, batch)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(losses(cached, batch), expected)
    assert torch.equal(losses(cached, batch), expected)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold the teacher's states"):
        TeacherCache(tmp_path / "file", with_memory("llama"))
