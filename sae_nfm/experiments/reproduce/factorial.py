"""The published 2x2 experiment: a secondary SAE's feature clamped, the author's statistic beside a test that holds.

A secondary SAE is trained on the joint NFM-SAE's hidden code, at the paper's share of active features, and one clamp of
`sae-nfm factorial` is made with its selected feature and with the controls of that one. Everything else (pairs, primary
features, more clamps) is in that command.

Source: arXiv 2507.00269 (2x2 experiment on formality x emotion, with an SAE of OpenLLaMA-3B).
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE, HookedSAETransformer, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_nfm import demo
from sae_nfm.architectures import PRIMARY_DIGEST, check_primary, primary_digest
from sae_nfm.comparison.results import ArmName
from sae_nfm.experiments.factorial import PRIMARY_SCALE, FactorialConfig, factorial, load_stimuli
from sae_nfm.experiments.factorial.results import ArmResult, FactorialResult
from sae_nfm.experiments.reproduce.published import CLAMPED, CONTROL, FACTORIAL
from sae_nfm.experiments.reproduce.results import NoVerdict, ReproducedRow, Section, reproduced_row
from sae_nfm.experiments.secondary import activations_of, default_k
from sae_nfm.training import StreamConfig, TrainingArm, train_arms

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

    Args:
        model: the language model; the embedded one is asked about sentiment x register, which it knows, others as published.
        joint: an inference joint NFM-SAE of that model.
        dataset: training data in the order of the seed.
        settings: `Trained.settings` of the joint one; the secondary SAE has its stream, cut to `TOKENS`, and its learning rate.
        output: folder for the SAE and the result.
        sentences: of each cell, at most; 0 for no experiment.
        n_permutations: draws of each null, up to `DRAWS`.
    """
    if sentences == 0:
        return _not_measured("left out: sentences is 0")
    stream = StreamConfig(**{f.name: settings[f.name] for f in fields(StreamConfig) if f.name in settings})
    whole = load_stimuli("sentiment-register" if stream.model_name == demo.MODEL_NAME else "formality-emotion")
    stimuli = replace(whole, cells=tuple(replace(cell, sentences=cell.sentences[:sentences]) for cell in whole.cells))
    secondary = _trained(model, joint, dataset, stream, settings["learning_rate"], output)
    cfg = FactorialConfig(
        sae=str(ArmName.JOINT),
        secondary=str(output / SECONDARY),
        model=stream.model_name,
        stimuli=whole.name,
        clamps=(CLAMP,),
        absolute=(),
        min_stimuli=min(FactorialConfig.min_stimuli, sentences),
        n_permutations=min(DRAWS, n_permutations),
        seed=stream.seed,
        output=str(output),
    )
    try:
        result, _ = factorial(model, joint, stimuli, cfg, secondary=secondary)
    except ValueError as error:  # stimuli that the tokenizer cannot take, or features that none of them activates
        return _not_measured(str(error))
    result.save(output / "results.json")
    return list(_rows(result))


def _not_measured(reason: str) -> list[ReproducedRow]:
    return [_row(name, None, None, reason, verdict=NoVerdict.NOT_MEASURED) for name in FACTORIAL]


def _trained(
    model: HookedSAETransformer, joint: SAE[Any], dataset: Any, stream: StreamConfig, learning_rate: float, output: Path
) -> SAE[Any]:
    nfm_dim = check_primary(joint).cfg.nfm_dim
    sae = TopKTrainingSAEConfig(
        d_in=nfm_dim,
        d_sae=EXPANSION * nfm_dim,
        k=max(default_k(nfm_dim)),
        device=stream.device,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(**{PRIMARY_DIGEST: primary_digest(joint)}),
    )
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
    yield from _of_arm(CLAMPED, clamped, result)
    yield _row(
        CLAMPED,
        clamped.tests.published_f,
        selected.test.held_out.f,
        f"its own activation, selected on {result.items[0]} stimuli, F on the other {result.items[1]}; p = "
        f"{selected.null.p_value:.3f} against select and test on shuffled cells",
    )
    for arm in stage.values():
        if arm.control:
            yield from _of_arm(CONTROL, arm, result)


def _of_arm(name: str, arm: ArmResult, result: FactorialResult) -> Iterator[ReproducedRow]:
    """The author's statistic beside tests with other units."""
    tests, main = arm.tests, arm.tests.items[PRIMARY_SCALE]
    clamp = f"{result.design}; {arm.role}, {arm.units[0].name} at {arm.clamp}, author's p = {tests.published_p:.3f}"
    yield _row(name, tests.published_f, main.f, f"{clamp}: interaction F, stimuli as units, p = {main.p_value:.3f}")
    if not arm.control:
        words = tests.words
        yield _row(
            name,
            tests.published_f,
            words.f,
            f"the same, words as units, averaged over stimuli, p = {words.p_value:.3f}",
        )


def _row(name: str, here: float | None, controlled: float | None, control: str, **more: Any) -> ReproducedRow:
    return reproduced_row(Section.FACTORIAL, name, here, controlled, control, **more)
