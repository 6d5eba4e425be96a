"""The job of `sae-nfm reproduce`: the figures of arXiv 2507.00269, each beside the same statistic here and under its control.

    comparison (one seed, unless a finished one is given) -> joint_nfm and the TopK SAEs beside it
    rows of KL, cross-entropy and error: all of them, paths ablated, controls at equal distance (`behaviour.measure`)
    norms and paths (`gauge_report`)
    -> table

In the output folder: `compare/` where there was none, `rows/`, results.json. What is finished is not done again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_nfm import data, demo
from sae_nfm.baselines import JOINT
from sae_nfm.behaviour import measure
from sae_nfm.benchmark import ablations, in_canonical_gauge
from sae_nfm.claims import CANONICAL, DIRECT
from sae_nfm.compare import run_compare
from sae_nfm.compare_config import CompareConfig
from sae_nfm.compare_results import CompareResult
from sae_nfm.controls import control_arms, fit_activations
from sae_nfm.documents import TokenRows, held_out_rows
from sae_nfm.figure_rows import Figure, figure_rows
from sae_nfm.functional import read_activations
from sae_nfm.gauge_report import gauge_report
from sae_nfm.hooks import Intervention, Splice, path_means
from sae_nfm.models import LanguageModel, load_model
from sae_nfm.reproduced_rows import KEPT, Behaviour, ReproducedRow, gauge_rows, not_measured
from sae_nfm.resampling import Bootstrap
from sae_nfm.statistics import Estimate
from sae_nfm.whole_files import write_json

BESIDE = ("topk matched", "topk", "topk matched folded", "joint_nfm without nonlinear")
"""Arms that the joint one is compared with."""
SHARED = (
    "model_name",
    "hook_name",
    "dataset",
    "validation",
    "d_sae",
    "nfm_dim",
    "context_size",
    "training_tokens",
    "validation_tokens",
)
"""Settings that are the comparison's too."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """What to measure, and where the results go."""

    compare: str | None = None
    """Folder of a finished `sae-nfm compare`, whose SAEs and verdicts are taken, with its model, hook point and data; without
    one, the arms needed are trained for one seed."""
    model_name: str = demo.MODEL_NAME
    """A TransformerLens model name or a local Hugging Face folder; the default is the embedded model."""
    hook_name: str = "blocks.2.hook_resid_post"
    """The TransformerLens hook point whose activations are reconstructed."""
    dataset: str | None = None
    """Training text: a parquet, jsonl or txt file, or a hub name; None takes tokens sampled from the embedded model."""
    validation: str | None = None
    """Held-out text, likewise; None takes a hub data set's validation split, or the embedded tokens."""
    k: int = 32
    """Active features per token."""
    d_sae: int = 2_048
    """Features."""
    nfm_dim: int = 64
    """Interaction dimensions."""
    training_tokens: int = 400_000
    """Activations that each arm is trained on."""
    validation_tokens: int = 40_000
    """Held-out tokens that figures are taken on, at most."""
    fit_tokens: int = 20_000
    """Held-out tokens, after those, for means and covariances."""
    lr: float = 5e-3
    """Adam's learning rate, the same for every arm."""
    context_size: int = 256
    """Tokens per row, BOS included; at most the model's context."""
    seed: int = 0
    """Seed of initialisation, data order, random vectors and permutations; one of a finished comparison's."""
    n_permutations: int = 1_999
    """Draws of each null distribution."""
    device: str = "cpu"
    """Device of the language model and the SAEs."""
    output: str = "runs/reproduce"
    """Folder for everything."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("validation_tokens", "fit_tokens", "n_permutations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive whole number")
        self.comparison()  # refuses the others

    def comparison(self) -> CompareConfig:
        """The comparison that trains the arms."""
        same: dict[str, Any] = {name: getattr(self, name) for name in (*SHARED, "device")}
        return CompareConfig(
            **same,
            k=(self.k,),
            arms=(JOINT, *BESIDE),
            seeds=(self.seed,),
            learning_rates=(self.lr,),
            output=str(Path(self.output) / "compare"),
        )


@dataclass(frozen=True, kw_only=True)
class ReproduceResult:
    """The table, and what is needed to repeat it."""

    rows: tuple[ReproducedRow, ...]
    """Every published figure, once for each control."""
    provenance: dict[str, Any]
    """Configuration, and the provenance of the comparison."""

    def save(self, path: str | Path) -> None:
        """Write as JSON, under a temporary name first."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "ReproduceResult":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            rows = [
                ReproducedRow(**(row | {name: _figure(row[name]) for name in ("here", "controlled")}))
                for row in content["rows"]
            ]
            return cls(rows=tuple(rows), provenance=content["provenance"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a reproduction ({error}); write one with `sae-nfm reproduce`") from error

    def words(self) -> str:
        """Section by section; figures that the paper does not have are in the file only."""
        lines: list[str] = []
        shown = [row for row in self.rows if row.published != "-"]
        for section in dict.fromkeys(row.section for row in shown):
            lines += [section, "-" * len(section)]
            own = [row for row in shown if row.section == section]
            for name in dict.fromkeys(row.name for row in own):
                same = [row for row in own if row.name == name]
                lines.append(f"{name}: published {same[0].published}; here {written(same[0].here, same[0].form)}")
                lines += [f"    {written(row.controlled, row.form)}  {row.control} ({row.verdict})" for row in same]
            lines.append("")
        return "\n".join([*lines, *(f"* {caveat}" for caveat in self._caveats())])

    def _caveats(self) -> list[str]:
        config = self.provenance["comparison"]["config"]
        told = [
            "Intervals are 95 %, over documents: they say nothing about other seeds. Verdicts are over seeds and documents.",
            f"One SAE of {config['d_sae']:,} features and {config['training_tokens']:,} training tokens; the paper's has "
            "50,000 and 5M, on OpenLLaMA-3B, and reads the strongest half of its features where this one reads all.",
        ]
        if config["dataset"] is None:
            told.append("The tokens were sampled from the embedded model itself: no evidence about real text.")
        return told


def _figure(content: Any) -> Figure:
    return Estimate(**content) if isinstance(content, dict) else content


def written(figure: Figure, form: str) -> str:
    """A figure with its interval, where it has one."""
    if figure is None:
        return "none"
    if not isinstance(figure, Estimate):
        return f"{figure:{form}}"
    return f"{figure.estimate:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def run_reproduce(cfg: ReproduceConfig, *, command: str | None = None) -> ReproduceResult:
    """Train or read the SAEs, measure, and write `results.json` to `cfg.output`.

    Args:
        cfg: what to do.
        command: how to repeat it, for the provenance.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, for a folder that is no
            finished comparison or has no such seed or arm.
    """
    output = Path(cfg.output)
    comparison = run_compare(cfg.comparison()) if cfg.compare is None else CompareResult.load(_results(cfg.compare))
    cfg = cfg if cfg.compare is None else _as_compared(cfg, comparison)
    saes = _load_arms(cfg, Path(cfg.compare or output / "compare") / f"k{cfg.k}" / f"seed-{cfg.seed}")
    model = load_model(cfg.model_name, cfg.device)
    _, validation = data.load_splits(cfg.dataset, cfg.validation, cfg.model_name)
    context_size = min(cfg.context_size, model.cfg.n_ctx)
    rows = held_out_rows(model, validation, context_size, cfg.validation_tokens)
    fitted = held_out_rows(model, validation, context_size, cfg.fit_tokens, skip_tokens=rows.tokens.numel())
    arms = behaviour_arms(model, saes, fitted)
    folder = measure(model, rows, arms, output / "rows", seed=cfg.seed)
    behaviour = Behaviour(
        folder=folder, arms=tuple(arms), answers=comparison.answers, bootstrap=Bootstrap(seed=cfg.seed)
    )
    x, documents = read_activations(model, saes[JOINT], rows.tokens, rows.documents)
    assert documents is not None
    report = gauge_report(saes[JOINT], x, documents, seed=cfg.seed, n_permutations=cfg.n_permutations)
    result = ReproduceResult(
        rows=(
            *behaviour.rows(),
            *gauge_rows(figure_rows(report)),
            *not_measured(),
        ),
        provenance={"config": asdict(cfg), "command": command, "comparison": comparison.provenance},
    )
    result.save(output / "results.json")
    return result


def behaviour_arms(model: LanguageModel, saes: dict[str, SAE[Any]], fitted: TokenRows) -> dict[str, Intervention]:
    """What is measured of a joint NFM-SAE and the SAEs beside it: paths ablated by zero and by mean, controls, the others.

    Args:
        model: the language model.
        saes: the joint one, as "joint_nfm", and any others by name.
        fitted: text for means and covariances, not evaluated on.
    """
    joint = saes[JOINT]
    whole = Splice(sae=joint)
    parts = ablations(joint)
    means = path_means(model, joint, fitted.tokens, parts[DIRECT])
    arms = control_arms(whole, fit_activations(model, fitted.tokens, whole.hook_name))
    for name, off in parts.items():
        arms[name] = Splice(sae=joint, ablated=dict.fromkeys(off))
        arms[f"{name}{KEPT}"] = Splice(sae=joint, ablated={hook: means[hook] for hook in off})
    canonical = in_canonical_gauge(joint)
    if canonical is not None:
        arms[CANONICAL] = Splice(sae=canonical, ablated=dict.fromkeys(parts[DIRECT]))
    return arms | {name: Splice(sae=sae) for name, sae in saes.items() if name != JOINT}


def _results(folder: str) -> Path:
    path = Path(folder) / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no results.json; give the folder of a finished `sae-nfm compare`")
    return path


def _as_compared(cfg: ReproduceConfig, comparison: CompareResult) -> ReproduceConfig:
    """The configuration with what a finished comparison was made with.

    Raises:
        ValueError: when it has no such k or seed.
    """
    was = comparison.provenance["config"]
    for name, wanted, there in (("k", cfg.k, was["k"]), ("seed", cfg.seed, was["seeds"])):
        if wanted not in there:
            raise ValueError(
                f"{name} is {wanted}, and the comparison in {cfg.compare!r} has {there}; give one of these"
            )
    return replace(cfg, **{name: was[name] for name in SHARED})


def _load_arms(cfg: ReproduceConfig, folder: Path) -> dict[str, SAE[Any]]:
    if not (folder / JOINT).exists():
        raise ValueError(f"{folder} has no arm {JOINT!r}; compare it with the others first")
    names: Sequence[str] = [name for name in (JOINT, *BESIDE) if (folder / name).exists()]
    return {name: SAE.load_from_disk(folder / name, device=cfg.device).eval() for name in names}
