"""A training run as a file: flags of `sae-nfm train`, the model's shape, and the device it is meant for.

    train:    any flags of `sae-nfm train`
    model:    the model's config.json; left out, it is read from the folder `train.model_name`
    device:   name, memory_gib, and optionally rates (`Device`)

The file says nothing that the command line could not: `Experiment.command()` is that command line.
"""

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from sae_nfm.models import is_folder
from sae_nfm.profiling.results import Device
from sae_nfm.training import TrainArguments, train_arguments

CONFIGS = Path(__file__).parent / "configs"
"""Experiments that come with the package; each goes by its name without .yaml, too."""
SECTIONS = ("train", "model", "device")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training run that can be checked before it is made."""

    name: str
    train: dict[str, Any]
    """Flags of `sae-nfm train`."""
    model: dict[str, Any] | None
    """The model's config.json; None reads it from the model's folder."""
    device: Device

    def argv(self) -> list[str]:
        """The arguments of `sae-nfm train`."""
        return [word for flag, value in self.train.items() for word in (f"--{flag}", *_words(value))]

    def command(self) -> str:
        """The command line."""
        return shlex.join(["sae-nfm", "train", *self.argv()])

    def arguments(self) -> TrainArguments:
        """What `sae-nfm train` makes of it, SAELens's runner config included.

        Raises:
            ValueError: for a flag or value that does not work.
        """
        given = {option.replace("-", "_"): value for option, value in self.train.items()}
        return train_arguments(given, argv=self.argv())

    def model_config(self) -> PretrainedConfig:
        """The model's Hugging Face configuration.

        Raises:
            ValueError: where it is neither in the file nor in a local folder.
        """
        if self.model is not None:
            return AutoConfig.for_model(**self.model)
        name = str(self.train.get("model_name"))
        if not is_folder(name):
            raise ValueError(
                f"{name!r} is no local folder; give the model's config.json as `model:` of {self.name}.yaml"
            )
        return AutoConfig.from_pretrained(name, local_files_only=True)


def load_experiment(source: str | Path) -> Experiment:
    """Read an experiment: a .yaml file, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has other keys than it should, or lacks one.
    """
    path = Path(source)
    if path.suffix != ".yaml":
        path = CONFIGS / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no experiment {str(source)!r}; give a .yaml file, or one of {known}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    _check_keys(path, "", content, SECTIONS, needed=("train", "device"))
    known = tuple(field.name for field in fields(Device))
    _check_keys(path, "device.", content["device"], known, needed=("name", "memory_gib"))
    if not isinstance(content["train"], dict) or not isinstance(content.get("model"), dict | None):
        raise ValueError(f"{path}: train and model are lists of `key: value`")
    device = Device(**content["device"])
    return Experiment(name=path.stem, train=content["train"], model=content.get("model"), device=device)


def _check_keys(path: Path, prefix: str, content: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    keys = set(content) if isinstance(content, dict) else set[str]()
    unknown, missing = sorted(map(str, keys - set(known))), sorted(set(needed) - keys)
    if unknown or missing:
        found = [f"has the unknown {prefix}{key}" for key in unknown] + [f"lacks {prefix}{key}" for key in missing]
        raise ValueError(f"{path} {', '.join(found)}; it takes {', '.join(prefix + key for key in known)}")


def _words(value: Any) -> list[str]:
    """A value as it is typed."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value)]
