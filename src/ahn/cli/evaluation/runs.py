"""What the commands of `ahn eval` that run a model have in common: options, the folder of a run, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ahn.cli.loading import ModelSettings
from ahn.cli.terminal import UsageError, log, notes, output, work_bar
from ahn.config import Mode, setting
from ahn.errors import ConfigError
from ahn.evaluation.arm_names import GRAMMAR, find_arm

if TYPE_CHECKING:
    from torch import nn

    from ahn.cli.loading import Loaded
    from ahn.evaluation.journal import Journal
    from ahn.evaluation.page import Page

JOURNAL, REPORT, PAGE = "journal.jsonl", "report.json", "report.html"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run writes, and what its random numbers depend on."""

    out: Path | None = setting(
        None, "Folder for report, plots and journal; the same command again goes on where it stopped."
    )
    seed: int = setting(0, "Of all random numbers.", least=0)
    anchor_weights: str | None = setting(
        None, "Folder or name of the weights of anchor scores.", unset="what ships for the model"
    )


@dataclasses.dataclass
class Run:
    """A run that was checked and can start, or go on.

    Attributes:
        source: The model that is measured, and what it keeps exactly.
        settings: Everything that the results depend on, by name.
        arms: Names of the arms.
        out: The folder for what it writes, or `None`.
        journal: What is finished; commands add their items.
    """

    source: ModelSettings
    settings: dict[str, Any]
    arms: tuple[str, ...]
    out: Path | None
    journal: Journal

    def load(self) -> Loaded:
        """Loads the model and its memory, and checks that the weights are those that the journal was begun with.

        What arms such as `ahn+64` choose anchors by goes into the settings.

        Raises:
            AHNError: Anything about the names, the files or the settings is wrong, or weights of the memory or of the
                anchor scores changed.
        """
        from ahn.attachment import attachment_of
        from ahn.checkpoint import load_anchors
        from ahn.cli import loading

        loading.seed(self.settings["seed"])
        loaded = loading.load(self.source)
        if self.settings["anchor_weights"] is not None:
            load_anchors(loaded.model, self.settings["anchor_weights"])
        layers = attachment_of(loaded.model).layers
        self.journal.pin("memory weights", weights_checksum((layer.index, layer.memory) for layer in layers))
        if any(find_arm(arm).anchors for arm in self.arms):
            self._check_scores(loaded.model)
            weights = ((layer.index, layer.anchor_weights) for layer in layers)
            self.journal.pin("votes on anchors", weights_checksum(weights))
        return loaded

    def _check_scores(self, model: Any) -> None:
        """Checks that the model can choose anchors as each arm asks, before one of them has read for an hour.

        What those choose by that name no score goes into the settings.
        """
        from ahn.attachment import mode
        from ahn.cache import HippocampalCache
        from ahn.evaluation.controls import CONTROLS, Oracle

        # Recall alone tells the oracle which tokens.
        known = {*CONTROLS, Oracle.name} if self.settings["command"] == "recall" else CONTROLS.keys()
        for arm in map(find_arm, self.arms):
            if arm.anchors and arm.anchor_score not in known:
                with mode(model, cast(Mode, arm.method), **arm.settings(self.settings["window"])):
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
                log(f"{self._finished()} kept in {self.out}; the same command goes on.")
            raise

    @contextlib.contextmanager
    def reading(self, tokens: int) -> Iterator[Callable[..., None]]:
        """The work with a bar of the tokens that are read; yields what moves the bar, see `work_bar`."""
        with self.working(), work_bar(notes(), tokens, "tokens", "read") as progress:
            yield progress

    def finish(self, results: dict[str, Any], page: Page, model: Any) -> None:
        """Writes the report, the page and its figures into the folder, where there is one, and says so.

        Args:
            results: What was measured.
            page: The page; the settings and the environment are added to it.
            model: The model that was used.
        """
        if self.out is None:
            return
        from ahn.evaluation.report import EvaluationReport, environment

        command, seed = self.settings["command"], self.settings["seed"]
        report = EvaluationReport(command, self.settings, results, environment(model, seed))
        page.heading("Settings")
        page.facts({name: value for name, value in self.settings.items() if name != "files"})
        page.heading("Measured with")
        page.facts(report.environment)
        self.out.mkdir(parents=True, exist_ok=True)
        report.write(self.out / REPORT)
        page.write(self.out / PAGE)
        names = [REPORT, PAGE, *page.write_figures(self.out)]
        log(f"wrote {', '.join(names)} to {self.out}", console=output())

    def _finished(self) -> str:
        count = len(self.journal.done)
        return f"{count:,} finished item{'' if count == 1 else 's'}"


def open_run(command: str, source: ModelSettings, options: RunOptions, arms: tuple[str, ...], **own: Any) -> Run:
    """Checks the options that the commands share, and opens the journal.

    Args:
        command: Name of the command.
        source: The model, and what it keeps exactly.
        options: Where the run writes, and its seed.
        arms: Names of the arms.
        **own: The command's own settings that its results depend on; of files, their checksums too.

    Raises:
        UsageError: An option cannot work.
        EvaluationError: The folder holds a run with other settings.
    """
    check_arms(arms)
    folder = None if options.out is None else options.out.expanduser()
    if folder is not None:
        _check_folder(folder)
    from ahn.evaluation.journal import Journal

    named = {"command": command, "model": source.model, "adapter": source.adapter, "arms": list(arms)}
    exact = {"window": source.window, "sinks": source.sinks, "sink_positions": source.sink_positions}
    settings = {**named, **exact, "seed": options.seed, "anchor_weights": options.anchor_weights, **own}
    run = Run(source, settings, arms, folder, Journal(None if folder is None else folder / JOURNAL, settings))
    if run.journal.done:
        log(f"going on with {folder}: {run._finished()}", console=notes())
    return run


def check_arms(arms: tuple[str, ...]) -> None:
    """Checks the names of arms.

    Raises:
        UsageError: There is none, or an unknown one.
    """
    name = ""
    try:
        for name in arms or ("",):
            find_arm(name)
    except ConfigError:
        raise UsageError(f"--arms takes {GRAMMAR}, not '{name}'.") from None


def weights_checksum(modules: Iterable[tuple[int, nn.Module | None]]) -> str:
    """SHA-256 of all weights of modules, in hexadecimal.

    Args:
        modules: Each with the index of its layer.
    """
    import hashlib

    import torch

    checksum = hashlib.sha256()
    for index, module in modules:
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
