"""Options from the fields of settings classes: types, defaults, checks, help, older spellings."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError
from ahn.config import same_setting, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """One field of every kind."""

    texts: tuple[str, ...] = setting(help="Texts.", argument=True, metavar="TEXT")
    model: str = setting("small", "A model.", alias="base")
    window: int = setting(8, "Tokens.", least=1)
    rate: float | None = setting(None, "A rate.", least=0, unset="the usual one")
    where: Literal["near", "far"] = setting("near", "A place.", choices=("near", "far"))
    arms: tuple[str, ...] = setting(("full", "ahn"), "Arms.", joined=True)
    plots: tuple[Path, ...] = setting((), "Files.", names="--plot")
    chat: bool | None = setting(None, "Chat.", names="--chat/--no-chat")
    losses: dict[str, float] = setting(help="Only in files.", factory=dict, option=False)
    plain: int = 3


@dataclasses.dataclass(frozen=True)
class Wider(Settings):
    """The same with another default."""

    window: int = same_setting(Settings, "window", default=16, help="More tokens.")


def call(annotation: Any, *words: str) -> Any:
    """What a command with one such parameter is given, and what it says."""
    got: list[Any] = []

    def command(settings: Any, force: Annotated[bool, typer.Option("--force")] = False) -> None:
        """Does it."""
        got.append((settings, force))

    command.__annotations__["settings"] = annotation
    app = typer.Typer()
    app.command()(from_fields(command))
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "80", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return got[0] if got else result.output


class TestInstance:
    def test_defaults(self):
        assert call(Settings, "a", "b") == (Settings(("a", "b")), False)
        assert call(Wider, "a")[0].window == 16

    def test_values(self):
        words = (
            "a --model big --window 2 --rate 0.5 --where far --arms ahn,ahn,,full --plot x.png --plot y.svg --no-chat"
        )
        settings, forced = call(Settings, *words.split(), "--force")
        plots = (Path("x.png"), Path("y.svg"))
        assert settings == Settings(("a",), "big", 2, 0.5, "far", ("ahn", "full"), plots, chat=False)
        assert forced

    def test_the_older_spelling(self):
        assert call(Settings, "a", "--base", "old")[0].model == "old"

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ("--window 0", "--window must be at least 1, not 0."),
            ("--rate nan", "--rate must be at least 0, not nan."),
            ("--where away", "--where must be near or far, not 'away'."),
        ],
    )
    def test_wrong_values(self, words, says):
        with pytest.raises(UsageError, match=says.replace(".", r"\.")):
            call(Settings, "a", *words.split())

    def test_what_is_no_option(self):
        assert "No such option" in call(Settings, "a", "--losses", "kl")
        assert "No such option" in call(Settings, "a", "--plain", "1")
        assert "Missing argument" in call(Settings)


class TestOnlyWhatWasGiven:
    GIVEN = Annotated[dict[str, Any], Settings]

    def test_values(self):
        assert call(self.GIVEN, "a")[0] == {"texts": ("a",)}
        assert call(self.GIVEN, "a", "--window", "0", "--base", "b")[0] == {"texts": ("a",), "model": "b", "window": 0}
        assert call(self.GIVEN, "a", "--arms", "ahn", "--no-chat")[0] == {
            "texts": ("a",),
            "arms": ("ahn",),
            "chat": False,
        }


@pytest.mark.parametrize("annotation", [Settings, Annotated[dict[str, Any], Settings]], ids=["instance", "given"])
def test_help(annotation: Any) -> None:
    shown = " ".join(call(annotation, "--help").replace("│", " ").split())
    for words in ("near|far A place. [default: near]", "[default: 8]", "A rate. [default: the usual one]", "full,ahn]"):
        assert words in shown, shown
    assert "--no-chat" in shown
    assert "--base" not in shown
    assert "--losses" not in shown
