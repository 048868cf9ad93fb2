"""From files to pieces: nothing lost, nothing twice, and a bad record named by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ahn.errors import ConfigError
from ahn.models import load_tokenizer
from ahn.training.batches import Piece, Pieces, collate
from ahn.training.data import Cut, load_pieces, stream_pieces, tokenise
from ahn.training.sources import DataError, DataQuery, check_places, documents
from tests.training.common import write_base

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return load_tokenizer(folder)


def lines(folder: Path, *records: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records))
    return file


def texts(pieces: Pieces, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(pieces[number]["input_ids"]) for number in range(len(pieces))]


class TestCutting:
    def test_a_text_is_cut_into_consecutive_pieces(self, tmp_path: Path, tokenizer: Any) -> None:
        (tmp_path / "a.txt").write_text("0123456789" * 3)
        kept, held = load_pieces([str(tmp_path)], tokenizer, Cut(8, 4))
        assert texts(kept, tokenizer) == ["01234567", "89012345", "67890123", "456789"]
        assert len(held) == 0

    def test_short_ones_are_left_out(self, tmp_path: Path, tokenizer: Any) -> None:
        file = lines(tmp_path, {"text": "abc"}, {"text": "abcd"}, {"text": ""}, {"text": "abcdefghij"})
        kept, _ = load_pieces([str(file)], tokenizer, Cut(8, 4))
        assert texts(kept, tokenizer) == ["abcd", "abcdefgh"]

    def test_packing_joins_documents(self, tmp_path: Path, tokenizer: Any) -> None:
        file = lines(tmp_path, {"text": "abc"}, {"text": "de"}, {"text": "fghijklm"})
        kept, _ = load_pieces([str(file)], tokenizer, Cut(6, 4, pack=True))
        assert [kept[number]["input_ids"].tolist()[3] for number in range(2)] == [EOS, kept[1]["input_ids"][3].item()]
        assert texts(kept, tokenizer) == ["abc</s>de", "</s>fghij", "klm</s>"]

    def test_nothing_long_enough(self, tmp_path: Path, tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"no text of 4 tokens or more.*--pack"):
            load_pieces([str(lines(tmp_path, {"text": "abc"}))], tokenizer, Cut(8, 4))

    def test_an_opening_begins_every_piece(self, tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr("ahn.training.data.opening_of", lambda tokenizer: [BOS])
        (tmp_path / "a.txt").write_text("0123456789")
        kept, _ = load_pieces([str(tmp_path)], tokenizer, Cut(6, 3))
        assert texts(kept, tokenizer) == ["<s>01234", "<s>56789"]
        assert kept[0]["labels"].tolist()[:2] == [-100, kept[0]["input_ids"].tolist()[1]]

    def test_long_texts_are_tokenised_in_parts(self, tmp_path: Path, tokenizer: Any) -> None:
        text = "".join(f"line {number}\n" for number in range(30_000))
        (tmp_path / "a.txt").write_text(text)
        kept, _ = load_pieces([str(tmp_path)], tokenizer, Cut(1000, 2))
        assert "".join(texts(kept, tokenizer)) == text

    @pytest.mark.parametrize("share", [0.1, 0.25])
    def test_a_share_is_held_out(self, tmp_path: Path, tokenizer: Any, share: float) -> None:
        (tmp_path / "book.txt").write_text("".join(f"{number:04d}" for number in range(100)))
        lines(tmp_path, *({"text": f"{number:04d}"} for number in range(1000, 1100)))
        kept, held = load_pieces([str(tmp_path)], tokenizer, Cut(4, 4, held_out=share))
        assert len(held) == round(200 * share)
        book = [text for text in texts(held, tokenizer) if text < "1000"]
        assert book == [f"{number:04d}" for number in range(100 - len(book), 100)]  # the end of the book
        assert sorted(texts(kept, tokenizer) + texts(held, tokenizer)) == [
            f"{n:04d}" for n in [*range(100), *range(1000, 1100)]
        ]

    def test_a_few_pieces_of_each_document(self, tmp_path: Path, tokenizer: Any) -> None:
        (tmp_path / "long.txt").write_text("".join(f"{number:04d}" for number in range(100)))
        (tmp_path / "short.txt").write_text("abcd")
        kept, held = load_pieces([str(tmp_path)], tokenizer, Cut(4, 4, held_out=0.3, per_document=4))
        assert texts(kept, tokenizer) == ["0012", "0037", "0062", "abcd"]
        assert texts(held, tokenizer) == ["0087"]

    @pytest.mark.parametrize("wrong", [{"min_length": 9}, {"min_length": 1}, {"held_out": 1.0}, {"held_out": -0.1}])
    def test_settings_are_checked(self, wrong: Any) -> None:
        with pytest.raises(ConfigError, match=r"min_length|held_out"):
            Cut(**{"length": 8, "min_length": 4, **wrong})

    def test_streaming_gives_the_same(self, tmp_path: Path, tokenizer: Any) -> None:
        (tmp_path / "a.txt").write_text("0123456789" * 30)
        cut = Cut(8, 4, held_out=0.25)
        kept, held = load_pieces([str(tmp_path)], tokenizer, cut)
        stream, first = stream_pieces([str(tmp_path)], tokenizer, cut, held_out_pieces=4)
        for _ in range(2):
            streamed = [tokenizer.decode(item["input_ids"]) for item in stream]
            assert streamed == texts(kept, tokenizer)
        assert texts(first, tokenizer) == texts(held, tokenizer)[:4]


class TestConversations:
    MESSAGES = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    )

    def test_only_the_assistant_counts(self, tmp_path: Path, tokenizer: Any) -> None:
        (document,) = documents([str(lines(tmp_path, {"messages": self.MESSAGES}))])
        ids, labels = tokenise(document, tokenizer)
        assert tokenizer.decode(ids) == "<user>Hi</s><assistant>Hello</s><user>Bye</s><assistant>See you</s>"
        assert tokenizer.decode([label for label in labels or () if label != -100]) == "Hello</s>See you</s>"
        assert all(label in (-100, token) for token, label in zip(ids, labels or ()))

    def test_pieces_without_an_answer_are_left_out(self, tmp_path: Path, tokenizer: Any) -> None:
        messages = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "yes"}]
        kept, _ = load_pieces([str(lines(tmp_path, {"messages": messages}))], tokenizer, Cut(16, 2))
        assert len(kept) == 1
        assert (kept[0]["labels"] != -100).sum() == len("yes") + 1

    def test_no_template(self, tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", None)
        with pytest.raises(DataError, match=r"data\.jsonl, line 1: the tokenizer has no chat template"):
            load_pieces([str(lines(tmp_path, {"messages": self.MESSAGES}))], tokenizer, Cut(16, 2))

    def test_a_template_that_refuses(self, tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no!') }}")
        with pytest.raises(DataError, match=r"line 1: the chat template refuses the messages \(no!\)"):
            load_pieces([str(lines(tmp_path, {"messages": self.MESSAGES}))], tokenizer, Cut(16, 2))


class TestBadRecords:
    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ('{"text": "abc"', r"it is no JSON \(Expecting ',' delimiter, column 15\)"),
            ("[1, 2]", 'neither "text" nor "messages"'),
            ({"body": "abc"}, 'neither "text" nor "messages"'),
            ({"text": 5}, '"text" is no string, but int'),
            ({"text": None}, '"text" is no string, but NoneType'),
            ({"messages": "hi"}, '"messages" is no list, but str'),
            ({"messages": [{"role": "user"}]}, 'message 1 has no "role" and "content"'),
            ({"messages": [{"role": "user", "content": "hi"}]}, "no message is the assistant's"),
        ],
    )
    def test_is_named_by_file_and_line(self, tmp_path: Path, record: Any, message: str) -> None:
        file = lines(tmp_path, {"text": "fine"}, "", record)
        with pytest.raises(DataError, match=rf"data\.jsonl, line 3: .*{message}"):
            list(documents([str(file)]))

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: it is not UTF-8"):
            list(documents([str(tmp_path)]))
        (tmp_path / "a.jsonl").unlink()
        for content, message in ((b"\xff\xfe", "not UTF-8"), (b"a\0b", "binary")):
            (tmp_path / "a.txt").write_bytes(content)
            with pytest.raises(DataError, match=rf"a\.txt is {message}"):
                list(documents([str(tmp_path)]))


class TestPlaces:
    def test_folders_are_read_in_order(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        for name in ("b/2.md", "a.txt", "c.jpg", "d.rst"):
            (tmp_path / name).write_text(name)
        assert [document.text for document in documents([str(tmp_path)])] == ["a.txt", "b/2.md", "d.rst"]

    @pytest.mark.parametrize("place", ["./nowhere", "nowhere.txt", "a/b/c", "/nowhere"])
    def test_one_that_does_not_exist(self, place: str) -> None:
        with pytest.raises(DataError, match="does not exist"):
            check_places([place])

    def test_a_folder_with_nothing_in_it(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file to train on"):
            check_places([str(tmp_path)])

    def test_a_name_could_be_a_dataset(self) -> None:
        check_places(["wikitext", "owner/name"])

    @pytest.mark.parametrize("streaming", [False, True])
    def test_datasets(self, tmp_path: Path, streaming: bool) -> None:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "other": [1, 2, 3]})
        made.to_parquet(str(tmp_path / "table" / "train.parquet"))
        made.save_to_disk(str(tmp_path / "saved"))
        for name in ("table", "saved"):
            place = str(tmp_path / name)
            check_places([place])
            found = list(documents([place], DataQuery(streaming=streaming)))
            assert [document.text for document in found] == ["one", "two", "three"]
            assert found[1].where == f"{place}, record 1"

    def test_a_dataset_without_such_a_split(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(str(tmp_path / "train.parquet"))
        with pytest.raises(DataError, match="cannot be loaded as a dataset"):
            list(documents([str(tmp_path)], DataQuery(split="nowhere")))

    def test_a_name_that_is_nothing_here_and_not_on_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def load(name: str, *args: Any, **options: Any) -> None:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", load)
        says = (
            r"^nope is neither a file or folder here nor a dataset that can be reached \(ConnectionError: Couldn't .*"
        )
        with pytest.raises(DataError, match=says):
            list(documents(["nope"]))


def test_batches_are_padded_on_the_right() -> None:
    rows = Pieces([Piece([5, 6, 7]), Piece([8], [-100])])
    batch = collate([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in collate([rows[0]])
    assert rows.tokens == 4
    assert batch["input_ids"].dtype == torch.int64
