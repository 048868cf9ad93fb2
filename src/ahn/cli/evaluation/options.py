"""What the commands of `ahn eval` that run a model have in common: options, the folder of a run, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.terminal import UsageError, notes, output, say
from ahn.errors import ConfigError
from ahn.evaluation.arm_names import ARMS, GRAMMAR, Arm, find_arm

if TYPE_CHECKING:
    from torch import nn

    from ahn.cli.loading import Loaded
    from ahn.evaluation.journal import Journal
    from ahn.evaluation.page import Page
    from ahn.evaluation.report import EvaluationReport

MODEL, WINDOW, SINKS, SINK_POSITIONS = "smollm2-135m", 1024, 32, "bounded"
JOURNAL, REPORT, PAGE = "journal.jsonl", "report.json", "report.html"

Model = Annotated[str, typer.Option(help="A built-in name, a folder, or a hub id owner/name.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of the memory's weights; none for an untrained one.  "
        "[dim]\\[default: what ships for the model][/dim]"
    ),
]
Window = Annotated[int, typer.Option(help="Tokens kept exactly behind the current one.")]
Sinks = Annotated[int, typer.Option(help="First tokens that are kept for ever.")]
SinkPositions = Annotated[str, typer.Option(metavar="bounded|absolute", help="How far away the sinks may seem.")]
Arms = Annotated[str, typer.Option(help=f"Ways to read, joined by commas: {', '.join(ARMS)}, window+64, ahn+64.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for report, plots and journal; the same command again goes on where it stopped."),
]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]


@dataclasses.dataclass
class Run:
    """A run that was checked and can start, or go on.

    Attributes:
        settings: Everything that the results depend on, by name.
        arms: Names of the arms.
        out: The folder for what it writes, or `None`.
        journal: What is finished; commands add their items.
    """

    settings: dict[str, Any]
    arms: list[str]
    out: Path | None
    journal: Journal

    def load(self) -> Loaded:
        """Loads the model and its memory, and checks that the weights are those that the journal was begun with.

        What arms such as `ahn+64` choose anchors by goes into the settings.

        Raises:
            AHNError: Anything about the names, the files or the settings is wrong, or weights of the memory or of the
                votes on anchors changed.
        """
        from ahn.cli import loading

        of = self.settings
        loading.seed(of["seed"])
        loaded = loading.load(
            loading.ModelSettings(of["model"], of["adapter"], of["window"], of["sinks"], of["sink_positions"])
        )
        self.journal.pin("memory weights", weights_checksum(loaded.model))
        if anchored := [arm for arm in map(find_arm, self.arms) if arm.has_anchors]:
            self._check_scores(loaded.model, anchored)
            self.journal.pin("votes on anchors", score_checksum(loaded.model))
        return loaded

    def _check_scores(self, model: Any, anchored: Iterable[Arm]) -> None:
        """Checks that the model can choose anchors as each arm asks, before one of them has read for an hour.

        What those choose by that name no score goes into the settings.
        """
        from ahn.attachment import mode
        from ahn.cache import HippocampalCache
        from ahn.evaluation.controls import CONTROLS, Oracle

        # Recall alone knows which tokens an oracle wants.
        known = {*CONTROLS, Oracle.name} if self.settings["command"] == "recall" else CONTROLS.keys()
        for arm in anchored:
            if arm.anchor_score in known:
                continue
            with mode(model, "ahn", **arm.settings(self.settings["window"])):
                chosen = HippocampalCache(model).settings.anchor_score
            if arm.anchor_score is None:
                self.settings["anchor_score"] = chosen

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The work itself; interrupted, it says what is kept and how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            if self.out is not None:
                count = len(self.journal.done)
                say(f"{count:,} finished item{'' if count == 1 else 's'} kept in {self.out}; the same command goes on.")
            raise

    def finish(self, report: EvaluationReport, page: Page, figures: Mapping[str, Any]) -> None:
        """Writes report, page and figures into the folder, where there is one, and says so.

        Args:
            report: The report.
            page: The page.
            figures: Figures of matplotlib, by the name of the PNG file without its suffix.
        """
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        report.write(self.out / REPORT)
        page.write(self.out / PAGE)
        for name, figure in figures.items():
            figure.savefig(self.out / f"{name}.png", dpi=150)
        names = [REPORT, PAGE, *(f"{name}.png" for name in figures)]
        say(f"wrote {', '.join(names)} to {self.out}", console=output())


def open_run(
    command: str,
    *,
    model: str,
    adapter: str | None,
    window: int,
    sinks: int,
    sink_positions: str,
    arms: str,
    out: Path | None,
    seed: int,
    **own: Any,
) -> Run:
    """Checks the options that the commands share, before anything is loaded.

    Args:
        command: Name of the command.
        model: As given, like all that follow.
        adapter: Likewise.
        window: Likewise.
        sinks: Likewise.
        sink_positions: Likewise.
        arms: Names joined by commas.
        out: The folder to write to, or `None`.
        seed: Of the random numbers, at least 0.
        **own: The command's own settings that its results depend on; of files, their checksums too.

    Raises:
        UsageError: An option cannot work.
        EvaluationError: The folder holds a run with other settings.
    """
    checks.span(window, sinks, sink_positions)
    checks.at_least("--seed", seed, 0)
    checks.adapter(adapter)
    names = arm_names(arms)
    folder = None if out is None else out.expanduser()
    if folder is not None:
        _check_folder(folder)
    from ahn.evaluation.journal import Journal

    settings = {
        "command": command,
        "model": model,
        "adapter": adapter,
        "arms": names,
        "window": window,
        "sinks": sinks,
        "sink_positions": sink_positions,
        "seed": seed,
        **own,
    }
    journal = Journal(None if folder is None else folder / JOURNAL, settings)
    if journal.done:
        count = len(journal.done)
        say(f"going on with {folder}: {count:,} finished item{'' if count == 1 else 's'}", console=notes())
    return Run(settings, names, folder, journal)


def arm_names(arms: str) -> list[str]:
    """The arms in "full,window,ahn+64", each once.

    Args:
        arms: Names joined by commas.

    Raises:
        UsageError: There is none, or an unknown one.
    """
    found = checks.words(arms)
    for name in found or [""]:
        _check_arm(name)
    return found


def _check_arm(name: str) -> None:
    try:
        find_arm(name)
    except ConfigError:
        raise UsageError(f"--arms takes {GRAMMAR}, not '{name}'.") from None


def weights_checksum(model: Any) -> str:
    """SHA-256 of all weights of a model's memories, in hexadecimal."""
    from ahn.attachment import attachment_of

    return _checksum((site.index, site.memory) for site in attachment_of(model).sites)


def score_checksum(model: Any) -> str:
    """SHA-256 of all weights of a model's votes on anchors, in hexadecimal."""
    from ahn.attachment import attachment_of

    return _checksum((site.index, site.anchor_weights) for site in attachment_of(model).sites)


def _checksum(parts: Iterable[tuple[int, nn.Module | None]]) -> str:
    """SHA-256 of all weights of modules, each with the index of its layer."""
    import hashlib

    import torch

    checksum = hashlib.sha256()
    for index, module in parts:
        for name, weights in module.state_dict().items() if module is not None else ():
            checksum.update(f"{index} {name} {tuple(weights.shape)}".encode())
            checksum.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


def _check_folder(folder: Path) -> None:
    """Checks that a run may write there: the folder is new, empty, or holds a run."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL).is_file():
        raise UsageError(f"--out {folder} holds other things than an evaluation. Name another folder.")
    if find_spec("matplotlib") is None:
        raise UsageError("--out needs matplotlib. Install it: pip install 'ahn[eval]'")
