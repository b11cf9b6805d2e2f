"""The commands of ``graft``: each is imported when it is called or described."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = (
    "demo",
    "survey",
    "plan",
    "init",
    "doctor",
    "verify",
    "train",
    "check",
    "check-merged",
    "card",
    "prove",
    "probe",
    "matrix",
    "merge",
    "convert",
    "rekey",
    "rules",
    "env",
)


class Group(TyperGroup):
    """The group of all commands, in the order in which its help lists them.

    Its help is plain text: to draw boxes takes longer than all the rest of it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 (as typer calls it)
        """Return the names of the commands without importing them."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (as typer calls it)
        """Write each command with all that its docstring's first paragraph says, which typer would cut short."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in COMMANDS])


class _Commands(MutableMapping[str, Any]):
    """Commands by name, made when they are asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = _command(name)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _command(name: str) -> TyperCommand:
    """Make one command of its function, with plain help."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(_function(name))
    made = typer.main.get_command(single)
    assert isinstance(made, TyperCommand)
    return made


def _summary(name: str) -> str:
    text = inspect.getdoc(_function(name)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _function(name: str) -> Callable[..., Any]:
    """Import the function of a command: the one of its module's own name."""
    stem = name.replace("-", "_")
    function: Callable[..., Any] = getattr(importlib.import_module(f"graftkit.cli.commands.{stem}"), stem)
    return function
