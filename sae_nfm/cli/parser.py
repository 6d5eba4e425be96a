"""The command line of one command: options are the fields of dataclasses, their docstrings the help; tyro reads them.

argv -> dashes, and spellings of 0.1 rewritten (`respelt`) -> tyro -> values by name -> the command's configuration
"""

import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from sae_nfm_cli.commands import WIDTH

COMMON = ("sae", "model", "hook", "dataset", "held_out", "split", "context_size", "device", "output", "save")
"""Options that mean the same in every command; they come last in the help."""
METAVARS = {"output": "FOLDER", "save": "FILE"}
SCALARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}
RENAMED = {
    "model_name": "model",
    "hook_name": "hook",
    "dataset_path": "held_out",
    "validation": "held_out",
    "validation_tokens": "held_out_tokens",
    "sweep_validation_tokens": "sweep_held_out_tokens",
    "output": "save",
}
"""Options of 0.1 with another name now, in commands that have the new one and not the old one."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command."""

    name: str
    """As its field is called; for a field of the SAE that the run has too, with "sae." before it."""
    type: Any
    default: Any = field(default_factory=lambda: MISSING)
    """MISSING for a required one."""
    help: str = ""
    section: str = ""
    positional: bool = False
    """Whether it has no flag."""
    hint: str | None = None
    """What the help says of its default, in place of the default."""
    metavar: str | None = None
    """What stands for its value in the help, in place of the type."""
    convert: Callable[[str], Any] | None = None
    """Makes its value of the text that was given, where its type is nothing tyro knows; a ValueError refuses the text."""
    aliases: tuple[str, ...] = ()
    hidden: bool = False
    """Whether the help leaves it out."""

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value but is --name or --no-name."""
        return self.type is bool

    @property
    def is_bool(self) -> bool:
        """Whether it is that, or true, false or neither."""
        return self.type in (bool, bool | None)


SWITCHES = (
    Option(
        name="json",
        type=bool,
        default=False,
        section="common",
        help="Print the result as JSON to stdout; progress goes to stderr.",
    ),
    Option(name="debug", type=bool, default=False, section="common", help="Print the traceback of an error."),
)
"""Options of every command; `sae_nfm.cli.main` acts on them."""


def options_of(config_class: type, *, positional: Sequence[str] = ()) -> list[Option]:
    """The fields of a config class as options; the positional ones, which are arguments without a flag, come first."""
    hints = get_type_hints(config_class)
    options = [
        Option(
            name=f.name,
            type=hints[f.name],
            default=default_of(f),
            help=description(config_class, f.name),
            section="common" if f.name in COMMON else "",
            positional=f.name in positional,
        )
        for f in fields(config_class)
        if f.init
    ]
    arguments = sorted((o for o in options if o.positional), key=lambda option: positional.index(option.name))
    others = sorted((o for o in options if not o.positional), key=lambda option: option.section == "common")
    return [*arguments, *others]


def default_of(f: "Field[Any]") -> Any:
    """A field's default; MISSING where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def description(config_class: type, name: str) -> str:
    """A field's description, in its class or a base: from the Args section, or else the docstring below it."""
    for base in config_class.__mro__:
        text = _descriptions(base).get(name)
        if text:
            return re.sub(r" ?(Inherited from \w+\.?|\(default is [^)]*\)\.?)$", "", " ".join(text.split()))
    return ""


@cache
def _descriptions(config_class: type) -> dict[str, str]:
    if config_class is object:
        return {}
    parsed = docstring_parser.parse_from_object(config_class)
    return {p.arg_name: p.description for p in reversed(parsed.params) if p.description}


@dataclass(frozen=True, kw_only=True)
class CommandParser:
    """Reads the arguments of one command and writes its help."""

    prog: str
    description: str
    examples: Sequence[tuple[str, str]] = ()
    """Command lines, each after what it does."""
    options: Sequence[Option]
    """In the order of the help."""
    build: Callable[[Mapping[str, Any], frozenset[str]], Any]
    """The configuration, given values by option and the names of the options that were given."""
    epilog: str = ""
    underscores: bool = False
    """Whether options have SAELens's names, with underscores; old spellings are then accepted without a warning."""

    def parse(self, argv: Sequence[str]) -> Any:
        """The configuration; a ValueError of one line for arguments that do not work."""
        return self.build(*self.values(argv))

    def values(self, argv: Sequence[str]) -> tuple[dict[str, Any], frozenset[str]]:
        """Values by option, and the names of the options that were given; for unknown, missing or wrong ones a ValueError."""
        options = [*self.options, *SWITCHES]
        args, given = respelt(argv, options, underscores=self.underscores)
        parsed, unknown = self._read(options, args)
        if unknown:
            flags = [self._flag(option).lstrip("-") for option in options if not option.hidden]
            wrong = next((arg for arg in unknown if arg.startswith("-")), "")
            near = get_close_matches(wrong.lstrip("-"), flags, n=1)
            kind = "unknown option" if wrong else "unexpected argument"
            guess = f"did you mean --{near[0]}? " if near else ""
            raise self._refused(f"{kind} {' '.join(unknown)}; {guess}")
        values: dict[str, Any] = {}
        for option in self.options:
            value = parsed[option.name]
            if option.convert is not None and value is not None:
                try:
                    value = option.convert(value)
                except ValueError:
                    raise self._refused(f"{self._flag(option)}: {value!r} is not {option.metavar}; ") from None
            if option.convert is None or value is not None:
                values[option.name] = value
        return values, given

    def _refused(self, told: str) -> ValueError:
        return ValueError(f"{told}`{self.prog} --help` has every option")

    def help(self) -> str:
        """The help: usage, description, examples, options by section."""
        width = min(shutil.get_terminal_size().columns, WIDTH)
        shown = io.StringIO()
        with _columns(width), redirect_stdout(shown), suppress(SystemExit):
            self._cli(self.root(), ["--help"])
        _, _, options = _unboxed(shown.getvalue()).partition("\n")  # without tyro's usage, which may list every option
        usage = " ".join(["usage:", self.prog, *(_metavar(o) or "" for o in self.options if o.positional), "[options]"])
        examples = "\n".join(f"  # {told}\n  {line}" for told, line in self.examples)
        parts = (usage, _wrapped(self.description, width), examples and f"examples:\n{examples}", options.strip("\n"))
        return "\n\n".join(filter(None, (*parts, _wrapped(self.epilog, width)))) + "\n"

    def root(self, options: Sequence[Option] | None = None) -> type:
        """The dataclass that tyro reads: a dataclass in it for each section; by default of the options in the help."""
        shown = [o for o in [*self.options, *SWITCHES] if not o.hidden] if options is None else options
        sections: dict[str, list[tuple[str, Any, Any]]] = {}
        for option in shown:
            where = "" if option.positional else option.section
            sections.setdefault(where, []).append(
                (_identifier(option.name), self._annotated(option, shown=options is None), _default(option))
            )
        name = "".join(word.capitalize() for word in re.findall(r"\w+", self.prog))
        parts = [
            (f"section{i}", Annotated[make_dataclass(f"{name}{i}", found, kw_only=True), tyro.conf.arg(name=title)])
            for i, (title, found) in enumerate(sections.items())
        ]
        return make_dataclass(name, parts)

    def _annotated(self, option: Option, *, shown: bool) -> Any:
        kind = option.type if option.convert is None else str | None
        markers = [tyro.conf.Positional] if option.positional else []
        if shown and option.is_flag and option.default is False:
            markers.append(tyro.conf.FlagCreatePairsOff)  # the help has --x or --no-x, whichever changes something
        argument: Any = tyro.conf.arg(
            name=self._flag(option).lstrip("-"),
            help=option.help.replace("\n", " ") or None,
            help_behavior_hint=None if option.default is MISSING else _hint(option),
            metavar=_metavar(option),
            aliases=[f"-{option.name}"] if len(option.name) == 1 else [self._flag(option, a) for a in option.aliases],
        )
        return Annotated[kind, argument, *markers]

    def _flag(self, option: Option, name: str = "") -> str:
        name = name or option.name
        return f"--{name if self.underscores else name.replace('_', '-')}"

    def _read(self, options: Sequence[Option], args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        told = io.StringIO()
        with _columns(10_000), redirect_stderr(told), redirect_stdout(told):
            try:
                parsed, unknown = self._cli(self.root(options), args)
            except SystemExit:
                pass
            else:
                found = {key: value for section in vars(parsed).values() for key, value in vars(section).items()}
                return {option.name: found[_identifier(option.name)] for option in options}, unknown
        raise self._refused(f"{_mistake(told.getvalue())}; ")

    def _cli(self, root: type, args: Sequence[str]) -> Any:
        return tyro.cli(
            root,
            prog=self.prog,
            description="",
            args=args,
            return_unknown_args=True,
            use_underscores=self.underscores,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )


@contextmanager
def _columns(width: int) -> Generator[None]:
    """A terminal of this width, for what asks for it."""
    before = {name: value for name, value in os.environ.items() if name == "COLUMNS"}
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        os.environ.update(before)


def _identifier(name: str) -> str:
    return name.replace(".", "__")


def _default(option: Option) -> Any:
    default = None if option.convert is not None else option.default
    return field() if option.default is MISSING else field(default_factory=lambda: default)


def _hint(option: Option) -> str:
    """What stands after an option's help: its default as it would be typed."""
    if option.hint is not None:
        return option.hint
    says_nothing = option.default is False or option.default in (None, "", (), [], (None,), {})
    return "" if says_nothing else f"(default: {typed(option.default)})"


def typed(value: Any) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _metavar(option: Option) -> str | None:
    """What stands for a value in the help; None leaves it to tyro."""
    if option.positional:
        return option.name.upper() if option.default is MISSING else f"[{option.name.upper()}]"
    return option.metavar or METAVARS.get(option.name) or _type_name(option.type)


def _type_name(hint: Any) -> str | None:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if get_origin(hint) is Literal:
        return None
    if get_origin(hint) in (tuple, list):
        return f"{_type_name(kinds[0])} ..."
    names = [SCALARS.get(kind) or "|".join(map(str, get_args(kind) or ("true", "false"))) for kind in kinds]
    return None if hint is bool else "|".join(names)


def _wrapped(text: str, width: int) -> str:
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))


def _unboxed(told: str) -> str:
    """Tyro's sections without a terminal: a title over a rule, and what follows; here "title:" and what follows."""
    return re.sub(r" *$", "", re.sub(r"^ (\S.*?) *\n -+ *$", r"\1:", told, flags=re.MULTILINE), flags=re.MULTILINE)


def _mistake(told: str) -> str:
    """What tyro says of a mistake, in one line."""
    title, *body = _unboxed(told).splitlines()
    ends = (i for i, line in enumerate(body) if not line.strip() or line.strip().startswith(("---", "Got errors")))
    body = body[: next(ends, len(body))]
    if title == "Required options:":
        return f"{', '.join(line.strip() for line in body if re.match(r' {6}[^ ]', line))} is missing"
    return re.sub(r"^Error parsing |\.$|\{None\}\||section\d+\.", "", " ".join(" ".join(body).split()))


def respelt(argv: Sequence[str], options: Sequence[Option], *, underscores: bool) -> tuple[list[str], frozenset[str]]:
    """Arguments in today's spelling, and the names of the options among them. A line on stderr names what is spelt otherwise,
    except where options have SAELens's underscores.
    """
    by_name = {name: option for option in options for name in (option.name, *option.aliases)}
    by_name |= {old: by_name[new] for old, new in RENAMED.items() if old not in by_name and new in by_name}
    rest, first, args, given = list(argv), list[str](), list[str](), set[str]()
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            args += [arg, *rest]
            break
        flag, equals, value = arg.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        option, negative = by_name.get(name), False
        if option is None:
            for prefix in ("no_", "no"):
                found = by_name.get(name.removeprefix(prefix))
                if name.startswith(prefix) and found is not None and found.is_bool:
                    option, negative = found, True
                    break
        short = option is not None and arg == f"-{option.name}"
        if option is None or not (flag.startswith("--") or short):
            args.append(arg)
            continue
        given.add(option.name)
        values = [value] if equals else []
        takes_next = rest and (rest[0].lower() in ("true", "false") if option.is_bool else not rest[0].startswith("--"))
        if takes_next and not equals:
            values = [rest.pop(0)]
        if option.positional:
            first += values
            continue
        before = f"{flag} {values[0]}" if option.is_flag and values else flag
        if option.is_bool and values:
            negative ^= values[0].lower() == "false"
        spelt = option.name if underscores else option.name.replace("_", "-")
        new = f"--{'no_' if underscores else 'no-'}{spelt}" if negative else f"--{spelt}"
        if not underscores and before != new and not short:
            print(f"sae-nfm: {before} is now {new}; the old spelling works until version 0.3", file=sys.stderr)
        if option.is_flag:
            args.append(new)
        elif option.is_bool:
            args += [f"--{spelt}", str(not negative)]
        elif equals:
            args.append(f"{new}={_as_python(value, option)}")
        elif underscores and not values and type(None) in get_args(option.type):
            args += [new, "None"]  # as SAELens's own command line has it
        else:
            args += [new, *(_as_python(text, option) for text in values)]
    return [*first, *args], frozenset(given)


def _as_python(text: str, option: Option) -> str:
    """Words as Python writes them: none is None, true is True."""
    kinds = get_args(option.type)
    if option.convert is None and text.lower() == "none" and type(None) in kinds:
        return "None"
    return text.capitalize() if text.lower() in ("true", "false") and bool in kinds else text
