"""The job of `sae-nfm reproduce`: what arXiv 2507.00269 reports, each beside the same statistic here and under its control.

    comparison (one seed, unless a finished one is given) -> joint_nfm and the TopK SAEs beside it
    an NFM on the residual of the TopK SAE
    rows of KL, cross-entropy and error: all of them, paths ablated, controls at equal distance (`evaluation.measure`)
    norms and paths (`gauge_report`); a 2x2 experiment (`factorial`)
    -> table

In the output folder: `compare/` where there was none, `sequential/`, `2x2/`, `rows/`, results.json. What is finished is not done
again, except for the 2x2 experiment.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE, HookedSAETransformer

from sae_nfm.analysis import figure_rows, gauge_report, read_activations
from sae_nfm.common import check_extension, check_numbers, check_positive, publishing
from sae_nfm.comparison import CompareConfig, SizeOptions, ablations, in_canonical_gauge, run_compare
from sae_nfm.comparison.results import ArmName, CompareResult, Paths
from sae_nfm.comparison.run import Prepared
from sae_nfm.data import TokenRows, datasets, rows_and_others, told_of_text
from sae_nfm.evaluation import measure
from sae_nfm.experiments.factorial import FEWEST_SENTENCES
from sae_nfm.experiments.reproduce import rows as statistics
from sae_nfm.experiments.reproduce.results import ReproducedRow, ReproduceResult
from sae_nfm.interventions import UNDER_TEST, Intervention, Splice, control_arms, fit_activations
from sae_nfm.models import LanguageModel, load_model
from sae_nfm.stats import Bootstrap
from sae_nfm.training import Trained, refuse_several_processes

BESIDE = tuple(map(str, (ArmName.MATCHED, ArmName.TOPK, ArmName.MATCHED_FOLDED, ArmName.WITHOUT_NONLINEAR)))
"""Arms that the joint one is compared with."""
JOINT = str(ArmName.JOINT)
PARTS = ("compare", "sequential", "2x2", "rows")
"""What lies in the output folder beside the results."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(SizeOptions):
    """What to measure, and where the results go."""

    compare: str | None = None
    """Folder of a finished `sae-nfm compare`, whose SAEs and verdicts are taken, with its model, hook point, data and sizes;
    without one, the SAEs needed are trained for one seed."""
    k: int = 32
    """Active features per token."""
    fit_tokens: int = 20_000
    """Held-out tokens for means and covariances, after those that are evaluated on."""
    lr: float = 5e-3
    """Adam's learning rate, the same for every SAE."""
    seed: int = 0
    """Seed of initialisation, data order, random vectors and permutations; one of a finished comparison's."""
    n_permutations: int = 1_999
    """Draws of each null distribution."""
    sentences: int = 20
    """Sentences of each cell of the 2x2 experiment, at most; fewer than 4 cannot be tested, 0 leaves it out."""
    output: str = "runs/reproduce"
    """Folder for everything."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        check_positive(self, "fit_tokens", "n_permutations")
        check_numbers(self)
        if self.sentences and self.sentences < FEWEST_SENTENCES:
            raise ValueError(
                f"sentences must be at least {FEWEST_SENTENCES}, for two halves with a spread, or 0 to leave the 2x2 experiment "
                f"out; got {self.sentences}"
            )
        self.comparison()  # refuses the others

    def comparison(self) -> CompareConfig:
        """The comparison that trains the arms."""
        return CompareConfig(
            **self.sizes(),
            k=(self.k,),
            arms=(JOINT, *BESIDE),
            seeds=(self.seed,),
            learning_rates=(self.lr,),
            output=str(Path(self.output) / "compare"),
        )


def run_reproduce(cfg: ReproduceConfig, *, command: str | None = None) -> ReproduceResult:
    """Train or read the SAEs, measure, and write `results.json` to `cfg.output`.

    Raises:
        ValueError, FileNotFoundError: for a model, hook point, data set or size that does not work, for a folder that is no
            finished comparison or has no such seed or arm.
    """
    refuse_several_processes()
    check_extension(cfg.output, "reproduce", PARTS)
    with publishing(cfg.output, "reproduce", command=command, extend=PARTS) as made:
        result = _reproduce(cfg, made.folder, command)
        result.save(made.folder / "results.json")
    return result


def _reproduce(cfg: ReproduceConfig, output: Path, command: str | None) -> ReproduceResult:
    prepared = comparison = None
    if cfg.compare is None:
        prepared = Prepared.of(cfg.comparison())
    elif (path := Path(cfg.compare) / "results.json").exists():
        comparison = CompareResult.load(path)
        cfg = _as_compared(cfg, comparison)
    else:
        raise FileNotFoundError(f"{cfg.compare} has no results.json; give the folder of a finished `sae-nfm compare`")
    model = prepared.model if prepared else load_model(cfg.model, cfg.device)
    train, validation = datasets.load_splits(cfg.dataset, cfg.held_out, cfg.model)
    context_size = min(cfg.context_size, model.cfg.n_ctx)
    rows, fitted = rows_and_others(model, validation, context_size, cfg.held_out_tokens, cfg.fit_tokens)
    rows.check_documents(statistics.FEWEST_DOCUMENTS)
    if comparison is None:
        comparison = run_compare(cfg.comparison(), prepared=prepared, folder=output / "compare")
    folder = Path(cfg.compare or output / "compare") / f"k{cfg.k}" / f"seed-{cfg.seed}"
    saes = _load_arms(cfg, folder)
    train = train.shuffle(seed=cfg.seed)  # as for the comparison's SAEs of this seed
    if statistics.BASE in saes:
        saes |= statistics.train_sequential(folder, model, train, output / "sequential", cfg.device)
    behaviour = _behaviour(cfg, model, saes, rows, fitted, comparison, output / "rows")
    settings = Trained.load(folder / JOINT).settings
    options = {"sentences": cfg.sentences, "n_permutations": cfg.n_permutations}
    return ReproduceResult(
        rows=(
            *behaviour.rows(),
            *_rows_of_paths(cfg, model, saes, rows, behaviour),
            *statistics.factorial_rows(model, saes[JOINT], train, settings, output / "2x2", **options),
        ),
        provenance={
            "config": asdict(cfg),
            "command": command,
            "comparison": comparison.provenance,
            "text": told_of_text(model, rows.tokens, metadata=saes[JOINT].cfg.metadata, folder=folder / JOINT),
        },
    )


def _behaviour(
    cfg: ReproduceConfig,
    model: HookedSAETransformer,
    saes: dict[str, SAE[Any]],
    rows: TokenRows,
    fitted: TokenRows,
    comparison: CompareResult,
    folder: Path,
) -> statistics.Behaviour:
    """A measurement of every arm on held-out text."""
    arms = behaviour_arms(model, saes, fitted)
    folder = measure(model, rows, arms, folder, seed=cfg.seed)
    bootstrap = Bootstrap(seed=cfg.seed)
    return statistics.Behaviour(folder=folder, arms=tuple(arms), answers=comparison.answers, bootstrap=bootstrap)


def _rows_of_paths(
    cfg: ReproduceConfig,
    model: LanguageModel,
    saes: dict[str, SAE[Any]],
    rows: TokenRows,
    behaviour: statistics.Behaviour,
) -> list[ReproducedRow]:
    """Norms and paths of the joint SAE, and all of the sequential one."""
    x, documents = read_activations(model, saes[JOINT], rows.tokens, rows.documents)
    assert documents is not None
    report = gauge_report(saes[JOINT], x, documents, seed=cfg.seed, n_permutations=cfg.n_permutations)
    found = statistics.gauge_rows(figure_rows(report))
    if statistics.SEQUENTIAL not in saes:
        reason = f"the comparison has no arm {statistics.BASE!r} that an NFM could be trained on"
        return found + statistics.rows_without_base(reason)
    shares = statistics.written_shares(saes[statistics.SEQUENTIAL], x, documents, seed=cfg.seed)
    return found + statistics.sequential_rows(behaviour, shares)


def behaviour_arms(model: LanguageModel, saes: dict[str, SAE[Any]], fitted: TokenRows) -> dict[str, Intervention]:
    """What is measured of a joint NFM-SAE and the SAEs beside it: paths ablated by zero and by mean, controls, the others.

    Those of `train_sequential` get controls of their own. Means and covariances are on text that is not evaluated on.
    """
    joint = saes[JOINT]
    whole = Splice(sae=joint)
    activations = fit_activations(model, fitted.tokens, whole.hook_name)
    arms = control_arms(whole, activations) | statistics.parts_of(model, joint, UNDER_TEST, fitted)
    canonical = in_canonical_gauge(joint)
    if canonical is not None:
        off = dict.fromkeys(ablations(joint)[Paths.DIRECT])
        arms[str(Paths.CANONICAL)] = statistics.part(canonical, UNDER_TEST, Paths.CANONICAL, off)
    if statistics.SEQUENTIAL in saes:
        arms |= statistics.sequential_arms(model, saes, fitted, activations)
    return arms | {name: Splice(sae=sae) for name, sae in saes.items() if name in BESIDE}


def _as_compared(cfg: ReproduceConfig, comparison: CompareResult) -> ReproduceConfig:
    """The configuration with the model, text and sizes of a finished comparison; a ValueError where it has no such k or seed."""
    was = comparison.provenance["config"]
    for name, wanted, there in (("k", cfg.k, was["k"]), ("seed", cfg.seed, was["seeds"])):
        if wanted not in there:
            raise ValueError(
                f"{name} is {wanted}, and the comparison in {cfg.compare!r} has {there}; give one of these"
            )
    return replace(cfg, **{name: was[name] for name in cfg.sizes() if name != "device"})


def _load_arms(cfg: ReproduceConfig, folder: Path) -> dict[str, SAE[Any]]:
    if not (folder / JOINT).exists():
        raise ValueError(f"{folder} has no arm {JOINT!r}; compare it with the others first")
    names: Sequence[str] = [name for name in (JOINT, *BESIDE) if (folder / name).exists()]
    return {name: SAE.load_from_disk(folder / name, device=cfg.device).eval() for name in names}
