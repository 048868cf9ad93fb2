"""Training of the learned score: documents, what is looked at later, the fit, and all of it on a tiny model."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ahn
from ahn.anchors.learned import AnchorGate
from ahn.attachment import attachment_of
from ahn.cli import main
from ahn.errors import ConfigError
from ahn.models import load_tokenizer
from ahn.training.anchors import AnchorSettings, check_anchor_settings, documents, train_anchors
from ahn.training.anchors.documents import FORMATS, FactText, UnfitText, _facts, make_document
from ahn.training.anchors.fit import fit, joined
from ahn.training.anchors.future_attention import observe
from ahn.training.anchors.run import _check_model, _documents, _layers_of_learned
from ahn.training.sources import DataError
from tests.tiny import byte_tokenizer, give_score_weights, text, tiny, with_memory
from tests.training.common import write_base

STORY = "It was late. The rain had stopped before the evening came at last. Nobody came to the house any more. " * 5
ROOM = {"least": 2, "most": 4000}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned") / "base"
    write_base(folder)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_a_document_hides_facts_and_asks_for_them(base: Path, kind: str) -> None:
    tokenizer = load_tokenizer(str(base))
    made = make_document(STORY, tokenizer, random.Random(4), [kind], quotes=True, **ROOM)
    whole = tokenizer.decode(made.ids.tolist())
    assert whole.count("?") >= len(made.values) + 1  # one asks for a sentence of the text
    assert made.values
    for name, places in made.values:
        assert name == kind
        assert places[-1] < made.text
        value = tokenizer.decode(made.ids[list(places)].tolist()).strip()
        assert whole.count(value) > 1  # it is in the answer too
        assert value not in STORY


def test_many_texts_have_several_facts_of_one_kind_and_no_question_has_two_answers(base: Path) -> None:
    tokenizer, alike = load_tokenizer(str(base)), 0
    for seed in range(40):
        made = make_document(STORY, tokenizer, random.Random(seed), list(FORMATS), quotes=False, **ROOM)
        asked = re.findall(r"[^\n>]*\?", tokenizer.decode(made.ids[made.text :].tolist()))
        assert len(asked) == len(set(asked)) == len(made.values)
        kinds = [kind for kind, _ in made.values]
        alike += len(kinds) > 1 and len(set(kinds)) == 1
    assert 10 < alike < 30


def test_passwords_are_made_of_words_of_the_text(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    made = make_document(STORY, tokenizer, random.Random(2), ["password"], quotes=False, **ROOM)
    for _, places in made.values:
        words = re.findall(r"[a-z]+", tokenizer.decode(made.ids[list(places)].tolist()))
        assert len(words) == 2
        assert all(word in STORY for word in words)


def test_passwords_in_other_scripts() -> None:
    source = "Было поздно. Дождь прекратился ещё до вечера. Никто больше не приходил в этот дом. Всё молчало."
    [(_, fact), *_] = _facts(source, random.Random(0), ["password"])
    assert all(word in source for word in re.split("[ -]", fact.value))


def test_a_text_without_words(base: Path) -> None:
    with pytest.raises(UnfitText, match="fewer than 8 words"):
        make_document("I. " * 50, load_tokenizer(str(base)), random.Random(0), ["code"], quotes=False, **ROOM)


def test_a_text_without_sentences(base: Path) -> None:
    with pytest.raises(UnfitText, match="fewer than 4 sentences"):
        make_document("words " * 50, load_tokenizer(str(base)), random.Random(0), ["code"], quotes=False, **ROOM)


def test_a_value_that_the_words_of_its_sentence_hold_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(documents._DRAW, "serial", lambda source: "se")
    tokenizer = load_tokenizer(str(base))
    made = make_document(STORY, tokenizer, random.Random(2), ["serial"], quotes=False, **ROOM)
    for _, places in made.values:
        assert tokenizer.decode(made.ids[: places[-1] + 1].tolist()).endswith("reads se")
        assert tokenizer.decode(made.ids[list(places)].tolist()) == " se"


def test_a_fact_that_stands_within_another(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, tokenizer = iter(["ban", "urban"]), load_tokenizer(str(base))
    monkeypatch.setitem(documents._DRAW, "variable", lambda source: next(names))
    monkeypatch.setitem(documents._DRAW, "number", lambda source: "123")
    monkeypatch.setattr(documents, "_ALIKE", 1.0)
    rng = random.Random(0)
    monkeypatch.setattr(rng, "randint", lambda low, high: low)
    made = make_document(STORY, tokenizer, rng, ["setting"], quotes=False, **ROOM)
    before = [tokenizer.decode(made.ids[: places[0]].tolist()) for _, places in made.values]
    assert [text.split()[-2] for text in before] == ["ban", "urban"]


def test_a_document_is_cut_behind_its_facts(base: Path) -> None:
    """With the same facts and questions, whatever does not fit."""
    tokenizer = load_tokenizer(str(base))

    def make(most: int) -> FactText:
        return make_document(STORY, tokenizer, random.Random(4), list(FORMATS), quotes=True, least=2, most=most)

    whole = make(4000)
    size = whole.ids.numel()
    short = make(size - 50)
    assert short.values == whole.values
    assert short.text == whole.text - 50
    assert torch.equal(short.ids[: short.text], whole.ids[: short.text])
    assert torch.equal(short.ids[short.text :], whole.ids[whole.text :])
    with pytest.raises(UnfitText, match="no room for its questions in 400 tokens"):
        make(400)
    with pytest.raises(UnfitText, match="fewer than 4,000 tokens"):
        make_document(STORY, tokenizer, random.Random(4), list(FORMATS), quotes=True, least=4000, most=4000)


def test_documents_keep_to_their_length_and_reach_beyond_the_window(base: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(STORY * 20, encoding="utf-8")
    for number in range(20):
        (tmp_path / f"short {number}.txt").write_text(STORY[:320], encoding="utf-8")
    settings = AnchorSettings((str(tmp_path),), "out", str(base), 12, 800, 500)
    made = _documents(settings, load_tokenizer(str(base)))
    assert {564 <= document.ids.numel() <= 800 for document in made} == {True}
    (tmp_path / "long.txt").unlink()
    with pytest.raises(
        DataError, match=r"no text of 564 tokens or more\. Give longer texts, or use a smaller --length"
    ):
        _documents(settings, load_tokenizer(str(base)))


def test_texts_that_nothing_can_be_hidden_in(base: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("words " * 2000, encoding="utf-8")
    settings = AnchorSettings((str(tmp_path),), "out", str(base), 12, 800, 16)
    with pytest.raises(ConfigError, match=r"in 0 texts only \(a text has fewer than 4 sentences, .*more running text"):
        _documents(settings, load_tokenizer(str(base)))


def test_a_length_beyond_a_models_positions(tmp_path: Path) -> None:
    tiny("gpt2", vocab_size=259).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "words.txt").write_text("no sentences")
    settings = AnchorSettings(
        (str(tmp_path / "words.txt"),), str(tmp_path / "out"), str(tmp_path / "base"), 12, 600, 16
    )
    with pytest.raises(ConfigError, match=r"positions for 512 tokens only, .* up to 600; take a smaller length"):
        train_anchors(settings)


def test_a_window_that_is_too_short_for_a_score(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    given: Any = {"data": (str(tmp_path),), "out": str(tmp_path / "out"), "window": 10}
    with pytest.raises(ConfigError, match=r"a window of at least 14 tokens in every layer .*, not 10"):
        check_anchor_settings(AnchorSettings(**given))
    check_anchor_settings(AnchorSettings(**given, scores=("learned",)))
    model = with_memory("gemma3_text", sinks=4, layers=(0, 1, 2))
    with pytest.raises(ConfigError, match=r"a window of at least 14 tokens in every layer .*, not 8"):
        _check_model(model, AnchorSettings(**{**given, "window": 16}))


def test_what_is_looked_at_later_against_a_loop() -> None:
    window, asked, ids = 12, 31, text(1, 40)[0]
    model = with_memory("llama")
    plain = tiny("llama", attn_implementation="eager")
    with torch.no_grad():
        output = plain(ids[None], output_attentions=True, output_hidden_states=True)
    total, reread = torch.zeros(2, 40, dtype=torch.float64)
    for layer, (weights, hidden) in enumerate(zip(output.attentions, output.hidden_states)):
        attention = plain.model.layers[layer].self_attn
        value = attention.v_proj(plain.model.layers[layer].input_layernorm(hidden))[0].unflatten(-1, (-1, 8))
        heads = weights.size(1)
        most = torch.zeros(40, dtype=torch.float64)
        for head in range(heads):
            out = attention.o_proj.weight[:, head * 8 : head * 8 + 8]
            for i in range(40):
                moved = float((out @ value[i, head * value.size(1) // heads]).norm())
                for j in range(max(asked, i + window), 40):
                    share = float(weights[0, head, j, i]) * moved / float(hidden[0, j].norm())
                    most[i] = max(float(most[i]), share)
                taken = [float(weights[0, head, j, i]) * moved for j in range(i + window, asked)]
                if layer >= len(output.attentions) // 2:
                    reread[i] += sum(each**2 for each in taken) / max(1, len(taken))
        total += most / len(output.attentions)
    seen = observe(model, ids, asked, window, [1])
    assert seen.asked_T is None
    torch.testing.assert_close(seen.needed_T.double(), total.clamp(min=1e-6).log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.reread_T.double(), reread.clamp(min=1e-12).log(), rtol=1e-4, atol=1e-4)
    assert int((reread > 0).sum()) == asked - window
    assert list(seen.hidden) == [1]
    norm = plain.model.layers[1].input_layernorm(output.hidden_states[1])[0]
    torch.testing.assert_close(seen.hidden[1], norm, rtol=1e-4, atol=1e-4)


def test_what_queries_of_other_texts_attend_to() -> None:
    """The mean of the layers on keys before their rotation, then the best kind, without pooling."""
    model, ids = with_memory("llama"), text(1, 40)[0]
    give_score_weights(model)
    layers = attachment_of(model).layers
    queries: Any = {layer.index: layer.anchor_weights["asked"] for layer in layers if layer.anchor_weights}
    keys = {index: list[torch.Tensor]() for index in queries}
    for index, parts in keys.items():
        project = layers[index].module.k_proj
        project.register_forward_hook(lambda module, args, output, parts=parts: parts.append(output))
    found = observe(model, ids, 31, 12, [], queries).asked_T
    scores = []
    for index, weights in queries.items():
        key_GTK = keys[index][0][0].unflatten(-1, (-1, 8)).transpose(0, 1).double()
        products = weights.queries.double() @ key_GTK.mT + weights.offsets.double().T[..., None]
        best_NT = products.amax(0)
        kinds = [best_NT[weights.kinds[:, kind] == 1] for kind in range(2)]
        scores.append(torch.stack([own.amax(0) if len(own) else torch.full((40,), torch.nan) for own in kinds]))
    expected = torch.stack(scores).nanmean(0).amax(0)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_layers_that_score_lie_between_half_and_two_thirds_of_the_depth() -> None:
    model = with_memory("llama", model={"num_hidden_layers": 12})
    assert _layers_of_learned(model, 3) == [6, 7, 8]
    assert _layers_of_learned(model, 2) == [6, 8]
    assert _layers_of_learned(model, 1) == [6]
    assert _layers_of_learned(with_memory("llama", model={"num_hidden_layers": 2}), 3) == [1]


def test_learned_learns_from_queries_wherever_they_come_from(base: Path, tmp_path: Path) -> None:
    """Those that were made before are kept as they are; none are left out unless the model can have none."""
    (tmp_path / "story.txt").write_text(STORY * 40, encoding="utf-8")

    def weights(name: str, model: Any = None, **changes: Any) -> tuple[dict[str, torch.Tensor], str]:
        said: list[str] = []
        settings = AnchorSettings(
            (str(tmp_path / "story.txt"),), str(tmp_path / name), str(base), 12, 800, 16, **changes
        )
        report = train_anchors(settings, said.append, model)
        assert bool(report.asked) == ("asked" in settings.scores)
        return load_file(tmp_path / name / "anchors.safetensors"), "\n".join(said)

    queries, _ = weights("first", scores=("asked",))
    named, _ = weights("second", queries=str(tmp_path / "first"))
    assert queries
    assert all(torch.equal(named[name], tensor) for name, tensor in queries.items())
    alone, said = weights("alone", scores=("learned",))
    assert "asked: read 10 of 10" in said
    model = ahn.from_pretrained(base, config=ahn.AHNConfig(window=16, sinks=4))
    attachment_of(model).rotation_problem = "it is a secret"
    without, said = weights("without", model, scores=("learned",))
    assert "without queries of other texts: the rotary positions of this model cannot be undone" in said
    assert "alone" not in said.split("cannot be undone")[1]
    assert set(alone) == set(without) == set(named) - set(queries)
    for name, tensor in alone.items():
        # Named ones are rounded to float16, which moves what is fitted to them by some hundredths of its size.
        size = float(tensor.abs().max())
        torch.testing.assert_close(tensor, named[name], rtol=0, atol=0.06 * size)
    outer = {name for name in alone if name.endswith("outer.weight")}
    assert outer
    assert not any(torch.allclose(alone[name], without[name], rtol=0.02, atol=0.02) for name in outer)
    with pytest.raises(ConfigError, match="holds no weights of asked; name other --queries"):
        weights("none", queries=str(tmp_path / "alone"))


def test_queries_for_a_model_whose_rotation_cannot_be_undone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY * 40, encoding="utf-8")
    model = ahn.from_pretrained(base, config=ahn.AHNConfig(window=16, sinks=4))
    give_score_weights(model)
    ahn.save_anchors(model, tmp_path / "queries")
    attachment_of(model).rotation_problem = "it is a secret"
    settings = {"documents": 12, "length": 800, "window": 16, "queries": str(tmp_path / "queries")}
    with pytest.raises(ConfigError, match=r"cannot be undone \(it is a secret\), so the score"):
        train_anchors(
            AnchorSettings((str(tmp_path / "story.txt"),), str(tmp_path / "out"), str(base), **settings), model=model
        )


def test_the_fit_foresees_what_can_be_foreseen() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + 2 * torch.randn(30000, 6, generator=generator)
    target = (inputs[:, 0] - inputs[:, 1]) * 0.5 + (inputs[:, 2] - 3).abs()  # the last part is not linear
    found = fit(inputs, target, torch.arange(30000) % 6 == 5, 16, seed=1)
    again = fit(inputs, target, torch.arange(30000) % 6 == 5, 16, seed=1)
    assert 0.3 < found.ridge < 0.7
    assert found.explained > 0.85
    with torch.no_grad():
        votes = found.gate(inputs[None])
        assert torch.equal(votes, again.gate(inputs[None]))
        assert torch.equal(votes[..., 0], votes[..., 1])
    assert float(torch.corrcoef(torch.stack((votes[0, :, 0], target)))[0, 1]) > 0.9


def test_joined_networks_say_what_each_said() -> None:
    torch.manual_seed(3)
    questions, reread, inputs = AnchorGate(6, 4, outputs=1), AnchorGate(6, 3, outputs=1), torch.randn(2, 5, 6)
    with torch.no_grad():
        found = joined(questions, reread)(inputs)
        torch.testing.assert_close(found[..., 0], questions(inputs)[..., 0])
        torch.testing.assert_close(found[..., 1], reread(inputs)[..., 0])
        assert not torch.equal(found[..., 0], found[..., 1])


def test_a_training_writes_votes_that_load(base: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY * 40, encoding="utf-8")
    said: list[str] = []
    story, out = str(tmp_path / "story.txt"), str(tmp_path / "out")
    settings = AnchorSettings((story,), out, str(base), 12, 800, 16, voters=2)
    report = train_anchors(settings, said.append)
    assert len(report.layers) == 2
    assert set(report.shares_kept) == {"key_diff", "asked", "learned"}
    assert report.asked
    assert all(report.asked.values())
    assert sum(report.facts.values()) > 0
    assert all(0 <= share <= 1 for kinds in report.shares_kept.values() for each in kinds.values() for share in each)
    assert said[:2] == ["asked: read 10 of 10 documents", "learned: read 10 of 12 documents"]
    model = ahn.from_pretrained(base, config=ahn.AHNConfig(window=16, sinks=4))
    ahn.load_anchors(model, tmp_path / "out")
    for score in ("asked", "learned"):
        with ahn.mode(model, "ahn", anchors=4, anchor_score=score):
            cache = ahn.HippocampalCache(model)
            model(text(1, 60), cache=cache)
        assert len(cache.anchor_tokens[0]) == 4
    with pytest.raises(ConfigError, match="not empty"):
        train_anchors(AnchorSettings((str(tmp_path / "story.txt"),), str(tmp_path), str(base), 12, 800, 16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"documents": 5}, "documents must be at least 6"),
        ({"length": 400}, "length must be at least 520"),
        ({"left_out": "poem"}, "left_out must be one of code"),
        ({"voters": 0}, "voters must be at least 1"),
        ({"scores": ()}, "scores must be some of asked, learned, not none"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnchorSettings(("x",), "y", **values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o"], "there is nothing to hide facts in"),
        (["--data", "story.txt"], "there is no folder to write to"),
        (["--data", "missing", "--out", "o"], "missing"),
        (["--data", "story.txt", "--out", "full"], "full is not empty"),
        (["--data", "story.txt", "--out", "o", "--model", "nothing"], "no model named 'nothing'"),
        (["--data", "story.txt", "--out", "o", "--documents", "2"], "documents must be at least 6"),
        (["--data", "story.txt", "--out", "o", "--queries", "missing"], "missing"),
        (["--data", "story.txt", "--out", "o", "--scores", "luck"], "scores must be some of asked, learned, not luck"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.md").write_text("mine")
    assert main(["train", "anchors", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
