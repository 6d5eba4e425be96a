"""Options as they are typed: with dashes or underscores, and the spellings of version 0.1, which work for one version."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, get_args

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
    """Its type."""
    default: Any = field(default_factory=lambda: MISSING)
    """MISSING for a required one."""
    help: str = ""
    """What it does."""
    section: str = ""
    """Its section of the help."""
    positional: bool = False
    """Whether it has no flag."""
    hint: str | None = None
    """What the help says of its default, in place of the default."""
    metavar: str | None = None
    """What stands for its value in the help, in place of the type."""
    convert: Callable[[str], Any] | None = None
    """Makes its value of the text that was given, where its type is nothing tyro knows; a ValueError refuses the text."""
    aliases: tuple[str, ...] = ()
    """Other names of it."""
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


def respelt(argv: Sequence[str], options: Sequence[Option], *, underscores: bool) -> tuple[list[str], frozenset[str]]:
    """Arguments in today's spelling, and the names of the options among them. A line on stderr names what is spelt otherwise.

    Args:
        argv: the arguments of a command.
        options: its options.
        underscores: whether their names have underscores (SAELens's); then nothing is warned of.
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
            args.append(f"{new}={_plain(value, option)}")
        elif underscores and not values and type(None) in get_args(option.type):
            args += [new, "None"]  # as SAELens's own command line has it
        else:
            args += [new, *(_plain(text, option) for text in values)]
    return [*first, *args], frozenset(given)


def _plain(text: str, option: Option) -> str:
    """Words as Python writes them: none is None, true is True."""
    kinds = get_args(option.type)
    if option.convert is None and text.lower() == "none" and type(None) in kinds:
        return "None"
    return text.capitalize() if text.lower() in ("true", "false") and bool in kinds else text
