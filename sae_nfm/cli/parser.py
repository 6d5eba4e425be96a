"""Parsers whose options are the fields of config classes, with help that reads well.

`simple_parsing` makes the options; here they are put into named sections, described by the docstring of their class or
field alone (SAELens's comments are no help), and a mistake is a ValueError of one line.
"""

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from simple_parsing import ArgumentParser
from simple_parsing.docstring import dp_parse, get_attribute_docstring
from simple_parsing.helpers.custom_actions import BooleanOptionalAction
from simple_parsing.wrappers.dataclass_wrapper import DataclassWrapper
from typing_extensions import override

from sae_nfm_cli.command import WIDTH


class HelpFormatter(argparse.HelpFormatter):
    """`--flag type` and its help, a column for each; of a bool no separate --noflag; paragraphs stay."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        width = min(shutil.get_terminal_size().columns, WIDTH) - 2
        super().__init__(prog, max_help_position=34 if width > 80 else 28, width=width, **kwargs)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(textwrap.fill(p, width, initial_indent=indent, subsequent_indent=indent) for p in paragraphs)

    @override
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names have hyphens

    @override
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return _name(action).upper()
        flags = ", ".join(_flags(action))
        return flags if action.nargs == 0 else f"{flags} {_metavar(action)}"


class CommandParser(ArgumentParser):
    """The parser of one command.

    Every one has --json and --debug; `sae_nfm.cli.main` acts on them.

    Args:
        examples: command lines, each after what it does; they stand before the options.
        sections: titles of the help's sections, each with the options that stand there in that order; options named nowhere
            follow under the title of their class. A section without options keeps the place for a class's title.
        titles: the title for a config class, by its name.
        hidden: options that are accepted and not shown.
        told: help for an option in place of its docstring.
        measured: options whose default says nothing, as another value is found out.
        usual: defaults elsewhere (SAELens's), by option; the help names them where ours differ.
        kwargs: as for `simple_parsing.ArgumentParser`.
    """

    def __init__(
        self,
        *,
        examples: Sequence[tuple[str, str]] = (),
        sections: Mapping[str, Sequence[str]] | None = None,
        titles: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
        told: Mapping[str, str] | None = None,
        measured: Sequence[str] = (),
        usual: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "formatter_class": HelpFormatter,
            "allow_abbrev": False,
            "usage": "%(prog)s [options]",
        }
        super().__init__(**(defaults | kwargs))
        self.add_argument(
            "--json", action="store_true", help="Print the result as JSON on stdout, and nothing else there."
        )
        self.add_argument("--debug", action="store_true", help="Print the traceback of an error.")
        self._help_action.help = "Print this help."
        self._examples = examples
        self._sections, self._titles, self._hidden = sections or {}, titles or {}, hidden
        self._told, self._measured, self._usual = told or {}, measured, usual or {}

    @override
    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None, attempt_to_reorder: bool = False
    ) -> tuple[argparse.Namespace, list[str]]:
        assert args is not None
        self._preprocessing(args, namespace)
        optional = {f: a for a in self._actions if a.nargs == "?" for f in a.option_strings if a.const is None}
        spelt = [arg.removesuffix("=None") if arg.partition("=")[0] in optional else arg for arg in args]
        kept = [a for i, a in enumerate(spelt) if not (a == "None" and i and spelt[i - 1] in optional)]
        return super().parse_known_args(kept, namespace, attempt_to_reorder)

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` has every option")

    @override
    def format_help(self) -> str:
        head, rest = self._get_formatter(), self._get_formatter()
        head.add_text(self.description)
        head.add_usage(self.usage, [], [])
        for title, actions in self._by_section().items():
            rest.start_section(title)
            rest.add_arguments(actions)
            rest.end_section()
        rest.add_text(self.epilog)
        examples = "\n".join(f"  # {told}\n  {line}" for told, line in self._examples)
        parts = [head.format_help(), f"examples:\n{examples}\n" if examples else "", rest.format_help()]
        return "\n".join(part for part in parts if part)

    def completed(self) -> "CommandParser":
        """Itself, with the options that no argument chooses made and described."""
        self._preprocessing([])
        for action in self.shown_actions():
            action.option_strings = _flags(action)
        return self

    def shown_actions(self) -> list[argparse.Action]:
        """What the help names."""
        return [action for actions in self._by_section().values() for action in actions]

    def _by_section(self) -> dict[str, list[argparse.Action]]:
        actions = {action.dest: action for action in self._actions}
        named = {name for names in self._sections.values() for name in names}
        found: dict[str, argparse.Action] = {}
        rest: dict[str, list[argparse.Action]] = {}
        for wrapper in self._wrappers:
            for field in wrapper.fields:
                action = actions[field.dest]
                name = _name(action)
                action.help = self._describe(name, action, wrapper, field.name)
                if name in named:
                    found[name] = action
                elif name in self._hidden:
                    action.help = argparse.SUPPRESS
                elif not action.option_strings:
                    rest.setdefault("arguments", []).append(action)
                else:
                    title = self._titles.get(wrapper.dataclass.__name__, wrapper.dataclass.__name__)
                    rest.setdefault(title, []).append(action)
        sections = {title: [found[name] for name in names if name in found] for title, names in self._sections.items()}
        return sections | rest | {"every command": [actions["json"], actions["debug"], self._help_action]}

    def _describe(self, name: str, action: argparse.Action, wrapper: DataclassWrapper[Any], field_name: str) -> str:
        text = self._told.get(name) or description(wrapper.dataclass, field_name)
        stated, usual = "(required)" if action.required else "", self._usual.get(name, action.default)
        if name not in self._measured and usual != action.default:
            stated = f"(default: {_typed(action.default)}; SAELens's: {_typed(usual)})"
        elif name not in self._measured and action.default not in (None, "", (), (None,), {}, argparse.SUPPRESS):
            stated = f"(default: {_typed(action.default)})"
        return f"{text} {stated}".strip().replace("%", "%%") or " "


def description(config_class: type, field_name: str) -> str:
    """A field's description: in the Args section of its class or a base of it, else the docstring below it; "" for none."""
    for base in inspect.getmro(config_class):
        for parameter in dp_parse(inspect.cleandoc(vars(base).get("__doc__") or "")).params:
            if parameter.arg_name == field_name and parameter.description:
                text = " ".join(parameter.description.split())
                return re.sub(r" ?(Inherited from \w+\.?|\(default is [^)]*\)\.?)$", "", text)
    return " ".join(get_attribute_docstring(config_class, field_name).docstring_below.split())


def underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with the dashes inside an option's name as underscores: --hook-name is --hook_name."""
    return [re.sub(r"(?<=^--)[^=]*", lambda name: name[0].replace("-", "_"), arg) for arg in argv]


def dashed(argv: Sequence[str]) -> list[str]:
    """The other way round: --hook_name is --hook-name."""
    return [re.sub(r"(?<=^--)[^=]*", lambda name: name[0].replace("_", "-"), arg) for arg in argv]


def _flags(action: argparse.Action) -> list[str]:
    hidden = action.negative_option_strings if isinstance(action, BooleanOptionalAction) else []
    return [flag for flag in action.option_strings if flag not in hidden]


def _typed(value: Any) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _name(action: argparse.Action) -> str:
    """An option's longest flag without its dashes, a positional's name."""
    return max(_flags(action), key=len).lstrip("-") if action.option_strings else action.dest.rpartition(".")[2]


def _metavar(action: argparse.Action) -> str:
    """What stands for an option's value in the help: its type, or its choices."""
    if action.choices is not None:
        return action.metavar if isinstance(action.metavar, str) else "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(action, BooleanOptionalAction):
        return "[bool]"  # the option alone stands for true
    name = str(action.metavar or getattr(action.type, "__name__", "str"))
    name = re.sub(r"json_dict|\bdict\b", "JSON", name.replace("Literal", "str"))
    return re.sub(r"[\[\]]", "", name).split(" ")[0] + (" ..." if action.nargs == "*" else "")
