"""Model cards: the README of an adapter, with the metadata for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ahn._home import write_text
from ahn.checkpoint.content import BaseInfo
from ahn.config import USUAL_ANCHORS, AHNConfig

CARD = "README.md"
_MARK = "<!-- Written by ahn, and again with every save. Delete this line to keep a text of your own. -->"
_TAGS = ["ahn", "long-context", "recurrent-memory"]


def write_card(
    folder: Path,
    config: AHNConfig,
    base: BaseInfo,
    *,
    parameters: int,
    source: str = "FOLDER",
    anchors: bool = False,
    sections: Mapping[str, str] | None = None,
    licence: str | None = None,
    datasets: Sequence[str] = (),
) -> bool:
    """Writes the card of an adapter, unless its folder has a README that somebody else wrote.

    Args:
        folder: The adapter's folder.
        config: Settings of its memory.
        base: The base model that it was made for.
        parameters: Parameters of the memory.
        source: The repository or folder to load it from.
        anchors: Whether the folder holds the weights of anchor scores too.
        sections: Further sections, Markdown by heading: how it was trained, what was measured.
        licence: Licence of the adapter as the hub names it, such as "apache-2.0".
        datasets: Names on the hub of what it was trained on.

    Returns:
        Whether a card was written.

    Raises:
        OutputError: The folder cannot be written.
    """
    file = folder / CARD
    if file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return False
    text = f"---\n{_metadata(base, licence, datasets)}\n---\n\n{_body(config, base, parameters, source, anchors)}"
    text += "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in (sections or {}).items())
    write_text(file, f"{text}\n{_MARK}\n")
    return True


def _metadata(base: BaseInfo, licence: str | None, datasets: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    named = base.name if base.name and not Path(base.name).is_absolute() else None
    data = ModelCardData(
        base_model=named,
        library_name="ahn",
        license=licence,
        datasets=list(datasets) or None,
        pipeline_tag="text-generation",
        tags=_TAGS,
    )
    return str(data.to_yaml()).strip()


def _body(config: AHNConfig, base: BaseInfo, parameters: int, source: str, anchors: bool) -> str:
    """What it is and how it is loaded."""
    name = Path(base.name).name if base.name else "its base model"
    known = base.name or "BASE"
    more = f"  # with {USUAL_ANCHORS} anchors; anchors=0 for none" if anchors else ""
    return f"""# A memory for {name}

A long-term memory of fixed size ({config.memory}, {parameters:,} parameters) for `{known}`, by the library `ahn`
([Artificial Hippocampus Networks](https://arxiv.org/abs/2510.07318)). It holds no weights of the base model.

```python
import ahn

model = ahn.from_pretrained("{known}", adapter="{source}"){more}
```

| setting | value |
|---|---|
| memory | {config.memory} |
| window, sinks | {config.window}, {config.sinks} (settings of a run: any run may choose others) |
| sink positions, memory positions | {config.sink_positions}, {config.memory_positions} |
| layers | {"all with full attention" if config.layers is None else ", ".join(map(str, config.layers))} |
"""
