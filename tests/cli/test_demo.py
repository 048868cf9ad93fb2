"""`ahn demo`: what it says about what it read, on a tiny model and on the one that it is for."""

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import ahn
from ahn.cli import comparison, loading, main
from ahn.cli.comparison import ComparedMode, Comparison, ReadingLimits
from ahn.cli.demo import compare
from ahn.cli.loading import ModelChoice, ModelSettings
from ahn.cli.screen import Screen
from ahn.cli.texts import reference, with_fact
from ahn.generation import Reader, decode, stream_text
from ahn.models import prompts
from tests.cli.test_cli import as_before, place  # noqa: F401 (fixtures)
from tests.models.test_models import needs_smollm2

WINDOW, SINKS = 32, 4
TINY = ("--model", "./chatty", "--window", str(WINDOW), "--sinks", str(SINKS), "--max-new-tokens", "4")


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:  # noqa: F811
    """Runs `ahn demo` on a tiny model; its exit status, standard output and standard error."""
    monkeypatch.chdir(place)

    def runner(*arguments: str) -> tuple[int, str, str]:
        status = main(["demo", *arguments])
        return status, *capsys.readouterr()

    return runner


def rows(out: str) -> dict[str, list[str]]:
    """The cells of the table's rows, without the mode."""
    found = re.findall(r"^ (ahn\+\d+|ahn|window|full)  ([ \d.,-]+)$", out, re.M)
    return {mode: cells.split() for mode, cells in found}


class TestTable:
    def test_untrained(self, run):
        status, out, err = run(*TINY, "--tokens", "600", "--question", "And so?")
        assert (status, err) == (0, "")
        assert "untrained (no adapter): ahn says exactly what window says" in out
        assert "perplexity" in out
        assert "37-600" in out
        assert "past the first 36 (sinks + window)" in out
        assert re.search(r"Read 600 of [\d,]+ tokens; --tokens all reads all, in about \d+ min\.", out)
        cells = rows(out)
        assert list(cells) == ["ahn+128", "ahn", "window", "full"]
        assert "Anchors: chosen by key_diff, which needs no weights." in out
        assert all(row[0] == "600" for row in cells.values())
        assert cells["ahn"][-1] == cells["window"][-1] != cells["full"][-1]
        assert "Question: And so?" in out

    def test_with_an_adapter(self, run):
        status, out, _ = run(*TINY, "--tokens", "600", "--adapter", "adapter", "--modes", "ahn,window")
        assert status == 0
        assert "untrained" not in out
        assert "weights from adapter" in out
        cells = rows(out)
        assert list(cells) == ["ahn", "window"]
        assert cells["ahn"][-1] != cells["window"][-1]

    def test_anchors(self, run):
        read = (*TINY, "--tokens", "600", "--question", "And so?", "--adapter", "both")
        out = run(*read, "--window", "64", "--anchors", "8")[1]
        assert list(rows(out)) == ["ahn+8", "ahn", "window", "full"]
        assert "Anchors: chosen with weights from both." in out
        out = run(*read, "--anchors", "0")[1]
        assert list(rows(out)) == ["ahn", "window", "full"]
        assert "Anchors:" not in out

    def test_perplexity_is_that_of_these_tokens(self, place, monkeypatch):  # noqa: F811
        monkeypatch.chdir(place)
        loaded = loading.load(ModelSettings("./chatty", "adapter", WINDOW, SINKS))
        passage = prompts.passage(loaded.tokenizer, reference()[:700], "", chat=True)
        compared = Comparison(loaded, passage, ["ahn", "full"], ReadingLimits(300, None, 4))
        compared.read(lambda: None)
        ids = torch.cat((passage.opening, passage.text))[None, :300]
        assert compared.spans == [(37, 300)]
        for mode in compared.modes:
            with ahn.mode(loaded.model, mode.name), torch.no_grad():
                scores = loaded.model(ids, use_cache=False).logits[0].log_softmax(-1)
            nll = -scores[35:299].gather(1, ids[0, 36:300, None]).mean()
            assert mode.perplexity(37, 300) == pytest.approx(float(nll.exp()), rel=1e-4)

    def test_full_attention_stops_at_the_trained_context(self, run):
        status, out, _ = run(*TINY, "--tokens", "5000", "--question", "And so?", "--modes", "full,window")
        assert status == 0
        cells = rows(out)
        stop = int(cells["full"][0].replace(",", ""))
        assert 4000 < stop < 4096
        assert f"Full attention was stopped after {stop:,} tokens: " in out
        assert f"37-{stop:,}" in out
        assert f"{stop + 1:,}-5,000" in out
        assert cells["full"][-1] == "-"

    def test_a_text_inside_the_window(self, run):
        status, out, _ = run(*TINY, "--tokens", "30", "--question", "")
        assert status == 0
        assert "Nothing was scored: up to sinks + window = 36 tokens all modes read alike." in out
        assert "Question" not in out

    def test_own_text(self, run):
        status, out, _ = run(*TINY, "--file", "text.txt", "--tokens", "all", "--question", "")
        assert status == 0
        assert "./chatty reads text.txt: 656 tokens" in out
        assert "--tokens all" not in out

    def test_a_fact_is_hidden(self, run):
        status, out, _ = run(*TINY, "--tokens", "600", "--fact", "The door is blue.", "--question", "Which colour?")
        assert status == 0
        assert 'Hidden near its beginning: "The door is blue."' in out
        assert "The hidden sentence has left the window." in out
        _, out, _ = run(*TINY, "--tokens", "30")
        assert "Hidden near its beginning" in out
        assert "has left the window" not in out
        text = with_fact("One. " * 2000, "The door is blue.")
        assert text.count("One. ") == 2000
        assert 0 < text.index("The door is blue.") <= len(text) / 10 + 5

    def test_a_hidden_fact_is_asked_for_where_full_attention_finds_it(self, run, monkeypatch):
        monkeypatch.setattr(comparison, "IN_A_HURRY", 300)
        read = {}
        for name, arguments in {"hidden": (), "asked": ("--question", "So?"), "told": ("--tokens", "400")}.items():
            status, out, _ = run(*TINY, "--seconds", "5", "--modes", "window", *arguments)
            assert status == 0
            read[name] = int(rows(out)["window"][0].replace(",", ""))
        assert (read["hidden"], read["told"]) == (300, 400)
        assert read["asked"] > 300

    def test_time_is_limited(self, run, monkeypatch):
        began = time.monotonic()
        status, out, _ = run(*TINY, "--seconds", "1", "--question", "")
        assert status == 0
        assert time.monotonic() - began < 20
        assert 36 < int(rows(out)["ahn"][0].replace(",", "")) < len(reference())

    def test_interrupted(self, run, monkeypatch):
        prefill = ComparedMode.prefill

        def interrupt(self: ComparedMode, ids: torch.Tensor) -> None:
            if self.name == "window":
                raise KeyboardInterrupt
            prefill(self, ids)

        monkeypatch.setattr(ComparedMode, "prefill", interrupt)
        status, out, err = run(*TINY, "--tokens", "600")
        assert (status, err) == (130, "interrupted\n")
        assert rows(out)["ahn"][0] == "512"
        assert rows(out)["window"][0] == "0"


class TestScreen:
    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_on_a_terminal(self, place, monkeypatch, width):  # noqa: F811
        """Nothing is wider than the terminal, and the table that lived there leaves one copy."""
        monkeypatch.chdir(place)
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=True, width=width, height=40)
        loaded = loading.load(ModelSettings("./chatty", None, WINDOW, SINKS))
        passage = prompts.passage(loaded.tokenizer, reference(), "And so?", chat=True)
        compared = Comparison(loaded, passage, ["ahn", "window", "full"], ReadingLimits(600, None, 4))
        compare(compared, Screen(console), "a text", "And so?")
        lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
        assert max(map(len, lines)) <= width

    def test_elsewhere_no_line_is_wrapped_or_animated(self, run):
        _, out, _ = run(*TINY, "--tokens", "600")
        assert "\x1b" not in out
        assert "\r" not in out
        assert len(re.findall("^ mode ", out, re.M)) == 2  # the table and the answers


class TestWriting:
    def test_pieces_join_to_the_whole(self, place):  # noqa: F811
        tokenizer = loading.load(ModelChoice(str(place / "chatty"), "none")).tokenizer
        text = "naïve – “quoted” 日本語\nand  two spaces 🙂 at the end"
        pieces = list(stream_text(tokenizer, prompts.tokens(tokenizer, text).tolist()))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
        assert len(pieces) > 20

    def test_stops(self, place):  # noqa: F811
        loaded = loading.load(ModelChoice(str(place / "chatty"), "none", WINDOW, SINKS))
        reader = Reader(loaded.model)
        reader.prefill(prompts.tokens(loaded.tokenizer, "Once upon a time"))
        assert list(decode(reader, 5, {int(reader.logits.argmax())})) == []


@needs_smollm2
def test_smollm2(smollm2_conversion, capsys):
    status = main(["demo", "--tokens", "400", "--window", "256", "--sinks", "8", "--max-new-tokens", "8"])
    out = capsys.readouterr().out
    assert status == 0
    cells = rows(out)
    ahn_, window, full = (float(cells[mode][-1]) for mode in ("ahn", "window", "full"))
    assert full < window < 40
    assert float(cells["full"][2]) == pytest.approx(400 * 46_080 / 1e6, abs=0.06)
    assert float(cells["window"][2]) == pytest.approx(264 * 46_080 / 1e6, abs=0.06)
    if "untrained" in out:
        assert ahn_ == window
