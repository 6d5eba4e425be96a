"""The job of `sae-nfm factorial`: a 2x2 experiment on the features of an SAE and on the pairs that they form.

    1. features    activations on the stimuli; primary features selected by main effects, pairs (and secondary features) by the
                   interaction, on one half of the stimuli, tested on the other
    2. clamps      the selected ones clamped at all tokens; what that does to target words after the stimuli of the other half
    3. controls    features matched in activation and frequency, insensitive ones, both primaries through the linear path alone,
                   secondary features under clamped primaries; permutations, sign flips, monotone transforms

In the output folder: results.json, and changes.parquet with the change of every word after every stimulus by arm.

Source: arXiv 2507.00269 (2x2 experiment), with the tests done over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_nfm.architectures import NFMPaths, refuse_transcoder
from sae_nfm.common import check_numbers, check_output, check_positive, provenance, publishing, remark, write_parquet
from sae_nfm.common.options import PACKAGED_SAE, SavedSAEOptions
from sae_nfm.data import told_of_text
from sae_nfm.experiments.factorial import clamps, measure
from sae_nfm.experiments.factorial.results import (
    PRIMARY_SCALE,
    ArmResult,
    FactorialResult,
    SecondaryShift,
    SelectedUnit,
    Unit,
    few_stimuli,
    with_holm,
)
from sae_nfm.experiments.factorial.stimuli import StimulusSet, load_stimuli
from sae_nfm.loading import load_sae
from sae_nfm.models import LanguageModel, check_device, model_of
from sae_nfm.stats import (
    Cells,
    Effect,
    Half,
    by_bucket,
    halves,
    select_and_test,
    shuffled_procedure,
    word_pattern,
)


@dataclass(frozen=True, kw_only=True)
class FactorialConfig(SavedSAEOptions):
    """What to test, and where the results go."""

    sae: str = PACKAGED_SAE
    """Folder of a saved SAE, or a released one as release:sae_id."""
    secondary: str | None = None
    """A secondary SAE on its hidden code, likewise; its features are selected and clamped too."""
    stimuli: str = "sentiment-register"
    """Stimuli: a .yaml file (docs/factorial.md), or one of formality-emotion, sentiment-register."""
    clamps: tuple[float, ...] = (-4.0, 0.0, 1.0, 4.0)
    """Values to clamp at, in units of the mean activation where active."""
    absolute: tuple[float, ...] = (10.0,)
    """Values to clamp at, as they are."""
    pool: measure.Pool = "mean"
    """A feature's value on a stimulus: its mean over the counted tokens, or that at the last token."""
    min_stimuli: int = 8
    """Stimuli of the selecting half in which a candidate is active at least."""
    max_pairs: int = 2_000
    """Pairs to select from: those active in most stimuli."""
    n_permutations: int = 300
    """Draws of each null distribution."""
    seed: int = 0
    """Seed of the division of the stimuli and of the permutations."""
    batch_rows: int = 64
    """Rows per forward pass."""
    output: str = "runs/factorial"
    """Folder for results.json and changes.parquet."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(self, "min_stimuli", "max_pairs", "n_permutations", "batch_rows")
        check_numbers(self)
        if not self.clamps and not self.absolute:
            raise ValueError("there is nothing to clamp at; give --clamps or --absolute")
        for name in ("clamps", "absolute"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} is {values}; give each value once")


def run_factorial(cfg: FactorialConfig, *, command: str | None = None) -> FactorialResult:
    """Do the experiment and write `results.json` and `changes.parquet` to `cfg.output`.

    Raises:
        ValueError, FileNotFoundError: for stimuli, an SAE or a model that do not work or do not go together.
    """
    check_output(cfg.output)
    check_device(cfg.device)
    stimuli = load_stimuli(cfg.stimuli)
    sae = load_sae(cfg.sae, device=cfg.device).eval()
    refuse_transcoder(sae, "this experiment")
    secondary = None if cfg.secondary is None else load_sae(cfg.secondary, device=cfg.device).eval()
    model, _ = model_of(sae, cfg.device, model_name=cfg.model)
    with publishing(cfg.output, "factorial", command=command) as made:
        result, rows = factorial(model, sae, stimuli, cfg, secondary=secondary, command=command)
        write_parquet(rows, made.folder / "changes.parquet")
        result.save(made.folder / "results.json")
    return result


def factorial(
    model: LanguageModel,
    sae: SAE[Any],
    stimuli: StimulusSet,
    cfg: FactorialConfig,
    *,
    secondary: SAE[Any] | None = None,
    command: str | None = None,
) -> tuple[FactorialResult, pd.DataFrame]:
    """The experiment on a model at hand: the result, and the change of every word after every stimulus by arm and scale.

    The SAE is of any architecture; pairs are looked at where it has an interaction path over pairs. The secondary SAE is one on
    its hidden code. The names of model, SAE and stimuli in `cfg` are not used.

    Raises:
        ValueError: for stimuli that the tokenizer or the model cannot take, or no candidate to select.
    """
    refuse_transcoder(sae, "this experiment")
    metadata = sae.cfg.metadata
    tokens = measure.tokenized(model, stimuli, prepend_bos=metadata.prepend_bos is not False)
    cells, word_cells = stimuli.cell_of_sentence, stimuli.cell_of_word
    half = halves(cells, np.random.default_rng([cfg.seed, 0]))
    if told := few_stimuli(int(np.bincount(cells[~half]).min())):
        remark(told)
    found: list[measure.Candidates | None] = [measure.feature_candidates(model, sae, tokens.prompts, cfg.pool)]
    found.append(measure.pair_candidates(model, sae, tokens.prompts, cfg.pool, cfg.max_pairs))
    if secondary is not None:
        found.append(measure.secondary_candidates(model, sae, secondary, tokens.prompts, cfg.pool))
    pools = {one.kind: one.firing_in(half, cfg.min_stimuli) for one in found if one is not None}
    first, second = stimuli.factors
    roles = f"{first.name} (main effect)", f"{second.name} (main effect)"
    selected, units = _select(pools, cells, half, roles, cfg)
    held_out = [prompt for prompt, chosen in zip(tokens.prompts, half, strict=True) if not chosen]
    scorer = measure.WordScorer(model, held_out, tokens.words, cfg.batch_rows)
    baseline = scorer.scores(clamps.spliced(sae, secondary), "the SAE in place, nothing clamped")
    results, frames = list[ArmResult](), list[pd.DataFrame]()
    planned = clamps.arms(sae, units, cfg.clamps, cfg.absolute, roles)
    for number, arm in enumerate(tqdm(planned, desc="Clamping", unit="arm")):
        changes = scorer.scores(clamps.spliced(sae, secondary, arm.edits), arm.name).less(baseline)
        rng = np.random.default_rng([cfg.seed, 1, number])
        tests = clamps.clamp_tests({**changes}, word_cells, cells[~half], rng, cfg.n_permutations)
        pattern = word_pattern(by_bucket(changes[PRIMARY_SCALE], word_cells))
        same: Any = {name: getattr(arm, name) for name in ("name", "role", "units", "clamp", "times", "control")}
        means = clamps.cell_estimates(pattern, cells[~half])
        contrast = clamps.contrast_estimate(tests.items[PRIMARY_SCALE], pattern, cells[~half])
        results.append(ArmResult(**same, tests=tests, cells=means, contrast=contrast))
        frames.append(_changes_table(arm, changes, np.flatnonzero(~half), stimuli))
    result = FactorialResult(
        design=" x ".join(f"{factor.name} ({' / '.join(factor.levels)})" for factor in stimuli.factors),
        items=(int(half.sum()), int((~half).sum())),
        selected=tuple(selected),
        arms=with_holm(results),
        secondary_shifts=_secondary_shifts(model, sae, secondary, planned, units, held_out),
        provenance=provenance(
            cfg,
            command=command,
            packages=("statsmodels",),
            stimuli=asdict(stimuli),
            sae_config=sae.cfg.to_dict(),
            stimuli_text=told_of_text(model, tokens.prompts, metadata=metadata, folder=cfg.sae),
        ),
    )
    return result, pd.concat(frames, ignore_index=True)


def _select(
    pools: dict[str, measure.Candidates], cells: Cells, half: Half, roles: tuple[str, str], cfg: FactorialConfig
) -> tuple[list[SelectedUnit], list[Unit]]:
    """What is clamped: the selected ones, and after them their controls."""
    wanted: list[tuple[str, str, Effect]] = [("feature", roles[0], "first"), ("feature", roles[1], "second")]
    wanted.extend((kind, f"{kind} (interaction)", "interaction") for kind in ("pair", "secondary") if kind in pools)
    selected, columns = list[SelectedUnit](), list[tuple[str, int]]()
    for number, (kind, role, effect) in enumerate(wanted):
        pool, rng = pools[kind], np.random.default_rng([cfg.seed, 2, number])
        test = select_and_test(pool.values, cells, effect, half, rng, cfg.n_permutations)
        null = shuffled_procedure(pool.values, cells, effect, test.held_out.f, rng, cfg.n_permutations)
        selected.append(SelectedUnit(unit=clamps.unit_of(pool, test.selection.index, role), test=test, null=null))
        columns.append((kind, test.selection.index))
    taken = {kind: {column for k, column in columns if k == kind} for kind in pools}
    controls = list[Unit]()
    for (kind, column), (_, role, _) in zip(columns, wanted, strict=True):
        match = pools[kind].matched(column, taken[kind])
        if match is not None:
            taken[kind].add(match)
            controls.append(clamps.unit_of(pools[kind], match, f"match of {role.partition(' (')[0]}", control=True))
    for kind, pool in pools.items():
        found = pool.insensitive(half, cells, taken[kind])
        if found is not None:
            controls.append(clamps.unit_of(pool, found, f"insensitive {kind}", control=True))
    return selected, [*(one.unit for one in selected), *controls]


def _changes_table(
    arm: clamps.Arm, changes: Mapping[measure.Scale, Any], items: Cells, stimuli: StimulusSet
) -> pd.DataFrame:
    n_words = len(stimuli.words)
    return pd.DataFrame(
        {"arm": pd.Categorical.from_codes(np.zeros(len(items) * n_words, dtype=int), [arm.name])}
        | {"item": np.repeat(items, n_words), "item_cell": np.repeat(stimuli.cell_of_sentence[items], n_words)}
        | {"word": np.tile(stimuli.words, len(items)), "word_cell": np.tile(stimuli.cell_of_word, len(items))}
        | {f"{scale}_change": changes[scale].ravel() for scale in measure.SCALES}
    )


def _secondary_shifts(
    model: LanguageModel,
    sae: SAE[Any],
    secondary: SAE[Any] | None,
    planned: Sequence[clamps.Arm],
    units: Sequence[Unit],
    prompts: Sequence[tuple[int, ...]],
) -> tuple[SecondaryShift, ...]:
    """How the selected secondary feature moves while primary features are clamped."""
    selected = next((unit for unit in units if unit.kind == "secondary" and not unit.control), None)
    if selected is None or secondary is None or not isinstance(sae, NFMPaths):
        return ()
    before = measure.secondary_activations(model, sae, clamps.spliced(sae, secondary), prompts).mean(0)
    found = list[SecondaryShift]()
    for arm in planned:
        if not arm.control and all(unit.kind == "feature" for unit in arm.units):
            clamped = clamps.spliced(sae, secondary, arm.edits)
            after = measure.secondary_activations(model, sae, clamped, prompts).mean(0)
            change, active = np.abs(after - before), (after != 0) | (before != 0)
            own = selected.index[0]
            above = float((change[active] >= change[own]).mean()) if active.any() else 1.0
            shift, n = float(after[own] - before[own]), int(active.sum())
            found.append(SecondaryShift(arm=arm.name, change=shift, above=above, features=n))
    return tuple(found)
