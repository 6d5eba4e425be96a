"""Parsers whose options are the fields of config classes, with help that reads well.

`simple_parsing` makes the options; here they are put into named sections, described by the docstring of their class or
field alone (SAELens's comments are no help), and a mistake is a ValueError of one line.
"""

import argparse
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from simple_parsing import ArgumentParser
from simple_parsing.docstring import dp_parse, get_attribute_docstring
from simple_parsing.helpers.custom_actions import BooleanOptionalAction
from simple_parsing.wrappers.dataclass_wrapper import DataclassWrapper
from typing_extensions import override


class HelpFormatter(argparse.HelpFormatter):
    """`--flag type` and its help, a column for each; of a bool no separate --noflag; paragraphs stay."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, **kwargs)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(textwrap.fill(p, width, initial_indent=indent, subsequent_indent=indent) for p in paragraphs)

    @override
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return _name(action).upper()
        flags = ", ".join(_flags(action))
        return flags if action.nargs == 0 else f"{flags} {_metavar(action)}"


class CommandParser(ArgumentParser):
    """The parser of one command.

    Args:
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
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in self._by_section().items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

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
                elif name not in self._hidden:
                    title = self._titles.get(wrapper.dataclass.__name__, wrapper.dataclass.__name__)
                    rest.setdefault(title, []).append(action)
        sections = {title: [found[name] for name in names if name in found] for title, names in self._sections.items()}
        return sections | rest | {"other": [self._help_action]}

    def _describe(self, name: str, action: argparse.Action, wrapper: DataclassWrapper[Any], field_name: str) -> str:
        text = self._told.get(name) or description(wrapper.dataclass, field_name)
        stated, usual = "(required)" if action.required else "", self._usual.get(name, action.default)
        if name not in self._measured and usual != action.default:
            stated = f"(default: {action.default}; SAELens's: {usual})"
        elif name not in self._measured and action.default not in (None, "", (), argparse.SUPPRESS):
            stated = f"(default: {action.default})"
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


def _name(action: argparse.Action) -> str:
    """An option's longest flag without its dashes, a positional's name."""
    return max(_flags(action), key=len).lstrip("-") if action.option_strings else action.dest.rpartition(".")[2]


def _metavar(action: argparse.Action) -> str:
    """What stands for an option's value in the help: its type, or its choices."""
    if action.choices is not None:
        return action.metavar if isinstance(action.metavar, str) else "{" + ",".join(map(str, action.choices)) + "}"
    name = str(action.metavar or getattr(action.type, "__name__", "str"))
    name = re.sub(r"json_dict|\bdict\b", "JSON", name.replace("Literal", "str"))
    return re.sub(r"[\[\]]", "", name).split(" ")[0] + (" ..." if action.nargs == "*" else "")
