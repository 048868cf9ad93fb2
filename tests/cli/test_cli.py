"""The command line: its surface, what every wrong input gets, and what the commands do."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import FalconConfig
from transformers.utils import logging

import ahn
from ahn import native
from ahn.cache.storage import describe_cache
from ahn.cli import checks, loading, main
from ahn.cli.app import command
from tests.tiny import MEMORIES, byte_tokenizer, give_score_weights, text, tiny, with_memory

SURFACE = {
    "demo": [
        "--tokens", "--seconds", "--file", "--question", "--fact", "--modes", "--max-new-tokens", "--seed", "--model",
        "--adapter", "--window", "--sinks", "--sink-positions", "--cache-dtype", "--quantize", "--anchors",
    ],
    "generate": [
        "PROMPT", "--file", "--mode", "--max-new-tokens", "--chunk", "--temperature", "--top-k", "--top-p",
        "--repetition-penalty", "--seed", "--system", "--chat", "--no-chat", "--cache-in", "--cache-out", "--model",
        "--adapter", "--window", "--sinks", "--sink-positions", "--cache-dtype", "--quantize", "--anchors",
    ],
    "serve": [
        "--host", "--port", "--api-key", "--max-sessions", "--session-bytes", "--session-dir", "--disk-bytes",
        "--cors-origin", "--max-queue", "--max-body-bytes", "--max-prompt-tokens", "--max-seconds", "--chunk",
        "--chunk-between-steps", "MODEL", "--adapter", "--memory", "--window", "--sinks", "--sink-positions",
        "--cache-dtype", "--quantize", "--anchors",
    ],
    "chat": ["--url", "--api-key", "--document", "--system", "--max-tokens", "--temperature"],
    "inspect": ["PATH", "--json"],
    "cost": [
        "MODEL", "--context", "--window", "--sinks", "--convention", "--dtype", "--memory-positions",
        "--cache-dtype", "--plot", "--json",
    ],
    "bench": [
        "--arms", "--contexts", "--rounds", "--plot", "--json", "--model", "--adapter", "--window", "--sinks",
        "--sink-positions", "--cache-dtype", "--quantize",
    ],
    "convert": ["SOURCE", "TARGET", "--to", "--model", "--base", "--force"],
    "merge": ["MODEL", "ADAPTER", "TARGET", "--force"],
    "probe": [
        "--model", "--adapter", "--window", "--sinks", "--cache-dtype", "--quantize", "FILE", "--tokens",
        "--positions", "--top", "--html", "--json", "--memory-figures", "--seed",
    ],
}  # fmt: skip
FROZEN_ELSEWHERE = {"eval", "train"}  # commands whose surface stands in a test of their own
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
RUN = "import sys; from ahn.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets how much transformers says, for its own process."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("AHN_DEBUG", raising=False)
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def write_tokenizer(folder: Path, chat: bool) -> None:
    """A tokenizer of single bytes, with a chat template or without."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length, tokenizer.chat_template = 64, tokenizer.chat_template if chat else None
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, adapters, a cache, and files that are wrong in every way."""
    place = tmp_path_factory.mktemp("cli")
    sizes = {"vocab_size": 259, "head_dim": 8}
    for name, chat in (("model", False), ("chatty", True)):
        tiny("qwen3", **sizes).save_pretrained(place / name)
        write_tokenizer(place / name, chat)
    ahn.save(with_memory("qwen3", model=sizes), place / "adapter")
    ahn.save(with_memory("qwen3", model={**sizes, "hidden_size": 16}), place / "misfit")
    both = with_memory("qwen3", model=sizes, window=64)
    give_score_weights(both)
    ahn.save(both, place / "both")
    ahn.save_anchors(both, place / "both")
    (place / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 10)
    (place / "notes.txt").write_text("Dear diary")
    (place / "long.txt").write_text("Dear diary" * 500)
    (place / "empty.txt").write_text(" \n")
    (place / "binary.txt").write_bytes(b"PNG\0\1\2")
    (place / "latin.txt").write_bytes("café".encode("latin-1"))
    (place / "full").mkdir()
    (place / "full" / "letter.txt").write_text("dear all")
    (place / "nothing").mkdir()
    FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64).save_pretrained(
        place / "falcon"
    )
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line among these files; its exit status, standard output and standard error."""
    monkeypatch.chdir(place)

    def runner(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        return status, *capsys.readouterr()

    return runner


class TestSurface:
    @pytest.mark.parametrize("name", SURFACE)
    def test_arguments_and_options(self, name):
        found = [option for each in command().commands[name].params for option in name_of(each)]
        assert [option for option in found if option not in ("--help", "-h")] == SURFACE[name]

    def test_no_command_without_a_frozen_surface(self):
        assert set(command().commands) - FROZEN_ELSEWHERE == set(SURFACE)

    @pytest.mark.parametrize("name", SURFACE)
    def test_help_has_examples_that_fit(self, run, name):
        status, out, err = run(name, "--help")
        assert (status, err) == (0, "")
        assert f"ahn {name} " in out.split("Examples:")[1]
        assert max(map(len, out.splitlines())) <= 80

    def test_without_a_command(self, run):
        status, out, _ = run()
        assert status == 0
        assert all(name in out for name in SURFACE)

    def test_version(self, run):
        assert run("--version") == (0, f"ahn {ahn.__version__}\n", "")

    @pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["generate", "x", "--window", "0"]], ids=str)
    def test_torch_is_not_imported_for_this(self, tmp_path, arguments):
        code = f"import sys; from ahn.cli import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
        assert done.returncode == 0


def name_of(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.make_metavar(None).strip("[]{}")] if parameter.metavar is None else [parameter.metavar]
    return [*parameter.opts, *parameter.secondary_opts]


# Checked before anything is loaded: arguments, and what the one line must say.
EARLY = [
    ("generate", "there is nothing to read"),
    ("generate ''", "there is nothing to read"),
    ("generate x --file missing.txt", "--file missing.txt does not exist"),
    ("generate x --file nothing", "--file nothing is a folder"),
    ("generate x --file empty.txt", "--file empty.txt is empty"),
    ("generate x --file binary.txt", "--file binary.txt is binary"),
    ("generate x --file latin.txt", "--file latin.txt is not UTF-8 (byte 3)"),
    ("generate x --file -", "standard input is empty"),
    ("generate x --window 0", "--window must be at least 1, not 0"),
    ("generate x --window many", "Invalid value for '--window'"),
    ("generate x --sinks -1", "--sinks must be at least 0, not -1"),
    ("generate x --max-new-tokens 0", "--max-new-tokens must be at least 1, not 0"),
    ("generate x --chunk 0", "--chunk must be at least 1"),
    ("generate x --temperature -1", "--temperature must be at least 0"),
    ("generate x --temperature nan", "--temperature must be at least 0"),
    ("generate x --mode half", "--mode must be ahn, window, full or ahn+64 (so many anchors), not 'half'"),
    ("generate x --quantize int3", "--quantize must be int4, int8 or bf16"),
    ("generate x --sink-positions far", "--sink-positions must be bounded or absolute"),
    ("generate x --adapter ./missing", "--adapter ./missing does not exist"),
    ("generate x --adapter missing", "--adapter missing does not exist"),
    ("generate x --adapter text.txt", "--adapter text.txt is a file"),
    ("generate x --cache-in missing.cache", "--cache-in missing.cache does not exist"),
    ("generate x --cache-in text.txt --window 9", "--window does not go with --cache-in"),
    ("generate x --cache-in text.txt --mode ahn", "--mode does not go with --cache-in"),
    ("generate x --cache-out missing/x.cache", "there is no folder missing"),
    ("generate x --cache-out nothing", "--cache-out nothing is a folder"),
    ("generate x --cache-out x.cache --mode full", "--cache-out saves what a memory or a window keeps"),
    ("generate x --top-p 0 --temperature 1", "--top-p must be above 0 and at most 1, not 0.0"),
    ("generate x --top-p 1.5 --temperature 1", "--top-p must be above 0 and at most 1, not 1.5"),
    ("generate x --top-k 0", "--top-k must be at least 1"),
    ("generate x --top-k 5", "--top-k does nothing at --temperature 0"),
    ("generate x --repetition-penalty 0", "--repetition-penalty must be above 0"),
    ("generate x --system s --no-chat", "--system is told in a chat"),
    ("generate x --system s --cache-in text.txt", "--system stands at the beginning"),
    ("generate --chat --file -", "--file - takes the standard input, which --chat needs"),
    ("generate x --colour red", "No such option: --colour"),
    ("generate x y", "unexpected extra argument"),
    ("remember x", "No such command 'remember'"),
    ("demo --tokens 1", "--tokens must be a number of at least 2, or all, not '1'"),
    ("demo --tokens some", "--tokens must be a number of at least 2, or all, not 'some'"),
    ("demo --tokens -5", "--tokens must be"),
    ("demo --seconds 0", "--seconds must be at least 1"),
    ("generate x --anchors -1", "--anchors must be at least 0, not -1"),
    ("generate x --anchors 4 --mode ahn+8", "--anchors does not go with --mode ahn+8. Leave one of them out."),
    ("generate x --window 9 --mode full", "--window does not go with --mode full. Leave one of them out."),
    ("generate x --sinks 9 --mode full", "--sinks does not go with --mode full. Leave one of them out."),
    ("generate x --sink-positions bounded --mode full", "--sink-positions does not go with --mode full."),
    ("generate x --cache-dtype float16 --mode full", "--cache-dtype does not go with --mode full."),
    ("generate x --cache-dtype float16 --cache-in text.txt", "--cache-dtype does not go with --cache-in"),
    ("demo --anchors 4 --modes ahn", "--anchors does not go with --modes, whose names say how many: ahn+64"),
    ("demo --modes ahn,half", "--modes must be ahn, window, full or ahn+64 (so many anchors), not 'half'"),
    ("demo --modes ,", "--modes must be ahn, window, full or ahn+64 (so many anchors), not ''"),
    ("demo --file missing.txt", "--file missing.txt does not exist"),
    ("demo --window 0", "--window must be at least 1"),
    ("inspect", "Missing argument 'PATH'"),
    ("inspect ''", "there is no path"),
    ("cost", "Missing argument 'MODEL'"),
    ("cost model --context 0", "--context must be at least 1, not 0"),
    ("cost model --context many", "Invalid value for '--context'"),
    ("cost model --window 0", "--window must be at least 1, not 0"),
    ("cost model --sinks -1", "--sinks must be at least 0, not -1"),
    ("cost model --convention guess", "--convention must be actual or paper, not 'guess'"),
    ("cost model --dtype int8", "--dtype must be float32, bfloat16, float16 or auto, not 'int8'"),
    ("cost model --memory-positions far", "--memory-positions must be rope or none, not 'far'"),
    ("cost model --convention paper --dtype float32", "--dtype does not go with --convention paper"),
    ("cost model --plot cost.pdf", "--plot cost.pdf must end in .png or .svg"),
    ("cost model --plot cost", "--plot cost must end in .png or .svg"),
    ("cost model --plot missing/cost.png", "--plot: there is no folder missing"),
    ("convert adapter full", "full is not empty"),
    ("convert adapter full --force", "full holds other things than a checkpoint"),
    ("convert adapter text.txt", "text.txt is a file"),
    ("convert adapter adapter --force", "adapter is the source itself"),
    ("convert adapter new --to paper", "--to must be adapter or published, not 'paper'"),
    ("probe missing.txt", "FILE missing.txt does not exist"),
    ("probe nothing", "FILE nothing is a folder"),
    ("probe empty.txt", "FILE empty.txt is empty"),
    ("probe -", "standard input is empty"),
    ("probe --window 0", "--window must be at least 1, not 0"),
    ("probe --sinks -1", "--sinks must be at least 0, not -1"),
    ("probe --positions first", "--positions must be all or last, not 'first'"),
    ("probe --top 0", "--top must be at least 1, not 0"),
    ("probe --tokens 68", "--tokens 68 do not pass sinks + window = 68"),
    ("probe --window 1000", "--tokens 400 do not pass sinks + window = 1,004"),
    ("probe --seed -1", "--seed must be at least 0, not -1"),
    ("probe --adapter ./missing", "--adapter ./missing does not exist"),
    ("probe text.txt --html text.txt", "--html text.txt is read too, and would be lost"),
    ("probe text.txt --json /dev/null", "--json /dev/null is no regular file"),
    ("probe --html missing/x.html", "--html: there is no folder missing"),
    ("probe --json nothing", "--json nothing is a folder"),
    ("probe --html x --json ./x", "--html and --json both name x"),
    ("probe --memory-figures text.txt", "--memory-figures text.txt is a file"),
    ("merge model adapter full", "full is not empty"),
    ("merge model adapter model --force", "model is the source itself"),
]
# Needs the library to be found.
LATE = [
    ("generate x --model no-such-model", "no model named 'no-such-model'"),
    ("generate x --model ./missing", "There is no folder at './missing'"),
    ("generate x --model nothing", "'nothing' has no config.json"),
    ("generate x --model adapter", "'adapter' holds an adapter, not a base model"),
    ("generate x --model ./model --adapter nothing", "nothing: it holds neither ahn_config.json nor config.json"),
    ("generate x --model ./model --adapter misfit", "hidden_size"),
    ("generate x --model ./model --chat", "./model has no chat template. Leave --chat out."),
    ("generate x --model ./model --window 5000", "exceed the 4096 positions"),
    ("generate x --model ./model --cache-in text.txt", "text.txt is damaged or no saved cache"),
    ("demo --model no-such-model", "no model named 'no-such-model'"),
    ("inspect missing", "missing: there is no such folder"),
    ("inspect nothing", "nothing: it holds neither"),
    ("inspect text.txt", "text.txt is damaged or no saved cache"),
    ("inspect model", "model: "),
    ("cost no-such-model", "no model named 'no-such-model'. Built in: smollm2-135m, qwen2.5-3b, qwen2.5-7b"),
    ("cost ''", "no model named ''"),
    ("cost ./missing", "There is no folder at './missing'"),
    ("cost nothing", "'nothing' has no config.json"),
    ("cost text.txt", "'text.txt' is a file"),
    ("cost adapter", "'adapter' holds an adapter, not a base model"),
    ("cost falcon", "no memory can be attached to FalconForCausalLM"),
    ("convert missing new", "missing: there is no such folder"),
    ("convert adapter new --to adapter", "it has the adapter format already"),
    ("probe --model no-such-model", "no model named 'no-such-model'"),
    ("probe notes.txt --model ./model", "the text has 10 tokens, and sinks + window keep 68 exactly"),
    ("probe --model ./model --tokens 5000 long.txt", "trained on texts of up to 4,096; give a shorter text"),
    ("merge missing-model adapter new", "no model named 'missing-model'"),
    ("merge ./model ./missing new", "./missing: there is no such folder"),
]


def check_error(outcome: tuple[int, str, str], says: str) -> None:
    status, out, err = outcome
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert "Traceback" not in err


class TestWrongInput:
    @pytest.mark.parametrize(("line", "says"), EARLY, ids=[line for line, _ in EARLY])
    def test_before_anything_is_loaded(self, run, monkeypatch, line, says):
        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("loaded")

        monkeypatch.setattr(loading, "load", never)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        check_error(run(*words(line)), says)

    @pytest.mark.parametrize(("line", "says"), LATE, ids=[line for line, _ in LATE])
    def test_one_line(self, run, line, says):
        check_error(run(*words(line)), says)
        assert not Path("new").exists()

    def test_keyboard_as_a_file(self, run, monkeypatch):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        check_error(run("generate", "x", "--file", "-"), "which is the keyboard here")

    def test_failure_on_the_way(self, run, monkeypatch):
        monkeypatch.setattr(loading, "load", lambda *_, **__: 1 / 0)
        status, _, err = run("generate", "x")
        assert (status, err) == (1, "error: unexpected ZeroDivisionError: division by zero (AHN_DEBUG=1 shows where)\n")

    def test_a_model_on_the_hub_that_cannot_be_reached(self, run, monkeypatch):
        """The first request says so, and names the model: each further one would be tried for half a minute."""

        def unreachable(*_: Any, **__: Any) -> None:
            raise ConnectionError("Name or service not known")

        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        monkeypatch.setattr("ahn.models.load_tokenizer", lambda *_, **__: pytest.fail("went on"))
        check_error(
            run("generate", "x", "--model", "foo/bar"), "foo/bar: this is no local folder and cannot be fetched"
        )

    def test_out_of_memory(self, run, monkeypatch):
        def exhaust(*_: Any, **__: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(loading, "load", exhaust)
        status, _, err = run("generate", "x")
        assert status == 1
        assert err.startswith("error: out of memory; try a smaller --window")

    def test_traceback_on_request(self, run, monkeypatch):
        monkeypatch.setenv("AHN_DEBUG", "1")
        with pytest.raises(ahn.AHNError):
            run("inspect", "missing")

    def test_interrupted(self, run, monkeypatch):
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(loading, "load", interrupt)
        assert run("generate", "x") == (130, "", "interrupted\n")

    def test_a_reader_that_leaves(self, place):
        code = f"{sys.executable} -c '{RUN}' generate --help | true"
        done = subprocess.run(
            ["bash", "-c", code], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
        assert done.stderr == ""


def words(line: str) -> list[str]:
    return ["" if word == "''" else word for word in line.split()]


TINY = ("--model", "./model", "--window", "16", "--sinks", "4", "--max-new-tokens", "8")


class TestGenerate:
    def test_prompt(self, run):
        status, out, err = run("generate", "Once upon", *TINY)
        assert (status, err) == (0, "")
        assert out.endswith("\n")
        assert run("generate", "Once upon", *TINY) == (0, out, "")

    def test_modes_differ_with_an_adapter_alone(self, run):
        text = ("generate", "and so?", "--file", "text.txt", *TINY, "--mode")
        assert run(*text, "window")[1] == run(*text, "ahn")[1]
        assert run(*text, "ahn", "--adapter", "adapter")[1] != run(*text, "ahn")[1]

    def test_anchors_are_kept_with_the_cache(self, run, tmp_path):
        cache = str(tmp_path / "text.cache")
        text = ("generate", "--file", "text.txt", *TINY, "--mode", "ahn+4")
        whole = run(*text, "and so?")
        assert whole[0] == 0
        assert whole[1] != run(*text[:-1], "ahn", "and so?")[1]
        assert run(*text, "--cache-out", cache)[0] == 0
        ask = ("generate", "\n\nand so?", "--model", "./model", "--max-new-tokens", "8", "--cache-in", cache)
        assert run(*ask, "--adapter", "none")[1] == whole[1]
        check_error(run(*text[:-1], "ahn+4:learned", "and so?"), "has no weights on this model")

    def test_anchors_are_read_where_there_are_weights_for_them(self, run, tmp_path):
        ask = ("generate", "and so?", "--file", "text.txt", *TINY, "--window", "64", "--adapter", "both")
        usual = run(*ask)
        assert (
            "reads with a memory gated_delta_net from both and 128 anchors, chosen with weights from both\n" in usual[2]
        )
        assert usual[:2] == run(*ask, "--mode", "ahn+128")[:2] == run(*ask, "--anchors", "128")[:2]
        without = run(*ask, "--anchors", "0")
        assert "reads with a memory gated_delta_net from both, no anchors\n" in without[2]
        assert without[1] != usual[1]
        assert "reads with" not in run(*ask, "--mode", "window")[2]
        cache = str(tmp_path / "text.cache")
        assert run(*ask[:1], *ask[2:], "--cache-out", cache, "--anchors", "8")[0] == 0
        again = ("generate", "and so?", "--model", "./model", "--adapter", "both", "--cache-in", cache)
        assert "and 8 anchors" in run(*again)[2]
        check_error(run(*again, "--anchors", "8"), "--anchors does not go with --cache-in")
        assert "no anchors" in run(*ask, "--window", "1")[2]  # too short a window to choose any

    @pytest.mark.parametrize(("options", "expected"), [((), "bounded"), (("--sink-positions", "absolute"), "absolute")])
    def test_positions_that_a_long_text_stays_readable_at(self, run, tmp_path, options, expected):
        cache = tmp_path / "text.cache"
        ask = ("generate", "--file", "text.txt", *TINY, "--adapter", "adapter", "--cache-out", str(cache), *options)
        assert run(*ask)[0] == 0
        assert describe_cache(cache)["settings"]["sink_positions"] == expected

    def test_says_what_it_read(self, run):
        status, _, err = run("generate", "and so?", "--file", "text.txt", *TINY)
        assert status == 0
        assert err.startswith("read 659 tokens in ")
        assert "tokens/s, cache 0.0 MB (full attention: 0.3 MB)" in err
        assert err.count("\n") == 1

    def test_chunks_change_nothing(self, run):
        text = ("generate", "and so?", "--file", "text.txt", *TINY, "--adapter", "adapter")
        assert run(*text, "--chunk", "7")[1] == run(*text)[1]

    def test_standard_input(self, run, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("text.txt").read_bytes())))
        piped = run("generate", "and so?", "--file", "-", *TINY)[1]
        assert piped == run("generate", "and so?", "--file", "text.txt", *TINY)[1]

    def test_seed_and_temperature(self, run):
        text = ("generate", "Once upon", *TINY, "--temperature", "1")
        drawn = {run(*text, "--seed", str(seed))[1] for seed in (1, 2, 3)}
        assert len(drawn) > 1
        assert run(*text, "--seed", "1")[1] == run(*text, "--seed", "1")[1]

    def test_read_once_ask_often(self, run, tmp_path):
        cache = str(tmp_path / "text.cache")
        status, out, err = run(
            "generate", "--file", "text.txt", "--cache-out", cache, *TINY, "--adapter", "adapter", "--mode", "ahn"
        )
        assert (status, out) == (0, "")
        assert f"saved {cache}: 650 tokens in" in err
        ask = ("generate", "\n\nand so?", "--model", "./model", "--max-new-tokens", "8", "--cache-in", cache)
        whole = run("generate", "and so?", "--file", "text.txt", *TINY, "--adapter", "adapter")
        assert run(*ask, "--adapter", "adapter")[:2] == whole[:2]
        check_error(
            run("generate", "x", "--model", "./model", "--cache-in", "adapter/ahn.safetensors"), "no saved cache"
        )

    def test_chat_turns_go_on(self, run, tmp_path):
        cache = str(tmp_path / "chat.cache")
        settings = ("--model", "./chatty", "--max-new-tokens", "4")
        status, first, _ = run("generate", "Hello", *settings, "--window", "64", "--cache-out", cache)
        assert status == 0
        held = ahn_cache(cache)
        opened = len("<user>Hello") + 1 + len("<assistant>")
        assert opened < held <= opened + 4
        status, second, _ = run("generate", "And then?", *settings, "--cache-in", cache, "--cache-out", cache)
        assert status == 0
        assert ahn_cache(cache) > held + len("And then?")
        assert run("generate", "Hello", *settings, "--no-chat")[1] not in (first, second)

    def test_top_k_and_top_p(self, run):
        draws = ("generate", "Once upon", *TINY, "--temperature", "3", "--seed", "1")
        likeliest = run("generate", "Once upon", *TINY)[1]
        assert run(*draws)[1] != likeliest
        for option in (("--top-k", "1"), ("--top-p", "0.000001")):
            assert run(*draws, *option)[1] == likeliest
        assert run(*draws, "--top-p", "1", "--repetition-penalty", "1")[1] == run(*draws)[1]

    def test_repetition_penalty(self, run):
        plain = run("generate", "Once upon", *TINY, "--max-new-tokens", "40")[1]
        other = run("generate", "Once upon", *TINY, "--max-new-tokens", "40", "--repetition-penalty", "50")[1]
        assert len(set(other)) > len(set(plain))

    def test_system(self, run):
        text = ("generate", "Hello", "--model", "./chatty", "--max-new-tokens", "4")
        assert run(*text, "--system", "Be brief. " * 9)[1] != run(*text)[1]
        check_error(run("generate", "x", *TINY, "--system", "s"), "./model has no chat template. Leave --system out.")


class TestChat:
    TALK = ("generate", "--chat", "--model", "./chatty", "--max-new-tokens", "6", "--window", "64")

    @pytest.fixture
    def say(self, run, monkeypatch):
        def say(*lines: str, more: tuple[str, ...] = ()) -> tuple[int, str, str]:
            monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            return run(*self.TALK, *more)

        return say

    def test_each_turn_reads_only_what_is_new(self, run, say, tmp_path):
        status, out, err = say("Hello", "", "And then?", "/exit", "never said")
        assert status == 0
        assert "Ctrl-C" not in err  # a hint for people at a keyboard
        cache = str(tmp_path / "chat.cache")
        turn = ("--model", "./chatty", "--max-new-tokens", "6", "--cache-out", cache)
        first = run("generate", "Hello", *turn, "--window", "64")[1]
        assert out == first + run("generate", "And then?", *turn, "--cache-in", cache)[1]

    def test_with_a_text_and_a_system_prompt(self, run, say):
        more = ("--file", "notes.txt", "--system", "Be brief.")
        alone = run("generate", "and so?", *self.TALK[2:], *more)[1]
        assert say("and so?", more=more)[1] == alone

    def test_is_saved_and_goes_on(self, run, say, tmp_path):
        cache = str(tmp_path / "chat.cache")
        whole = say("Hello", "And then?")[1]
        first = say("Hello", more=("--cache-out", cache))
        assert f"saved {cache}" in first[2]
        on = ("--cache-in", cache, "--cache-out", cache)
        self.TALK, talk = self.TALK[:-2], self.TALK
        assert first[1] + say("And then?", more=on)[1] == whole
        self.TALK = talk

    def test_ctrl_c_stops_an_answer(self, say, monkeypatch):
        from ahn import generation

        stream, turns = generation.stream_text, []

        def interrupting(tokenizer: Any, ids: Iterator[int]) -> Iterator[str]:
            turns.append(0)
            for words in stream(tokenizer, ids):
                turns[-1] += 1
                if turns == [1]:
                    os.kill(os.getpid(), signal.SIGINT)
                yield words

        monkeypatch.setattr(generation, "stream_text", interrupting)
        assert say("Hello", "And then?")[0] == 0
        assert turns[0] < turns[1]

    def test_needs_a_template(self, run):
        check_error(run("generate", "--chat", "--model", "./model"), "./model has no chat template. Leave --chat out.")


class TestHostileInput:
    """What unlucky files, names and terminals get."""

    @pytest.mark.parametrize("columns", ["0", "-3", "wide", ""])
    def test_a_width_of_nothing(self, run, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", columns)
        check_error(run("generate", "x", "--window", "0"), "--window must be at least 1, not 0")

    def test_an_output_that_lacks_letters(self, run, monkeypatch, tmp_path):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", out)
        cache = tmp_path / "text.cache"
        assert run("generate", "Once upon", *TINY, "--max-new-tokens", "40", "--cache-out", str(cache))[0] == 0
        assert cache.is_file()

    @pytest.mark.parametrize("name", ["stdout", "stderr"])
    def test_a_closed_output(self, run, monkeypatch, tmp_path, name):
        cache = tmp_path / "text.cache"
        monkeypatch.setattr(f"sys.{name}", None)
        assert run("generate", "Once upon", *TINY, "--cache-out", str(cache))[0] == 0
        assert cache.is_file()

    @pytest.mark.parametrize(
        "line",
        [
            "generate x --file {}",
            "generate x --model {}",
            "generate x --model ./{}",
            "generate x --adapter ./{}",
            "generate x --model ./model --adapter a/{}",
            "generate x --cache-in {}",
            "generate x --cache-out {}",
            "inspect {}",
            "convert adapter {}",
            "convert {} new",
            "merge {} adapter new",
            "merge model adapter {}",
            "cost {}",
            "probe {}",
            "probe --html {}",
            "demo --file {}",
            "bench --json {}",
            "train --data text.txt --out {}",
            "train --data {} --out new",
            "eval perplexity {}",
            "eval perplexity text.txt --out {}",
            "eval score {}",
            "eval compare {} {}",
        ],
    )
    def test_names_that_are_too_long(self, run, line):
        name = "n" * 300
        status, _, err = run(*line.replace("{}", name).split())
        assert status == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "unexpected" not in err

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"hidden_size": -1}, "hidden_size is -1"),
            ({"hidden_size": 0}, "hidden_size is 0"),
            ({"hidden_size": "x\x1b[31m"}, "Field 'hidden_size' expected int, got str"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
            ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ],
        ids=str,
    )
    def test_sizes_of_no_model(self, run, place, tmp_path, changes, says):
        shutil.copytree(place / "model", tmp_path / "odd")
        config = json.loads((tmp_path / "odd" / "config.json").read_text())
        (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, **changes}))
        for command_ in (("generate", "x", "--model", str(tmp_path / "odd")), ("cost", str(tmp_path / "odd"))):
            status, out, err = run(*command_)
            check_error((status, out, err), says)
            assert "\x1b" not in err

    def test_deep_nesting(self, run, place, tmp_path):
        deep = "[" * 100_000 + "]" * 100_000
        shutil.copytree(place / "adapter", tmp_path / "deep")
        (tmp_path / "deep" / "ahn_config.json").write_text(f'{{"a": {deep}}}')
        (tmp_path / "deep.yaml").write_text(f"a: {'[' * 5000}{']' * 5000}")
        (tmp_path / "deep.jsonl").write_text(deep)
        check_error(run("inspect", str(tmp_path / "deep")), "it cannot be read (maximum recursion depth exceeded")
        check_error(run("eval", "score", str(tmp_path / "deep.jsonl"), "--task", "passkey"), "nested too deeply")
        train = ("train", "--data", "text.txt", "--out", "new", "--config", str(tmp_path / "deep.yaml"))
        check_error(run(*train), "is no YAML: maximum recursion depth exceeded")

    def test_weights_that_are_no_numbers(self, run, place, tmp_path):
        shutil.copytree(place / "model", tmp_path / "nan")
        tensors = load_file(tmp_path / "nan" / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
        check_error(run("generate", "x", "--model", str(tmp_path / "nan"), *TINY[2:]), "the model computes NaN")

    def test_control_characters_stay_out_of_the_terminal(self, run, place, tmp_path, monkeypatch):
        shutil.copytree(place / "adapter", tmp_path / "red")
        file = tmp_path / "red" / "ahn_config.json"
        config = json.loads(file.read_text())
        config["base"]["name"] = "a\x1b[31mred\x07/\x9b31m"
        file.write_text(json.dumps(config))
        status, out, _ = run("inspect", str(tmp_path / "red"))
        assert status == 0
        assert "a\\x1b[31mred\\x07/\\x9b31m" in out
        config["config"]["memory"] = "\x1b]0;title\x07"
        file.write_text(json.dumps(config))
        said = run("inspect", str(tmp_path / "red"))
        check_error(said, "it holds an unknown memory")
        assert not set("\x1b\x07\x9b") & set(out + said[1] + said[2])


def ahn_cache(path: str) -> int:
    from ahn.cache.storage import describe_cache

    return int(describe_cache(path)["seen_tokens"])


class TestInspect:
    def test_adapter(self, run):
        status, out, err = run("inspect", "adapter")
        assert (status, err) == (0, "")
        assert "gated_delta_net" in out
        assert "0-2 (3)" in out
        facts = json.loads(run("inspect", "adapter", "--json")[1])
        assert facts["kind"] == "adapter"
        assert facts["layers"] == [0, 1, 2]
        assert facts["window"] == 16

    def test_cache(self, run, tmp_path):
        cache = str(tmp_path / "text.cache")
        run("generate", "--file", "text.txt", "--cache-out", cache, *TINY)
        status, out, _ = run("inspect", cache)
        assert status == 0
        assert "seen tokens" in out
        facts = json.loads(run("inspect", cache, "--json")[1])
        assert (facts["kind"], facts["seen_tokens"], facts["window"], facts["sinks"]) == ("cache", 650, 16, 4)
        assert facts["memory"] == "gated_delta_net"


class TestProbe:
    FILE = ("probe", "text.txt", "--model", "./model", "--window", "16", "--tokens", "80")

    def test_table_and_files(self, run, tmp_path):
        html, data, folder = (tmp_path / name for name in ("probe.html", "probe.json", "figures"))
        words = (*self.FILE, "--adapter", "adapter", "--top", "3", "--html", str(html), "--json", str(data))
        status, out, err = run(*words, "--memory-figures", str(folder))
        assert (status, err) == (0, "")
        assert "reads the first 80 tokens of text.txt: sinks 4, window 16, 60 evicted." in out
        assert "gated_delta_net, weights from adapter." in out
        table = [line for line in out.splitlines() if "[" in line]
        facts = json.loads(data.read_text(encoding="utf-8"))
        tokens, results = facts["results"]["tokens"], facts["results"]
        assert "".join(token["text"] for token in tokens) == Path("text.txt").read_text()[:80]
        assert [token["part"] for token in tokens] == ["sinks"] * 4 + ["evicted"] * 60 + ["window"] * 16
        ranked = sorted(tokens[4:64], key=lambda token: -token["gradient"])
        assert [int(line.split()[0]) for line in table] == [token["position"] for token in ranked[:3]]
        assert [len(results["gates"][name]) for name in ("write", "decay")] == [3, 3]
        assert (facts["command"], facts["settings"]["window"], results["positions"]) == ("probe", 16, 60)
        page = html.read_text(encoding="utf-8")
        assert page.count('<span class="evicted"') == 60
        assert page.count("<svg ") == 3
        assert not re.search(r"(src|href)=.?(https?:|//)", page)
        assert sorted(path.name for path in folder.iterdir()) == ["decay.png", "rank.png", "write.png"]

    def test_colours_on_a_terminal(self, run, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        status, out, _ = run(*self.FILE, "--adapter", "adapter")
        assert status == 0
        assert "\x1b[38;5;16;48;5;" in out
        assert "sinks" in out.split("evicted, gradient:")[1]

    def test_an_untrained_memory_is_called_that(self, run):
        first = run(*self.FILE, "--adapter", "none")
        assert "untrained, so that it gives nothing back" in first[1]
        assert run(*self.FILE, "--adapter", "none") == first

    def test_the_story_is_as_long_as_what_is_read(self, run):
        status, out, _ = run("probe", "--model", "./model", "--window", "32", "--tokens", "40")
        assert status == 0
        assert "the first 40 tokens of a short story" in out


class TestBench:
    def test_tables_and_files(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        data, plot = tmp_path / "speed.json", tmp_path / "speed.svg"
        given = "bench --model ./model --adapter adapter --window 16 --sinks 4 --sink-positions absolute --rounds 1"
        words = (*given.split(), "--contexts", "40,9", "--arms", "window,ahn+4,ahn")
        status, out, err = run(*words, "--json", str(data), "--plot", str(plot))
        assert status == 0
        assert "Writing one token" in out
        assert "x window" in out
        assert "…" not in out
        assert [line.split()[0] for line in out.splitlines() if " ahn+4 " in line] == ["9", "40"] * 2
        assert f"wrote {plot}" in err
        facts = json.loads(data.read_text(encoding="utf-8"))
        assert [row["context"] for row in facts["decoding"]] == [9] * 3 + [40] * 3
        assert facts["settings"]["window"] == 16
        assert "<svg" in plot.read_text(encoding="utf-8")
        assert ("without the kernels" in err) == (native.why_not() is not None)
        assert facts["environment"]["kernels"] == ("torch" if native.why_not() else "C")

    def test_says_when_the_kernels_are_missing(self, run, monkeypatch):
        monkeypatch.setattr(native, "_kernels", lambda: "there is no C compiler; install gcc or clang")
        given = "bench --model ./model --window 16 --sinks 4 --rounds 1 --contexts 9 --arms window"
        status, _, err = run(*given.split())
        assert status == 0
        assert "measured without the kernels in C, which are faster: there is no C compiler" in " ".join(err.split())


class TestCost:
    @pytest.mark.parametrize(
        ("size", "says"),
        [
            (
                "3b",
                "3.29e15 -> 1.95e15 FLOPs (59.4 %) and 9.44 -> 2.45 GB (26.0 %), for 13.0 M more parameters (0.42 %)",
            ),
            ("14b", "11.83e15 -> 7.39e15 FLOPs (62.5 %) and 50.33 -> 13.01 GB (25.9 %), for 61.0 M more parameters"),
            ("7b", "7B: the paper prints other FLOPs than its own formula gives"),
        ],
        ids=["3b", "14b", "7b"],
    )
    def test_as_the_paper_counts(self, run, size, says):
        status, out, err = run("cost", f"qwen2.5-{size}", "--convention", "paper")
        assert (status, err) == (0, "")
        assert says in out
        table = out.split("\n\n")[1].splitlines()
        assert [line.split()[0] for line in table[3:]] == ["full", "window", "ct", *MEMORIES]
        assert max(map(len, table)) <= 80
        assert "\u2026" not in out  # nothing is cut off

    def test_json_is_what_a_cache_holds(self, run):
        words = ("cost", "./model", "--context", "90", "--window", "16", "--sinks", "4")
        status, out, err = run(*words, "--dtype", "float32", "--json")
        assert (status, err) == (0, "")
        facts = json.loads(out)
        model = tiny("qwen3", vocab_size=259, head_dim=8)
        assert facts["base_parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert (facts["convention"], facts["dtype"], facts["layers"]) == ("actual", "float32", 3)
        for memory in MEMORIES:
            with ahn.attached(model, ahn.AHNConfig(memory, window=16, sinks=4)):
                cache = ahn.HippocampalCache(model)
                model(text(1, 90), cache=cache)
                assert facts["costs"][memory]["cache_bytes"] == cache.nbytes
        assert facts["share_of_full"]["full"] == dict.fromkeys(facts["share_of_full"]["full"], 1.0)
        assert facts["notes"][0] in run(*words, "--dtype", "float32")[1]

    def test_memory_positions(self, run):
        words = ("cost", "./model", "--context", "90", "--window", "16", "--sinks", "4", "--json")
        bytes_held = [
            json.loads(run(*words, "--memory-positions", each)[1])["costs"]["mamba2"]["cache_bytes"]
            for each in ("rope", "none")
        ]
        assert bytes_held[1] - bytes_held[0] == 3 * 20 * 4  # layers, tokens, bytes of a position

    def test_plots(self, run, tmp_path):
        pytest.importorskip("matplotlib")
        files = [tmp_path / "cost.png", tmp_path / "cost.svg"]
        words = ("cost", "./model", "--context", "90", "--window", "16", "--sinks", "4")
        status, out, err = run(*words, "--plot", str(files[0]), "--plot", str(files[1]))
        assert (status, err) == (0, "")
        assert all(f"wrote {file}" in out for file in files)
        assert files[0].read_bytes().startswith(b"\x89PNG")
        assert "<svg" in files[1].read_text()

    def test_plot_without_matplotlib(self, run, monkeypatch, tmp_path):
        monkeypatch.setattr(checks, "find_spec", lambda name: None)
        outcome = run("cost", "./model", "--plot", str(tmp_path / "cost.png"))
        check_error(outcome, "--plot needs matplotlib. Install it: pip install 'ahn[train]'")


class TestConvertAndMerge:
    def test_there_and_back(self, run, tmp_path):
        published, back = str(tmp_path / "published"), str(tmp_path / "back")
        assert run("convert", "adapter", published, "--model", "./model")[0] == 0
        assert json.loads(run("inspect", published, "--json")[1])["kind"] == "published"
        status, out, _ = run("convert", published, back)
        assert status == 0
        assert out.startswith(f"wrote {back}: adapter, gated_delta_net in 3 layers, ")
        there, again = (json.loads(run("inspect", name, "--json")[1]) for name in ("adapter", back))
        assert there["parameters"] == again["parameters"]

    def test_force(self, run, tmp_path):
        target = tmp_path / "published"
        line = ("convert", "adapter", str(target), "--base", "./model")
        assert run(*line)[0] == 0
        (target / "old.txt").write_text("old")
        check_error(run(*line), "is not empty")
        assert run(*line, "--force")[0] == 0
        assert not (target / "old.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["published"]

    def test_force_keeps_what_is_there_when_it_fails(self, run, tmp_path):
        target = tmp_path / "published"
        run("convert", "adapter", str(target), "--base", "./model")
        check_error(run("merge", "./model", "misfit", str(target), "--force"), "hidden_size")
        assert run("inspect", str(target))[0] == 0
        assert [path.name for path in tmp_path.iterdir()] == ["published"]

    def test_merged_model_reads_as_base_and_adapter(self, run, tmp_path):
        merged = str(tmp_path / "merged")
        status, out, _ = run("merge", "./model", "adapter", merged)
        assert status == 0
        assert out.startswith(f"wrote {merged}: ")
        rest = ("and so?", "--file", "text.txt", "--window", "16", "--sinks", "4", "--max-new-tokens", "8")
        apart = run("generate", *rest, "--model", "./model", "--adapter", "adapter")[1]
        assert run("generate", *rest, "--model", merged)[1] == apart
