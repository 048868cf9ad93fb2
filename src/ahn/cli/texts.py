"""The texts that come with the commands: a long one for `ahn demo`, a short one for `ahn probe`."""

from __future__ import annotations

from importlib import import_module


def reference() -> str:
    """Python's own language reference, about 113,000 tokens of SmolLM2, as every Python carries it for `help()`."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(f"{title}\n\n{text}" for title, text in topics.items())


def with_fact(text: str, fact: str, letters: int = 1500) -> str:
    """A text with a sentence hidden in it, where a line or a sentence ends.

    Args:
        text: The text.
        fact: The sentence.
        letters: Characters before it, about; a tenth of the text at most.
    """
    start = min(letters, len(text) // 10)
    ends = [position + len(end) for end in (". ", ".\n", "\n\n") if (position := text.find(end, start)) >= 0]
    position = min(ends, default=start)
    return f"{text[:position]}{fact} {text[position:]}"


def lighthouse() -> str:
    """A short story, 400 tokens of SmolLM2, whose end needs names and numbers from its beginning."""
    return _LIGHTHOUSE


_LIGHTHOUSE = """\
The keeper of the Skerry Point lighthouse was called Ilse Marrow. She came to the island on 14 March 1871 with two \
goats, a brass telescope and a red notebook, in which she wrote down every ship that passed. Her lamp was seen for \
17 miles, and it turned once in 40 seconds.

The ferryman Tobias Quill rowed over every Thursday. He brought flour, letters and lamp wick, and took back goat \
cheese, for which he paid 3 shillings a pound. He did not like the telescope, because he said that it made far \
things look as if they were already here. He liked the notebook better, and sometimes asked her to read a page of it \
to him while he drank his tea.

In the autumn of that year the storms came early. For eleven days nobody could cross the water. The wind broke two \
panes of the lantern, and the rain put out the lamp. On the last night she saw a schooner that was far too close to \
the rocks. She tied the goats' bells to a rope and rang them from the gallery until morning. The schooner turned \
away, and in the grey light she could read its name, which was the Halcyon Maid.

When the sea was calm again, the ferryman came with flour, letters and lamp wick, as always. He asked what she had \
done, and she showed him the page: the date, the wind, the broken panes, and at the bottom the name of the ship, the \
Halcyon Maid. He paid for the cheese, 3 shillings a pound, and asked if he might look through the brass telescope \
after all. Ilse Marrow laughed, and put the red notebook back. That evening Skerry Point could be seen for 17 miles \
again, and the lamp turned once in 40 seconds.
"""
