"""The published statistics row by row, each with the same one on an SAE at hand and under a control.

Behaviour comes from the rows of a measurement (`token_table`) whose arms `run` names, norms and paths from `figure_rows`. A
published statistic has one row for each control that it needs.

Sequential training, an NFM on the residual of a frozen SAE: the base is the comparison's "topk" SAE. On the same tokens in the
same order, with the joint arm's NFM and learning rate, two are trained at once (`train_arms`: interrupted, they go on; finished,
they are taken as they are):

    sequential                      linear and interaction path
    sequential without nonlinear    linear path alone: is it interaction?

The 2x2 experiment: a secondary SAE is trained on the hidden code of the joint NFM-SAE, at the share of active features of the
paper, and one clamp of `sae-nfm factorial` is made with its selected feature and with the controls of that one: the statistic of
the author beside a test that holds. Everything else (pairs, primary features, more clamps) is in that command.

Source: arXiv 2507.00269 (2x2 experiment on formality x emotion, with an SAE of OpenLLaMA-3B); the controls are this package's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor

from sae_nfm import demo
from sae_nfm.analysis import FigureRow, gains_of_arms, linear_part
from sae_nfm.architectures import SequentialNFMTrainingSAEConfig, check_primary, primary_digest
from sae_nfm.common import final_path
from sae_nfm.comparison import ablations
from sae_nfm.comparison.results import Answer, ArmName, ClaimKind, Paths
from sae_nfm.data import TokenRows
from sae_nfm.evaluation import error_ratios, read_rows
from sae_nfm.experiments.factorial import PRIMARY_SCALE, FactorialConfig, factorial, load_stimuli
from sae_nfm.experiments.factorial.results import ArmResult, FactorialResult, p_text
from sae_nfm.experiments.reproduce import results as published
from sae_nfm.experiments.reproduce.results import NoVerdict, ReproducedRow, Section, Unit, of_part, reproduced_row
from sae_nfm.experiments.secondary import activations_of, default_k, secondary_config
from sae_nfm.interventions import (
    EQUAL_DISTANCE,
    UNDER_TEST,
    Activations,
    Intervention,
    Splice,
    control_arms,
    path_means,
)
from sae_nfm.interventions.results import ArmRole, Role
from sae_nfm.kernels import SparseActs, sparse_acts_from_dense
from sae_nfm.models import LanguageModel, keeping, reconstruction
from sae_nfm.stats import Bootstrap, Estimate, ratio_of_means, relative_change
from sae_nfm.training import StreamConfig, Trained, TrainingArm, train_arms

_sequential = partial(reproduced_row, Section.SEQUENTIAL)
_factorial = partial(reproduced_row, Section.FACTORIAL)
MEANS_KEPT = "ablated paths write their mean over other text, in place of zero"
PARTS = {str(Paths.LINEAR): "linear", str(Paths.NONLINEAR): "nonlinear", UNDER_TEST: "both"}


def keeping_means(arm: str) -> str:
    """Name of the same arm when its ablated paths write their mean over other text, in place of zero."""
    return f"{arm}, means kept"


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """The rows of a measurement, and the verdicts of a comparison of the same arms."""

    folder: Path
    """A finished measurement."""
    arms: Sequence[str]
    answers: Sequence[Answer]
    """Of a comparison; those of fewer than five seeds say so."""
    bootstrap: Bootstrap
    """For intervals over documents."""

    def rows(self) -> list[ReproducedRow]:
        """Reconstruction, KL, cross-entropy, and errors beside others of their size."""
        ce = Section.CROSS_ENTROPY
        return [
            *self._wholes(Section.RECONSTRUCTION, published.ERROR_WHOLE, "error_energy", "fvu"),
            *self._paths(Section.KL, "KL", "kl_nats"),
            *self._wholes(Section.KL, published.KL_WHOLE, "kl_nats", "kl_nats"),
            self._share_of_gain(),
            *self._paths(ce, "cross-entropy", "ce_nats"),
            *self._wholes(ce, published.CE_WHOLE, "ce_nats", None),
            *self._errors(),
        ]

    def change(self, column: str, arm: str, against: str) -> Estimate | None:
        """Relative change of a column's mean from one arm to another, over documents; None where there is no such arm."""
        if against not in self.arms:
            return None
        mine, other = (read_rows(self.folder, ["document", column], [name]).dropna() for name in (arm, against))
        a, b, documents = mine[column].to_numpy(), other[column].to_numpy(), mine["document"].to_numpy()
        return relative_change(a, b, documents, bootstrap=self.bootstrap)

    def _wholes(self, section: Section, name: str, column: str, metric: str | None) -> Iterator[ReproducedRow]:
        """All paths against other things than the direct path alone."""
        controls: dict[str, str] = {
            Paths.CANONICAL: "against the direct path in the canonical gauge, which holds all that is linear",
            ArmName.MATCHED: "against a TopK SAE with as many parameters, trained on its own",
            ArmName.TOPK: "against a TopK SAE of the same width, trained on its own",
        }
        for against, control in controls.items():
            here, controlled = (self.change(column, UNDER_TEST, other) for other in (Paths.DIRECT, against))
            told = control if against in self.arms else f"{control}: there is none here"
            yield reproduced_row(section, name, here, controlled, told, verdict=self._verdict(against, metric))

    def _paths(self, section: Section, what: str, column: str) -> Iterator[ReproducedRow]:
        for arm, part in PARTS.items():
            kept = arm if arm == UNDER_TEST else keeping_means(arm)
            here, controlled = (
                self.change(column, arm, Paths.DIRECT),
                self.change(column, kept, keeping_means(Paths.DIRECT)),
            )
            yield reproduced_row(section, of_part(what, part), here, controlled, MEANS_KEPT)

    def _share_of_gain(self) -> ReproducedRow:
        """The published 16.5 % is 8.6 / 51.9."""
        roles = {"direct": str(Paths.DIRECT), "linear": str(Paths.LINEAR), "nonlinear": str(Paths.NONLINEAR)}

        def share(alone: dict[str, str]) -> Estimate:
            arms = {**alone, "both": UNDER_TEST}
            columns = ["document", "row", "position", "arm", "kl_nats"]
            gains = gains_of_arms(read_rows(self.folder, columns, list(arms.values())), arms)
            assert gains.documents is not None
            return ratio_of_means(gains.nonlinear, gains.both, gains.documents, bootstrap=self.bootstrap)

        return reproduced_row(
            Section.KL,
            published.SHARE_OF_GAIN,
            share(roles),
            share({role: keeping_means(arm) for role, arm in roles.items()}),
            "means kept; the verdict is on an SAE trained without the path",
            verdict=self._verdict(ArmName.WITHOUT_NONLINEAR, "kl_nats"),
        )

    def _errors(self) -> Iterator[ReproducedRow]:
        ratios = error_ratios(self.folder, controls=EQUAL_DISTANCE, bootstrap=self.bootstrap)
        for name in EQUAL_DISTANCE[1:]:
            here, control = ratios[EQUAL_DISTANCE[0]], f"at the same distance: {name}"
            yield reproduced_row(Section.ERRORS, published.ERROR_RATIO, here, ratios[name], control)

    def _verdict(self, against: str, metric: str | None) -> str:
        wanted = (ClaimKind.FAIR, ArmName.JOINT, against, metric)
        for answer in self.answers:
            claim = answer.claim
            if (claim.kind, claim.arm, claim.against, answer.verdict.measure) == wanted:
                return answer.verdict.words
        return NoVerdict.ONE_SEED


def gauge_rows(figures: Sequence[FigureRow]) -> list[ReproducedRow]:
    """Norms and paths; statistics that the paper does not have are here too, since its others need them."""
    return [
        reproduced_row(
            Section.PATHS if Estimate in (type(figure.published), type(figure.controlled)) else Section.NORMS,
            figure.name,
            figure.published,
            figure.controlled,
            figure.control,
            **{name: getattr(figure, name) for name in ("statistic", "path", "p_value")},
        )
        for figure in figures
    ]


BASE, SEQUENTIAL, ADAPTER = "topk", "sequential", "sequential without nonlinear"
AT_EQUAL_DISTANCE = ("isotropic", "covariance", "covariance mixture")
"""Errors of the same size that the sequential one is compared with; the first is the published one."""
CUT = "the paper's SAE alone was cut to its top 250 features, this one is whole"
CHUNK = 4_096
"""Tokens at a time where features are dense."""
FEWEST_DOCUMENTS = 6
"""With fewer, the part of the documents on which a linear fit is scored would be one, over which there is no interval."""


def train_sequential(
    folder: Path, model: HookedSAETransformer, dataset: Any, output: Path, device: str
) -> dict[str, SAE[Any]]:
    """Train both on the base of one seed of a comparison, where they are not finished, and load them.

    The folder is the comparison's, of one k and seed; the dataset is in the order of the seed.

    Raises:
        ValueError: when there are others in `output`, trained otherwise.
    """
    base, joint = (Trained.load(folder / name).settings for name in (BASE, ArmName.JOINT))
    stream = _stream(base)
    nfm: dict[str, Any] = {name: joint[name] for name in ("nfm_dim", "nfm_top_k", "nfm_dropout")}
    nfm |= {"base": str(final_path(folder / BASE).resolve()), "device": device}
    saes = {
        SEQUENTIAL: SequentialNFMTrainingSAEConfig(**nfm),
        ADAPTER: SequentialNFMTrainingSAEConfig(**nfm, head="none"),
    }
    arms = {name: TrainingArm(name=name, family=name, sae=sae) for name, sae in saes.items()}
    rates = {name: float(joint["learning_rate"]) for name in arms}
    train_arms(stream, arms, rates, model, dataset, output)
    return {name: SAE.load_from_disk(output / name, device=device).eval() for name in arms}


def _stream(settings: Mapping[str, Any]) -> StreamConfig:
    return StreamConfig(**{f.name: settings[f.name] for f in fields(StreamConfig) if f.name in settings})


def sequential_arms(
    model: LanguageModel, saes: Mapping[str, SAE[Any]], fitted: TokenRows, activations: Activations
) -> dict[str, Intervention]:
    """What is measured of them: whole, paths ablated by zero and by mean, random vectors at equal distance.

    Means, and the mean and covariance of the activations, are on text that is not evaluated on.
    """
    whole = Splice(sae=saes[SEQUENTIAL])
    random = control_arms(whole, activations, scales=(), of=SEQUENTIAL)
    arms: dict[str, Intervention] = {SEQUENTIAL: random[UNDER_TEST], ADAPTER: Splice(sae=saes[ADAPTER])}
    arms |= parts_of(model, whole.sae, SEQUENTIAL, fitted, lambda paths: paths.of(SEQUENTIAL))
    return arms | {f"{SEQUENTIAL}: {name}": random[name] for name in AT_EQUAL_DISTANCE}


def part(sae: SAE[Any], of: str, name: str, ablated: Mapping[str, Tensor | None]) -> Splice:
    """An SAE with some of its paths ablated, and its role as a part of the SAE of that name."""
    return Splice(sae=sae, ablated=ablated, role=ArmRole(role=Role.PART, of=of, name=str(name)))


def parts_of(
    model: LanguageModel, sae: SAE[Any], of: str, fitted: TokenRows, named: Callable[[Paths], str] = str
) -> dict[str, Intervention]:
    """An SAE with every combination of its paths ablated, by zero and by their mean over other text."""
    arms, off = dict[str, Intervention](), ablations(sae)
    means = path_means(model, sae, fitted.tokens, off[Paths.DIRECT])
    for paths, hooks in off.items():
        arms[named(paths)] = part(sae, of, paths, dict.fromkeys(hooks))
        kept = {hook: means[hook] for hook in hooks}
        arms[keeping_means(named(paths))] = part(sae, of, keeping_means(paths), kept)
    return arms


@dataclass(frozen=True, kw_only=True)
class WrittenShares:
    """Parts of the two paths in what an NFM writes, with intervals over documents."""

    magnitude: Estimate
    """Linear path: its mean absolute value over the sum of both, the published measure."""
    energy: Estimate
    """Linear path: its energy about the mean over the sum of both."""
    nonlinear_magnitude: Estimate
    nonlinear_energy: Estimate
    nonlinear_residual: Estimate
    """What of the interaction path is not linear in the features (held-out regression), over the energies of both."""


@torch.no_grad()
def written_shares(
    sae: SAE[Any], x: Float[Tensor, "tokens d_in"], documents: Int[Tensor, " tokens"], *, seed: int
) -> WrittenShares:
    """Shares of a sequential SAE on activations, as `functional.read_activations` returns them.

    Raises:
        ValueError: for fewer than FEWEST_DOCUMENTS.
    """
    acts, linear, nonlinear = _written(sae, x)
    labels, bootstrap = documents.cpu().numpy(), Bootstrap(seed=seed)

    def share(one: Tensor, other: Tensor) -> Estimate:
        return ratio_of_means(one.cpu().numpy(), (one + other).cpu().numpy(), labels, bootstrap=bootstrap)

    sizes = [path.abs().double().mean(-1) for path in (linear, nonlinear)]
    energies = [(path - path.mean(0)).double().square().sum(-1) for path in (linear, nonlinear)]
    part = linear_part(acts, nonlinear, sae.cfg.d_sae, seed=seed, documents=documents)
    test = part.test_tokens.numpy()
    both = (energies[0] + energies[1]).cpu().numpy()[test]
    return WrittenShares(
        magnitude=share(sizes[0], sizes[1]),
        energy=share(energies[0], energies[1]),
        nonlinear_magnitude=share(sizes[1], sizes[0]),
        nonlinear_energy=share(energies[1], energies[0]),
        nonlinear_residual=ratio_of_means(part.squared_error.numpy(), both, labels[test], bootstrap=bootstrap),
    )


def _written(sae: SAE[Any], x: Float[Tensor, "tokens d_in"]) -> tuple[SparseActs, Tensor, Tensor]:
    """Features, and what the linear and the interaction path write, [tokens, d_in]."""
    parts: list[tuple[SparseActs, Tensor, Tensor]] = []
    k = int(sae.cfg.base_config["k"])
    for chunk in x.split(CHUNK):
        seen: dict[str, Tensor] = {}
        at = ("hook_sae_acts_post", "hook_nfm_linear", "hook_nfm_interaction")
        reconstruction(sae, chunk, {name: keeping(seen, name) for name in at})
        acts = sparse_acts_from_dense(seen[at[0]].to_dense(), k)
        assert acts is not None, "a TopK base gave a negative feature, or more than k"
        parts.append((acts, seen[at[1]].float(), seen[at[2]].float()))
    acts, linear, nonlinear = zip(*parts, strict=True)
    joined = SparseActs(torch.cat([one.indices for one in acts]), torch.cat([one.values for one in acts]))
    return joined, torch.cat(linear), torch.cat(nonlinear)


def sequential_rows(behaviour: Behaviour, shares: WrittenShares) -> list[ReproducedRow]:
    """Every published statistic of sequential training, once for each control."""
    linear, nonlinear, of_both = published.SEQUENTIAL_LINEAR, published.SEQUENTIAL_NONLINEAR, "energy about the mean"
    residual = f"{of_both}, less what is linear in f (held out)"
    return [
        *_against_base(behaviour, published.SEQUENTIAL_ERROR, "error_energy"),
        *_against_base(behaviour, published.SEQUENTIAL_KL, "kl_nats"),
        *_parts(behaviour, published.SEQUENTIAL_KL),
        _sequential(linear, shares.magnitude, shares.energy, of_both),
        _sequential(nonlinear, shares.nonlinear_magnitude, shares.nonlinear_energy, of_both),
        _sequential(nonlinear, shares.nonlinear_magnitude, shares.nonlinear_residual, residual),
        *_sequential_errors(behaviour),
    ]


def rows_without_base(reason: str) -> list[ReproducedRow]:
    """The published statistics, not measured, with the reason."""
    return [_sequential(name, None, None, reason, verdict=NoVerdict.NOT_MEASURED) for name in published.SEQUENTIAL]


def _against_base(behaviour: Behaviour, name: str, column: str) -> Iterator[ReproducedRow]:
    here = behaviour.change(column, SEQUENTIAL, BASE)
    matched = (
        "against a TopK SAE with as many parameters, trained on its own; base and NFM saw the tokens once each, it once"
    )
    matched += "" if ArmName.MATCHED in behaviour.arms else ": there is none here"
    direct = keeping_means(Paths.DIRECT.of(SEQUENTIAL))
    controls: dict[str, tuple[str, str]] = {
        matched: (SEQUENTIAL, ArmName.MATCHED),
        f"against the SAE and the mean of what its NFM writes; {CUT}": (SEQUENTIAL, direct),
        "an NFM of a linear path alone, trained likewise, against the SAE alone": (ADAPTER, BASE),
        "against that linear NFM: what the interaction path is worth": (SEQUENTIAL, ADAPTER),
    }
    for control, (arm, against) in controls.items():
        yield _sequential(name, here, behaviour.change(column, arm, against), control)


def _parts(behaviour: Behaviour, name: str) -> Iterator[ReproducedRow]:
    """Either path by itself, of which the paper says nothing for sequential training."""
    alone = Paths.DIRECT.of(SEQUENTIAL)
    for paths, word in ((Paths.LINEAR, "linear"), (Paths.NONLINEAR, "nonlinear")):
        arm = paths.of(SEQUENTIAL)
        here = behaviour.change("kl_nats", arm, alone)
        kept = behaviour.change("kl_nats", keeping_means(arm), keeping_means(alone))
        yield _sequential(f"{name}, {word}", here, kept, MEANS_KEPT, unit=Unit.CHANGE)


def _sequential_errors(behaviour: Behaviour) -> Iterator[ReproducedRow]:
    arms = [f"{SEQUENTIAL}: {name}" for name in AT_EQUAL_DISTANCE]
    ratios = error_ratios(behaviour.folder, SEQUENTIAL, arms, bootstrap=behaviour.bootstrap)
    for arm, control in zip(arms[1:], AT_EQUAL_DISTANCE[1:], strict=True):
        yield _sequential(published.SEQUENTIAL_RATIO, ratios[arms[0]], ratios[arm], f"at the same distance: {control}")


TOKENS, BATCH = 100_000, 512
"""Of the secondary SAE's training."""
EXPANSION = 25
"""Secondary features for each dimension of the hidden code: the paper's 7,500 of 300."""
CLAMP = 4.0
"""In units of the feature's mean activation where it is active."""
DRAWS = 199
"""Draws of each null distribution, at most."""
SECONDARY = "secondary"
"""The arm's folder, and the kind of feature."""


def factorial_rows(
    model: HookedSAETransformer,
    joint: SAE[Any],
    dataset: Any,
    settings: Mapping[str, Any],
    output: Path,
    *,
    sentences: int,
    n_permutations: int,
) -> list[ReproducedRow]:
    """Train the secondary SAE where it is not there, do the experiment, keep its result in `output/results.json`.

    The embedded model is asked about sentiment x register, which it knows, others as published.

    Args:
        settings: `Trained.settings` of the joint one; the secondary SAE has its stream, cut to `TOKENS`, and its learning rate.
        sentences: of each cell, at most; 0 for no experiment.
        n_permutations: draws of each null, up to `DRAWS`.
    """
    if sentences == 0:
        return _not_measured("left out: sentences is 0")
    stream = _stream(settings)
    whole = load_stimuli("sentiment-register" if stream.model_name == demo.MODEL_NAME else "formality-emotion")
    stimuli = replace(whole, cells=tuple(replace(cell, sentences=cell.sentences[:sentences]) for cell in whole.cells))
    secondary = _trained(model, joint, dataset, stream, settings["learning_rate"], output)
    names: Any = {
        "sae": str(ArmName.JOINT),
        "model": stream.model_name,
        "stimuli": whole.name,
        "output": str(final_path(output)),
    }
    cfg = FactorialConfig(
        **names,
        secondary=str(final_path(output / SECONDARY)),
        clamps=(CLAMP,),
        absolute=(),
        min_stimuli=min(FactorialConfig.min_stimuli, sentences),
        n_permutations=min(DRAWS, n_permutations),
        seed=stream.seed,
    )
    try:
        result, _ = factorial(model, joint, stimuli, cfg, secondary=secondary)
    except ValueError as error:  # stimuli that the tokenizer cannot take, or features that none of them activates
        return _not_measured(str(error))
    result.save(output / "results.json")
    return list(_rows(result))


def _not_measured(reason: str) -> list[ReproducedRow]:
    return [_factorial(name, None, None, reason, verdict=NoVerdict.NOT_MEASURED) for name in published.FACTORIAL]


def _trained(
    model: HookedSAETransformer, joint: SAE[Any], dataset: Any, stream: StreamConfig, learning_rate: float, output: Path
) -> SAE[Any]:
    nfm_dim = check_primary(joint).cfg.nfm_dim
    sae = secondary_config(max(default_k(nfm_dim)), nfm_dim, EXPANSION, stream.device, primary_digest(joint))
    arms = {SECONDARY: TrainingArm(name=SECONDARY, family=SECONDARY, sae=sae)}
    with activations_of(model, joint, "hidden code", stream.seed) as hook_name:
        tokens = min(TOKENS, stream.training_tokens)
        at = replace(stream, hook_name=hook_name, training_tokens=tokens, batch_size=min(BATCH, stream.batch_size))
        train_arms(at, arms, {SECONDARY: learning_rate}, model, dataset, output)
    return SAE.load_from_disk(output / SECONDARY, device=stream.device).eval()


def _rows(result: FactorialResult) -> Iterator[ReproducedRow]:
    stage = {arm.role: arm for arm in result.arms if arm.units[0].kind == SECONDARY}
    (selected,) = (one for one in result.selected if one.unit.kind == SECONDARY)
    (clamped,) = (arm for arm in stage.values() if not arm.control)
    yield from _of_arm(published.CLAMPED, clamped, result)
    yield _factorial(
        published.CLAMPED,
        clamped.tests.published_f,
        selected.test.held_out.f,
        f"its own activation, selected on {result.items[0]} stimuli, F on the other {result.items[1]}; p = "
        f"{p_text(selected.null.p_value)} against select and test on shuffled cells",
    )
    for arm in stage.values():
        if arm.control:
            yield from _of_arm(published.CONTROL, arm, result)


def _of_arm(name: str, arm: ArmResult, result: FactorialResult) -> Iterator[ReproducedRow]:
    """The author's statistic beside tests with other units."""
    tests, main = arm.tests, arm.tests.items[PRIMARY_SCALE]
    clamp = f"{result.design}; {arm.role}, {arm.units[0].name} at {arm.clamp}, author's p = {p_text(tests.published_p)}"
    of_stimuli = f"{clamp}: interaction F, stimuli as units, p = {p_text(main.p_value)}"
    yield _factorial(name, tests.published_f, main.f, of_stimuli)
    if not arm.control:
        of_words = f"the same, words as units, averaged over stimuli, p = {p_text(tests.words.p_value)}"
        yield _factorial(name, tests.published_f, tests.words.f, of_words)
