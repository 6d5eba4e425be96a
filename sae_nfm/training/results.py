"""What training leaves beside the weights: a record of its steps, curves of it, and what is known of a finished arm."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from typing_extensions import override

from sae_nfm.common import checked
from sae_nfm.common.results import SavedResult, with_kind, without_kind

RUNNER_CFG_FILENAME = "runner_cfg.json"
"""What SAELens calls the config of a run."""
RECORD_KIND = "training/1"
TRAINED_FILENAME, RECORD_FILENAME = "trained.json", "training.jsonl"
LONGEST = 200
"""Points of a curve at most; the first and the last are always among them."""
EXPLAINED, DIRECT = "metrics/explained_variance", "metrics/fvu_direct"
DEAD_WINDOW = "details/dead_feature_window"
DEAD, L0, SHARE = "sparsity/dead_features", "metrics/l0", "metrics/share_"
HELD_OUT_KL = "held_out/model_behavior_preservation/kl_div_with_sae"


@dataclass(frozen=True, kw_only=True)
class Trained(SavedResult):
    """What is known of a finished arm besides its weights; `trained.json` in its folder."""

    kind: ClassVar[str] = "trained/1"

    arm: str
    parameters: int
    """Trainable numbers, counted on the SAE that was trained."""
    tokens_per_second: float
    """Training tokens per second of SAE time, the language model not counted."""
    settings: dict[str, Any]
    """All that the outcome depends on: SAELens's training configuration, the stream's, the learning rate."""

    @override
    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it from its file, or the folder of a finished arm."""
        path = Path(path)
        return super().load(path / TRAINED_FILENAME if path.is_dir() else path)


def record_line(line: Mapping[str, Any]) -> str:
    """A line of a training record: each says its kind, so that a part of a record is one, too."""
    return json.dumps(with_kind(RECORD_KIND, line)) + "\n"


def read_training_record(path: str | Path, *, unfinished: bool = False) -> list[dict[str, Any]]:
    """The lines written by `record_training`; with `unfinished`, a last line that was cut is left out."""
    text = Path(path).read_text(encoding="utf-8") if unfinished else checked(path).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    return [without_kind(RECORD_KIND, json.loads(line)) for line in lines if line.endswith("\n") or not unfinished]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity of one SAE while it was trained."""

    tokens: tuple[int, ...]
    """Training tokens seen, [points]."""
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingCurves:
    """The curves of one SAE, on the batches that it was trained on."""

    sae: str
    unexplained: Curve | None
    """FVU of the whole output."""
    direct: Curve | None
    """FVU of the direct path alone; None where there are no other paths."""
    shares: Mapping[str, Curve]
    """By integration path, its part of the sum of their mean absolute values; empty for an SAE without."""
    dead: Curve | None
    steps: int | None
    """Training steps up to the last line."""
    dead_feature_window: int | None
    """Steps after which a silent feature counts as dead; None where neither the record nor the config beside it says so."""
    l0: Curve | None
    """Active features per token."""
    held_out_kl: Curve | None
    """KL to the original model on held-out text, nats per token; None where it was not recorded."""


def training_curves(path: str | Path) -> tuple[TrainingCurves, ...]:
    """The curves of every SAE of a training record; a ValueError when a line is not JSON."""
    try:
        lines = read_training_record(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a training record ({error}); train again, or remove it") from error
    names, beside = dict.fromkeys(line["sae"] for line in lines), Path(path).with_name(RUNNER_CFG_FILENAME)
    window = None
    if beside.is_file():  # records of 0.1.0 do not say it
        with suppress(ValueError, AttributeError):
            window = json.loads(beside.read_text()).get("dead_feature_window")
    return tuple(_curves(sae, [line for line in lines if line["sae"] == sae], window) for sae in names)


def _curves(sae: str, lines: Sequence[Mapping[str, Any]], dead_feature_window: int | None) -> TrainingCurves:
    unexplained = _curve(lines, EXPLAINED)  # of every SAE, where only joint ones have metrics/fvu_all
    if unexplained is not None:
        unexplained = Curve(tokens=unexplained.tokens, values=tuple(1 - value for value in unexplained.values))
    paths = dict.fromkeys(key for line in lines for key in line if key.startswith(SHARE))
    shares = {key.removeprefix(SHARE): curve for key in paths if (curve := _curve(lines, key)) is not None}
    return TrainingCurves(
        sae=sae,
        unexplained=unexplained,
        direct=_curve(lines, DIRECT),
        shares=shares,
        dead=_curve(lines, DEAD),
        steps=lines[-1]["step"] + 1 if "step" in lines[-1] else None,
        dead_feature_window=lines[-1].get(DEAD_WINDOW, dead_feature_window),
        l0=_curve(lines, L0),
        held_out_kl=_curve(lines, HELD_OUT_KL),
    )


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """The lines that have the key, thinned evenly; None without any."""
    points = [(int(line["tokens"]), float(line[key])) for line in lines if line.get(key) is not None]
    if not points:
        return None
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), LONGEST)).round().astype(int))
    return Curve(tokens=tuple(points[i][0] for i in chosen), values=tuple(points[i][1] for i in chosen))
