"""Streaming perplexity: every sum against loops over single tokens, what a stop costs, and the command itself."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ahn
from ahn.cli import main
from ahn.evaluation import EvaluationError
from ahn.evaluation.arm_names import find_arm
from ahn.evaluation.arms import arm_reader
from ahn.evaluation.journal import Journal
from ahn.evaluation.perplexity import reading as measuring
from ahn.evaluation.perplexity.averages import Averages, part_of_gap
from ahn.evaluation.perplexity.cache_sizes import CacheSizes
from ahn.evaluation.perplexity.documents import TokenDocument, excerpts, whole
from ahn.evaluation.perplexity.gap import lines
from ahn.evaluation.perplexity.ngrams import GROUPS, group_tokens
from ahn.evaluation.perplexity.reading import PerplexityPlan, bin_tokens, key, make_plan, measure, read_all
from ahn.evaluation.report import read_report
from ahn.generation import read
from tests.cli.test_cli import as_before, place  # noqa: F401 (fixtures)
from tests.tiny import tiny, with_memory

SINKS, WINDOW = 5, 16
EXACT = SINKS + WINDOW


def ids(tokens: int, seed: int = 0, words: int = 12) -> Any:
    """Few different tokens, so that n-grams return."""
    return np.random.default_rng(seed).integers(3, 3 + words, tokens)


def slow_groups(texts: list[Any], document: Any, n: int, most: int, sinks: int, window: int) -> list[str]:
    """The same as `group_tokens`, by looking."""
    windows = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    found = []
    for token in range(1, len(document)):
        gram = tuple(document[token - n + 1 : token + 1]) if token >= n - 1 else None
        ends = [end for end in range(n - 1, token) if tuple(document[end - n + 1 : end + 1]) == gram]
        if gram is None:
            found.append("never")
        elif windows.count(gram) > most:
            found.append("often")
        elif not ends:
            found.append("never")
        else:
            seen = ends[-1] < sinks or token - 1 - ends[-1] < window  # the query is the token before
            found.append("window" if seen else "evicted")
    return found


class TestGroups:
    @pytest.mark.parametrize("n", [2, 3, 4])
    @pytest.mark.parametrize("most", [3, 6])
    def test_as_by_looking(self, n: int, most: int) -> None:
        texts = [ids(150, seed, words={2: 9, 3: 5, 4: 4}[n]) for seed in range(2)]
        documents = [texts[0], texts[1][:90], np.concatenate(([1], texts[1][40:120]))]
        found = group_tokens(texts, documents, n, most, SINKS, WINDOW)
        for document, groups in zip(documents, found, strict=True):
            assert [GROUPS[group] for group in groups] == slow_groups(texts, document, n, most, SINKS, WINDOW)
        assert {GROUPS[group] for each in found for group in each} >= {"evicted", "never"}

    def test_large_vocabularies(self) -> None:
        text = ids(80) * 20_000
        small, large = (group_tokens([each], [each], 4, 3, SINKS, WINDOW)[0] for each in (text // 20_000, text))
        assert (small == large).all()

    def test_short_texts(self) -> None:
        assert [len(each) for each in group_tokens([ids(2)], [ids(2), ids(1), ids(0)], 3, 2, 0, 4)] == [1, 0, 0]


class TestDocuments:
    def test_whole(self) -> None:
        texts = {"a": ids(30), "b": ids(4)}
        assert [len(each.ids) for each in whole(texts, [], None)] == [30, 4]
        cut = whole(texts, [1], 10)
        assert [len(each.ids) for each in cut] == [10, 5]
        assert cut[0].ids[0] == 1
        assert (cut[0].ids[1:] == texts["a"][:9]).all()

    def test_pieces_are_those_of_training(self, tmp_path: Path, place: Path) -> None:  # noqa: F811
        """The rule by which the shipped memories were measured: full pieces, at even distances over all texts."""
        from ahn.models import load_tokenizer
        from ahn.models.text import evenly, opening_of, text_tokens
        from ahn.training import Cut, load_pieces

        tokenizer = load_tokenizer(str(place / "model"))
        for name, count in (("a.txt", 95), ("b.txt", 31)):
            (tmp_path / name).write_text("".join(f"{number:04d} " for number in range(count)))
        found, _ = load_pieces([str(tmp_path)], tokenizer, Cut(16, 16))
        expected = [found[number]["input_ids"].tolist() for number in evenly(range(len(found)), 7)]
        texts = {file.name: np.array(text_tokens(file.read_text(), tokenizer)) for file in sorted(tmp_path.iterdir())}
        cut = excerpts(texts, opening_of(tokenizer), 16, 7)
        assert [each.ids.tolist() for each in cut] == expected
        assert cut[0].name == "a.txt, token 32"

    def test_an_opening_begins_every_piece(self) -> None:
        cut = excerpts({"a": ids(20)}, [1], 6, 4)
        assert all(len(each.ids) == 6 and each.ids[0] == 1 for each in cut)
        assert [each.name for each in cut] == ["a, token 0", "a, token 5", "a, token 10", "a, token 15"]

    def test_too_few(self) -> None:
        with pytest.raises(EvaluationError, match="of 3 pieces of 10 tokens the texts hold 2 only"):
            excerpts({"a": ids(29)}, [], 10, 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return with_memory()


def documents() -> list[TokenDocument]:
    return [TokenDocument("a", ids(200)), TokenDocument("b", ids(90, 1)), TokenDocument("c", ids(120, 2))]


def scores(model: Any, arm: Any, document: TokenDocument) -> Any:
    with ahn.mode(model, arm):
        return read(model, torch.from_numpy(document.ids)).nll.double().numpy()


class TestMeasure:
    @pytest.mark.parametrize("arm", ["full", "window", "ahn", "tail"])
    def test_sums(self, model: Any, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measuring, "automatic_chunk", lambda model: 33)
        document = documents()[0]
        plan = PerplexityPlan([arm, "full"], EXACT, 16, 150)
        groups = group_tokens([document.ids], [document.ids], 3, 4, SINKS, WINDOW)[0]
        record = measure(model, arm, document, groups, plan)
        end = 150 if arm == "full" else 200
        assert record["tokens"] == end
        assert sum(number for _, number in record["bins"]) == end - 1
        assert record["points"]["tokens"][-1] == end
        assert len(set(map(len, record["points"].values()))) == 1
        if arm == "tail":
            return
        nll = scores(model, arm, document)[: end - 1]
        spans = {"beyond": range(EXACT, 149), "after": range(149, end - 1)}
        for name, span in spans.items():
            assert record["spans"][name] == pytest.approx([sum(nll[i] for i in span), len(span)], rel=1e-4)
            for number, group in enumerate(GROUPS):
                mine = [nll[i] for i in span if groups[i] == number]
                assert record["groups"][name][group] == pytest.approx([sum(mine), len(mine)], rel=1e-4)
        for number, found in enumerate(record["bins"]):
            mine = [nll[i] for i in range(len(nll)) if (i + 1) // 16 == number]
            assert found == pytest.approx([sum(mine), len(mine)], rel=1e-4)

    def test_bytes_are_constant_but_for_full(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measuring, "automatic_chunk", lambda model: 40)
        document = documents()[0]
        groups = np.zeros(199, dtype=np.int8)
        plan = PerplexityPlan(["full", "ahn"], EXACT, 16, 10**9)
        points = {arm: measure(model, arm, document, groups, plan)["points"] for arm in plan.arms}
        assert points["ahn"]["tokens"] == [40, 80, 120, 160, 200]
        assert len(set(points["ahn"]["cache_bytes"])) == 1
        assert len(set(points["full"]["cache_bytes"])) == 5
        assert min(points["ahn"]["resident_bytes"]) > 1e7

    def test_bins(self) -> None:
        assert [bin_tokens(longest) for longest in (2, 32, 33, 64, 65, 250_000)] == [1, 1, 2, 2, 4, 8192]

    def test_a_table_of_positions(self) -> None:
        model = tiny("gpt2")
        with ahn.attached(model, ahn.AHNConfig(window=WINDOW, sinks=SINKS)):
            with pytest.raises(EvaluationError, match=r"positions for 512 tokens only, .* has 513; .*--length 512"):
                make_plan(model, ["window"], [TokenDocument("a", ids(513))])
            assert make_plan(model, ["window"], [TokenDocument("a", ids(512))]).full_limit == 512


class TestResults:
    def test_share(self) -> None:
        assert part_of_gap(np.array([[9.0, 8.0, 10.0, 6.0], [4.0, 4.0, 4.0, 4.0]])) == 0.25
        assert math.isnan(part_of_gap(np.ones((2, 4))))

    def test_against_single_tokens(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measuring, "automatic_chunk", lambda model: 64)
        read_documents, arms = documents(), ["full", "window", "ahn"]
        plan = make_plan(model, arms, read_documents)
        all_ids = [each.ids for each in read_documents]
        journal, said = Journal(None, {}), []
        groups = group_tokens(all_ids, all_ids, 3, 4, SINKS, WINDOW)
        read_all(model, read_documents, groups, plan, journal, lambda done, remark="": said.append(done))
        assert said == sorted(said)
        assert said[-1] == 3 * (200 + 90 + 120)
        found = Averages(read_documents, plan, journal.done).report(model)
        nll = {arm: np.concatenate([scores(model, arm, each)[EXACT:] for each in read_documents]) for arm in arms}
        for arm, row in found["arms"].items():
            assert row["nll"]["beyond"] == pytest.approx(nll[arm].mean(), rel=1e-5)
            assert row["perplexity"]["beyond"] == pytest.approx(math.exp(nll[arm].mean()), rel=1e-4)
            assert row["scored"] == {"beyond": len(nll[arm]), "after": 0}
            assert math.isnan(row["nll"]["after"])
        expected = (nll["window"].mean() - nll["ahn"].mean()) / (nll["window"].mean() - nll["full"].mean())
        closed = found["arms"]["ahn"]["closed"]
        assert closed["share"] == pytest.approx(expected, rel=1e-3)
        assert closed["low"] <= closed["share"] <= closed["high"]
        assert found["arms"]["window"]["closed"] is None
        assert sum(each["tokens"] for each in found["groups"]["beyond"].values()) == len(nll["full"])
        assert found["points"]["document"] == "a"
        assert found["points"]["full_cache"]["bytes"] == found["points"]["arms"]["full"]["cache_bytes"]
        assert json.dumps(found).count("Infinity") == 0

    def test_with_the_memory_of_another_text(self, model: Any) -> None:
        """The text half of all documents on, repeated where it is shorter; and what is left of the gap."""
        read_documents, arms = documents(), ["full", "window", "ahn", "ahn+4"]
        plan = make_plan(model, arms, read_documents, other_texts=True)
        assert plan.controlled == ["ahn", "ahn+4"]
        groups = [np.zeros(len(each.ids) - 1, dtype=np.int8) for each in read_documents]
        journal, said = Journal(None, {}), []
        read_all(model, read_documents, groups, plan, journal, lambda done, remark="": said.append(done))
        assert said[-1] == 6 * (200 + 90 + 120)
        report = Averages(read_documents, plan, journal.done).report(model)
        a, b, c = (torch.from_numpy(each.ids) for each in read_documents)
        sums = {arm: [scores(model, arm, each)[EXACT:].sum() for each in read_documents] for arm in arms[:3]}
        sums["other"] = []
        for own, other in ((a, torch.cat((b, b, b))), (b, c), (c, a)):
            reader = arm_reader(model, "ahn", other_T=other)
            reader.prefill(own)
            sums["other"].append(reader.nll.double()[EXACT:].sum())
        totals, number = {arm: float(sum(each)) for arm, each in sums.items()}, 410 - 3 - 3 * EXACT
        gap, found = totals["window"] - totals["full"], report["other_text"]["ahn"]
        assert found["nll"]["beyond"] == pytest.approx(totals["other"] / number, rel=1e-5)
        assert found["nats_better"] == pytest.approx((totals["other"] - totals["ahn"]) / number, rel=1e-3)
        assert found["closed"]["share"] == pytest.approx((totals["window"] - totals["other"]) / gap, rel=1e-3)
        assert found["own"]["share"] == pytest.approx((totals["other"] - totals["ahn"]) / gap, rel=1e-3)
        assert found["own"]["low"] <= found["own"]["share"] <= found["own"]["high"]

    def test_what_full_does_not_read_does_not_count(self, model: Any) -> None:
        """Nats and shares are of the same tokens."""
        read_documents, arms = documents()[::2], ["full", "window", "ahn"]
        plan = dataclasses.replace(make_plan(model, arms, read_documents, other_texts=True), full_limit=100)
        journal, groups = Journal(None, {}), [np.zeros(len(each.ids) - 1, dtype=np.int8) for each in read_documents]
        read_all(model, read_documents, groups, plan, journal)
        found = Averages(read_documents, plan, journal.done).report(model)
        other, own = found["other_text"]["ahn"], found["arms"]["ahn"]["nll"]
        assert other["nll"]["beyond"] - own["beyond"] == pytest.approx(other["nats_better"], rel=1e-6)
        assert other["nll"]["after"] - own["after"] != pytest.approx(other["nats_better"], rel=1e-2)

    def test_the_same_text_is_no_other(self, model: Any) -> None:
        twice = [documents()[0], dataclasses.replace(documents()[0], name="b")]
        with pytest.raises(EvaluationError, match=r"a and b are the same text\. Leave one out for --other-text"):
            make_plan(model, ["ahn"], twice, other_texts=True)

    def test_another_text_without_a_gap(self, model: Any) -> None:
        read_documents = documents()
        plan, journal = make_plan(model, ["ahn"], read_documents, other_texts=True), Journal(None, {})
        read_all(
            model,
            read_documents,
            [np.zeros(len(each.ids) - 1, dtype=np.int8) for each in read_documents],
            plan,
            journal,
        )
        found = Averages(read_documents, plan, journal.done).report(model)["other_text"]["ahn"]
        assert found["closed"] is None
        assert found["own"] is None
        assert found["low"] <= found["nats_better"] <= found["high"]

    def test_a_stop_costs_one_item(self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read_documents, read_arms = documents(), []
        plan = make_plan(model, ["full", "ahn"], read_documents)
        groups = [np.zeros(len(each.ids) - 1, dtype=np.int8) for each in read_documents]
        real = measuring.measure

        def stop_at_the_fourth(model: Any, arm: str, document: TokenDocument, *more: Any) -> Any:
            read_arms.append(key(document, arm))
            if len(read_arms) == 4:
                raise KeyboardInterrupt
            return real(model, arm, document, *more)

        monkeypatch.setattr(measuring, "measure", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            read_all(model, read_documents, groups, plan, Journal(tmp_path / "j", {}))
        read_all(model, read_documents, groups, plan, Journal(tmp_path / "j", {}))
        assert read_arms == ["a | ahn", "a | full", "b | ahn", "b | full", "b | full", "c | ahn", "c | full"]
        stopped = Journal(tmp_path / "j", {}).done
        whole_run = Journal(None, {})
        read_all(model, read_documents, groups, plan, whole_run)
        for name, record in whole_run.done.items():
            assert all(stopped[name][part] == record[part] for part in ("tokens", "bins", "spans", "groups"))


TINY = ("--model", "./model", "--window", "16", "--sinks", "4")


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:  # noqa: F811
    monkeypatch.chdir(place)

    def runner(*arguments: str) -> tuple[int, str, str]:
        status = main(["eval", *arguments])
        return status, *capsys.readouterr()

    return runner


class TestCommand:
    def test_table_report_page_and_plot(self, run: Any, tmp_path: Path) -> None:
        out = str(tmp_path / "out")
        command = ("perplexity", "text.txt", "empty.md", *TINY, "--arms", "full,window,ahn", "--adapter", "adapter")
        command = (*command, "--length", "100", "--pieces", "6", "--out", out)
        Path("empty.md").write_text("Nothing much.")
        status, shown, err = run(*command)
        assert (status, err) == (0, "")
        assert "./model reads 6 documents of 100 to 100 tokens. Sinks 4 (bounded), window 16." in shown
        assert "Memory: gated_delta_net, weights from adapter." in shown
        rows = {
            line.split()[0]: line.split()
            for line in shown.splitlines()
            if line.startswith((" full ", " window ", " ahn "))
        }
        assert set(rows) == {"full", "window", "ahn"}
        assert " to " in " ".join(rows["ahn"])
        assert "474 tokens beyond sinks + window" in shown
        assert "bootstrap over the 6 documents" in shown
        report = read_report(Path(out) / "report.json")
        assert report.settings["pieces"] == 6
        assert report.results["arms"]["full"]["nll"]["after"] is None
        assert {each.name for each in Path(out).iterdir()} == {
            "journal.jsonl", "perplexity.png", "report.html", "report.json",
        }  # fmt: skip
        page = (Path(out) / "report.html").read_text(encoding="utf-8")
        assert "<svg" in page
        assert "text.txt, token 0" in page
        status, again, err = run(*command)
        assert (status, err) == (0, f"going on with {out}: 18 finished items\n")
        assert again == shown
        status, _, err = run(*command, "--rare", "5")
        assert status == 2
        assert "was begun with rare = 8, not 5; go on with the same settings or name another folder." in err

    def test_full_stops_at_the_trained_positions(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = measuring.make_plan
        monkeypatch.setattr(
            measuring, "make_plan", lambda *each: measuring.dataclasses.replace(plan(*each), full_limit=99)
        )
        status, shown, _ = run("perplexity", "text.txt", *TINY, "--arms", "full,window")
        assert status == 0
        assert "full reads the first 99 tokens of a document: the model was trained on no more." in shown
        assert " after full " in shown
        assert "551 tokens" not in shown
        assert "78 tokens beyond sinks + window" in shown
        assert "The same tokens after the part that full reads by" in shown
        assert "No interval from one document" in shown

    def test_untrained_and_without_full(self, run: Any) -> None:
        status, shown, _ = run("perplexity", "text.txt", *TINY)
        assert status == 0
        assert "untrained (no adapter): ahn says exactly what window says" in shown
        assert "With full and window among --arms" in shown
        assert "gap closed" not in shown

    def test_all_arms(self, run: Any) -> None:
        arms = "full,window,ahn,ct_max,ct_mean,tail,ahn+4:key_norm,window+4"
        status, shown, _ = run("perplexity", "text.txt", *TINY, "--arms", arms)
        assert status == 0
        assert " ct_mean " in shown
        assert "…" not in shown
        assert all(shown.count(f" {arm} ") >= 2 for arm in ("full", "ct_mean", "tail", "window+4"))

    def test_the_memory_of_another_text(self, run: Any, tmp_path: Path) -> None:
        arms = ("--arms", "full,window,ahn,ahn+4:random", "--other-text", "--adapter", "adapter")
        cut, out = ("--length", "100", "--pieces", "6"), tmp_path / "out"
        status, shown, _ = run("perplexity", "text.txt", *TINY, *arms, *cut, "--out", str(out))
        assert status == 0
        assert "Each arm with the memory of another text, and how much better its own memory is" in shown
        assert max(len(line) for line in shown.splitlines() if line.startswith(" ")) <= 80
        assert set(read_report(out / "report.json").results["other_text"]) == {"ahn", "ahn+4:random"}
        assert "memory of another text" in (out / "report.html").read_text(encoding="utf-8")

    def test_the_report_says_what_anchors_are_chosen_by(self, run: Any, tmp_path: Path) -> None:
        for arm, chosen in (("ahn+4", "key_diff"), ("ahn+4:random", None)):
            assert run("perplexity", "text.txt", *TINY, "--arms", arm, "--out", str(tmp_path / arm))[0] == 0
            assert read_report(tmp_path / arm / "report.json").settings.get("anchor_score") == chosen

    def test_short_documents_are_left_out(self, run: Any) -> None:
        Path("short.md").write_text("Too short.")
        status, shown, _ = run("perplexity", "text.txt", "short.md", *TINY)
        assert status == 0
        assert "1 of 2 documents left out: not longer than sinks + window = 20 tokens" in shown

    def test_interrupted_and_continued(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = measuring.measure

        def interrupt(model: Any, arm: str, *more: Any) -> Any:
            if arm == "ahn":
                raise KeyboardInterrupt
            return real(model, arm, *more)

        out = str(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(measuring, "measure", interrupt)
            status, _, err = run("perplexity", "text.txt", *TINY, "--out", out)
        assert (status, err) == (130, f"1 finished item kept in {out}; the same command goes on.\ninterrupted\n")
        assert run("perplexity", "text.txt", *TINY, "--out", out)[0] == 0

    def test_other_weights_do_not_go_on(self, run: Any, tmp_path: Path) -> None:
        out = str(tmp_path / "out")
        ahn.save(with_memory("qwen3", model={"vocab_size": 259, "head_dim": 8}), tmp_path / "adapter")
        command = ("perplexity", "text.txt", *TINY, "--out", out, "--adapter", str(tmp_path / "adapter"))
        assert run(*command)[0] == 0
        ahn.save(ahn_with_other_weights(), tmp_path / "adapter")
        status, _, err = run(*command)
        assert status == 2
        assert "was begun with memory weights = " in err

    def test_a_changed_text_does_not_go_on(self, run: Any, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("abcdefgh " * 20)
        command = ("perplexity", str(text), *TINY, "--out", str(tmp_path / "out"))
        assert run(*command)[0] == 0
        text.write_text("abcdefgh " * 21)
        status, _, err = run(*command)
        assert status == 2
        assert "was begun with files = " in err

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("perplexity", "Missing argument 'FILE'"),
            ("perplexity missing.txt", "FILE missing.txt does not exist. Check the path."),
            ("perplexity empty.txt", "FILE empty.txt is empty. Give a text."),
            ("perplexity binary.txt", "FILE binary.txt is binary."),
            ("perplexity latin.txt", "FILE latin.txt is not UTF-8 (byte 3)."),
            ("perplexity nothing", "nothing holds no text (.txt, .md, .rst, .text). Name a file or another folder."),
            ("perplexity text.txt text.txt", "text.txt is named twice. Name it once."),
            ("perplexity text.txt --length 1", "--length must be at least 2, not 1."),
            ("perplexity text.txt --pieces 0 --length 9", "--pieces must be at least 1, not 0."),
            ("perplexity text.txt --pieces 2", "--pieces needs --length, the tokens of a piece. Name both."),
            ("perplexity text.txt --ngram 1", "--ngram must be at least 2, not 1."),
            ("perplexity text.txt --rare 1", "--rare must be at least 2, not 1."),
            ("perplexity text.txt --plot gap.png", "--plot needs full and window among --arms, whose gap it shows."),
            ("perplexity text.txt --arms full,window --plot gap.gif", "--plot gap.gif must end in .png or .svg."),
            ("perplexity text.txt --other-text --arms half", "--arms takes full, window, ahn,"),
            ("perplexity text.txt --other-text --arms window", "--other-text needs an arm with a memory among --arms"),
            (
                "perplexity text.txt --model ./model --window 16 --sinks 4 --other-text",
                "--other-text needs two documents at least. Name more texts, or cut them with --length and --pieces.",
            ),
            ("perplexity text.txt --precision half", "--precision must be float32 or bfloat16, not 'half'."),
            (
                "perplexity text.txt --arms half",
                "--arms takes full, window, ahn, ct_max, ct_mean, tail, window+64 (a larger window)",
            ),
            ("perplexity text.txt --out full", "--out full holds other things than an evaluation."),
            ("perplexity text.txt --model ./model", "no document is longer than sinks + window = 1,056 tokens"),
            ("perplexity text.txt --model ./model --window 5000", "exceed the 4096 positions"),
            (
                "perplexity text.txt --model ./model --length 600 --pieces 2",
                "of 2 pieces of 600 tokens the texts hold 1 only.",
            ),
        ],
    )
    def test_wrong_input_gets_one_line(self, run: Any, line: str, says: str) -> None:
        status, out, err = run(*line.split())
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert says in err


@pytest.fixture(scope="module")
def wide() -> Any:
    """A window that is long enough for what a score looks at."""
    return with_memory("qwen3", window=64, sinks=SINKS)


class TestEqualBytes:
    """Windows of the same bytes, by the cost model and by real caches."""

    ARMS = ("window", "window+7", "anchors+4", "anchors+9", "ahn", "ahn+4", "ct_max", "full")

    def held(self, model: Any, arm: str, tokens: int) -> int:
        reader = arm_reader(model, arm, score=False)
        reader.prefill(torch.from_numpy(ids(tokens)))
        return reader.cache_bytes

    def test_counted_bytes_are_those_of_caches(self, wide: Any) -> None:
        """But for what a score keeps: of each token a number, and of each anchor its number and its place."""
        sizes = CacheSizes(wide, 200)
        for arm in self.ARMS:
            kept_by_score = self.held(wide, arm, 200) - (sizes.bytes_of(arm) or 0)
            anchors = find_arm(arm).anchors
            assert (12 * anchors < kept_by_score < 4_000) if anchors else kept_by_score == 0, arm
        assert sizes.bytes_of("tail") is None

    def test_the_window_is_the_smallest_that_takes_as_much(self, wide: Any) -> None:
        sizes = CacheSizes(wide, 400)
        for arm in ("ahn", "anchors+4", "ahn+4"):
            equal = sizes.equal_window(arm)
            assert equal is not None
            larger = find_arm(equal).larger
            below, there = (self.held(wide, f"window+{size}", 400) for size in (larger - 1, larger))
            assert below < (sizes.bytes_of(arm) or 0) <= there
        assert sizes.equal_window("anchors+4") == "window+4"
        assert [sizes.equal_window(arm) for arm in ("full", "window", "window+7", "tail")] == [None] * 4

    def test_a_short_text_has_no_such_window(self, wide: Any) -> None:
        assert CacheSizes(wide, 80).equal_window("ahn") is None

    def test_anchors_without_a_memory(self, wide: Any) -> None:
        """They are read, and the memory is not."""
        text = torch.from_numpy(ids(150))
        nll = {}
        for arm in ("window", "anchors+8", "anchors+8:recent", "window+8"):
            reader = arm_reader(wide, arm)
            reader.prefill(text)
            nll[arm] = reader.nll
        assert (nll["anchors+8"] - nll["window"]).abs().max() > 1e-4
        # The tokens that left last are those that a larger window still has.
        torch.testing.assert_close(nll["anchors+8:recent"], nll["window+8"], rtol=0, atol=1e-4)

    def test_difference_of_two_arms(self) -> None:
        documents = [TokenDocument(name, ids(9)) for name in "ab"]
        sums = {"a | x": [8.0, 4], "a | y": [6.0, 4], "b | x": [9.0, 6], "b | y": [9.0, 6]}
        # Half of it in the part that full attention reads, half after it.
        halves = {name: [half / 2 for half in each] for name, each in sums.items()}
        records = {name: {"spans": {"beyond": each, "after": each}} for name, each in halves.items()}
        plan = PerplexityPlan(["x", "y"], EXACT, 16, 100)
        found = Averages(documents, plan, records).difference("x", "y")
        assert found == {"nats_better": pytest.approx(0.2), "low": 0.0, "high": pytest.approx(0.5)}

    def test_lines_of_the_picture(self) -> None:
        arms = ("full", "window", "window+9", "anchors+4", "anchors+8:key_diff", "ahn", "ahn+4", "ct_max", "tail")
        assert lines({"arms": dict.fromkeys(arms)}) == {
            ("window", None): ["window", "window+9"],
            ("anchors", None): ["window", "anchors+4"],
            ("anchors", "key_diff"): ["window", "anchors+8:key_diff"],
            ("memory", None): ["window", "ahn"],
            ("memory + anchors", None): ["ahn", "ahn+4"],
            ("Compressive Transformer", None): ["ct_max"],
        }

    def test_table_picture_and_report(self, run: Any, tmp_path: Path) -> None:
        out, plot = tmp_path / "out", tmp_path / "gap.svg"
        arms = "full,window,anchors+4:key_norm,ahn,ahn+4:key_norm"
        command = ("perplexity", "text.txt", *TINY, "--arms", arms, "--adapter", "adapter", "--length", "70")
        command = (*command, "--pieces", "3", "--precision", "bfloat16", "--equal-bytes")
        status, shown, _ = run(*command, "--plot", str(plot), "--out", str(out))
        assert status == 0
        assert "Each arm beside a window enlarged to the same bytes" in shown
        report = read_report(out / "report.json")
        equal, rows = report.results["equal_bytes"], report.results["arms"]
        assert set(equal) == set(arms.split(",")) - {"full", "window"}
        assert equal["anchors+4:key_norm"]["arm"] == "window+4"
        for arm, each in equal.items():
            assert rows[arm]["counted_bytes"] <= rows[each["arm"]]["counted_bytes"]
            better = rows[each["arm"]]["nll"]["beyond"] - rows[arm]["nll"]["beyond"]
            assert each["nats_better"] == pytest.approx(better, abs=1e-9)
            assert each["low"] <= each["nats_better"] <= each["high"]
        drawn = plot.read_text(encoding="utf-8")
        assert "<svg" in drawn
        assert "gap.png" in {each.name for each in out.iterdir()}
        lines_of_journal = (out / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines_of_journal) == 1 + 3 * len(rows)

    def test_rounded_products_score_otherwise(self, model: Any) -> None:
        document = documents()[0]
        groups = np.zeros(199, dtype=np.int8)
        plans = [PerplexityPlan(["ahn"], EXACT, 16, 10**9, precision) for precision in ("float32", "bfloat16")]
        exact, rounded = (measure(model, "ahn", document, groups, plan)["spans"]["beyond"][0] for plan in plans)
        assert 0 < abs(exact - rounded) < 0.02 * exact

    def test_other_weights_of_scores(self, run: Any, tmp_path: Path) -> None:
        command = ("perplexity", "text.txt", *TINY, "--window", "40", "--arms", "anchors+4")
        status, _, err = run(*command, "--anchor-weights", str(tmp_path / "missing"))
        assert status == 2
        assert err.count("\n") == 1
        assert "missing" in err


def ahn_with_other_weights() -> Any:
    model = with_memory("qwen3", model={"vocab_size": 259, "head_dim": 8})
    from ahn.attachment import attachment_of

    for parameter in attachment_of(model).layers[0].memory.parameters():
        parameter.data.mul_(2)
    return model
