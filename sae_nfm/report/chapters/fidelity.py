"""How faithful each SAE is: the table of a demo or a comparison, the paper's comparison beside the fair ones."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import pandas as pd

from sae_nfm.comparison.results import (
    PUBLISHED,
    ArmGroup,
    ArmMean,
    Change,
    ClaimKind,
    CompareResult,
    RowKind,
    arm_means,
    cells,
    legend,
)
from sae_nfm.evaluation.results import Evaluation, Fidelity, FidelityTable
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section, Table
from sae_nfm.report.plots import PALETTE, Axis, Group, Mark, dot_plot, drawn, headed, plain_rows
from sae_nfm.report.run_folder import Found, Run

TITLE = "Fidelity: what each SAE keeps of the model"
COMMANDS = (
    "sae-nfm evaluate SAE --save RUN/SAE.json",
    "sae-nfm demo --output RUN/demo",
    "sae-nfm compare --output RUN/compare",
)
PANELS = {"fvu": "FVU, fraction of variance unexplained", "kl_nats": "KL, nats per token"}
METRICS = (
    Group(name="FVU", colour=PALETTE[0], symbol="circle", offset=-0.16, size=10),
    Group(name="KL", colour=PALETTE[1], symbol="diamond", offset=0.16, size=10),
)
HEADINGS = {
    ClaimKind.ABLATION: "The paper's comparison: with a part of itself",
    ClaimKind.FAIR: "Fair: with SAEs trained on their own",
    ClaimKind.INFERENCE: "The gain from inference: stages, refinements, both",
    ClaimKind.PATHS: "The gain from NFM paths on the same inference",
}
SAID = {
    ClaimKind.ABLATION: "the paper's comparison",
    ClaimKind.FAIR: "the fair comparison",
    ClaimKind.INFERENCE: "the gain from inference",
    ClaimKind.PATHS: "the gain from NFM paths",
}
TOKENS = "total_tokens_eval_reconstruction"
EVALUATED = {
    "KL, nats": "kl_div_with_sae",
    "L0": "l0",
    "explained variance": "explained_variance",
    "CE, nats": "ce_loss_with_sae",
    "CE of the model": "ce_loss_without_sae",
    "CE score": "ce_loss_score",
    "cosine": "cossim",
}
"""Columns of evaluations, by SAELens's names of their metrics."""
EVALUATION_LEGEND = (
    "Means over tokens, special tokens that an SAE was trained without left out. KL: of the original model's predictions to the "
    "spliced model's, per token; CE: cross-entropy of the next token. The CE score divides by an ablation of the hook point at "
    "all positions, special tokens too, which flatters every SAE; KL and CE do not depend on it. One "
    "SAE each: no intervals, and SAEs compare fairly at equal L0 only"
)
FIDELITY_COLUMNS = ("SAE", "FVU", "KL, nats", "CE, nats", "CE increase", "L0", "tokens")
CHANGE = Axis(title="change (left of zero: better)", tickformat="+.0%", form="+.1%", reference=0.0)
SEED = Group(name="one seed", colour="#6b6b6b", symbol="circle", size=5, offset=0.27, opacity=0.6)
GROUPS = {
    ArmGroup.JOINT: Group(name=str(ArmGroup.JOINT), colour=PALETTE[0], symbol="circle", offset=-0.08),
    ArmGroup.TOPK: Group(name=str(ArmGroup.TOPK), colour=PALETTE[4], symbol="square", offset=-0.08),
    ArmGroup.OTHER: Group(name=str(ArmGroup.OTHER), colour=PALETTE[2], symbol="triangle-up", offset=-0.08),
}
OFF = Group(name="with paths ablated", colour=PALETTE[3], symbol="diamond-open", offset=-0.08)


def section(run: Run) -> Section | None:
    """The chapter; None without a demo, a comparison or an evaluation."""
    compared = run.of(CompareResult)
    blocks: list[Block] = []
    for number, found in enumerate(compared, 1):
        what = "One run" if found.result.changes else "Several seeds"
        blocks.append(Heading(text=what if found.label == "." else f"{what}: {found.label}"))
        blocks += _blocks(found.result, number)
    told: list[str] = []
    for same in _same_text(run.of(Evaluation)):
        blocks += _evaluated(same)
        told += _ranked(same)
    for found in run.of(FidelityTable):
        blocks += _measured(found)
    if not blocks:
        return None
    return Section(
        id="fidelity",
        title=TITLE,
        lead="Each SAE is spliced into the language model in place of the activations it reconstructs. How much of "
        "their variance is lost (FVU), and how far do the model's predictions move (KL)? Lower is better.",
        blocks=blocks,
        verdicts=[*(_said(change) for found in compared for change in found.result.changes), *told],
    )


def _same_text(evaluations: Sequence[Found[Evaluation]]) -> list[dict[str, Evaluation]]:
    """Evaluations by the names of their SAEs, those on the same tokens at the same place together."""
    counts = Counter(_name(found.result) for found in evaluations)
    groups: dict[tuple[object, ...], dict[str, Evaluation]] = {}
    for found in evaluations:
        one, name = found.result, _name(found.result)
        excluded = one.provenance.get("config", {}).get("exclude_special_tokens")
        tokens = one.provenance.get("tokens_sha256"), one.metrics.get("token_stats", {}).get(TOKENS)
        key = one.model_name, one.hook_name, one.data, one.context_size, one.passes, excluded, *tokens
        groups.setdefault(key, {})[name if counts[name] == 1 else f"{name} ({found.label})"] = one
    return list(groups.values())


def _name(evaluation: Evaluation) -> str:
    """An SAE by its folder's name, or as release:sae_id."""
    sae = evaluation.sae
    return PurePath(sae).name if ":" not in sae and PurePath(sae).name else sae


def _evaluated(same: dict[str, Evaluation]) -> Iterator[Block]:
    first = next(iter(same.values()))
    yield Heading(text=f"SAELens's metrics at {first.hook_name} of {first.model_name}")
    rows = [
        (name, one.architecture, *(_shown(_metric(one, key)) for key in EVALUATED.values()))
        for name, one in same.items()
    ]
    again = f" The text was read {first.passes} times, so that some tokens count twice." if first.passes > 1 else ""
    tokens = _metric(first, TOKENS)
    where = f"{'' if tokens is None else f'{tokens:,.0f} tokens of '}{first.data}"
    yield Table(
        columns=("SAE", "architecture", *EVALUATED),
        rows=rows,
        caption=f"{where}, {first.context_size} in a row. {EVALUATION_LEGEND}.{again}",
        text_columns=(0, 1),
    )


def _ranked(same: dict[str, Evaluation]) -> Iterator[str]:
    """The SAEs in the order of their KL; nothing where there is nothing to compare."""
    known = {name: kl for name, one in same.items() if (kl := _metric(one, EVALUATED["KL, nats"])) is not None}
    if len(known) > 1:
        order = sorted(known, key=known.__getitem__)
        parts = "; ".join(f"{name} {known[name]:.4g} at L0 {_shown(_metric(same[name], 'l0'))}" for name in order)
        yield f"KL in nats per token on the same tokens, one SAE each and so without a test: {parts}."


def _metric(evaluation: Evaluation, name: str) -> float | None:
    return next((group[name] for group in evaluation.metrics.values() if group.get(name) is not None), None)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _measured(found: Found[FidelityTable]) -> Iterator[Block]:
    yield Heading(text=f"Measured from Python: {found.label}")
    rows = [(name, *map(_shown, _numbers(one)), f"{one.tokens:,}") for name, one in found.result.saes.items()]
    caption = (
        "Means over the counted tokens: FVU, the fraction of variance unexplained; KL of the original model's predictions to the "
        "spliced model's and cross-entropy (CE) per token, CE increase over the original model; L0, active features per token. "
        "One SAE each: no intervals."
    )
    yield Table(columns=FIDELITY_COLUMNS, rows=rows, caption=caption)


def _numbers(one: Fidelity) -> tuple[float, ...]:
    return one.fvu, one.kl_nats, one.ce_nats, one.ce_delta_nats, one.l0


def _said(change: Change) -> str:
    """A comparison with the words of the terminal."""
    return f"{change.arm}, {SAID[change.kind]}: {change.sentence}."


def _blocks(result: CompareResult, number: int) -> Iterator[Block]:
    if result.changes:
        yield changes_figure(result.changes, number)
    means = arm_means(result.rows)
    ks = sorted({row.k for row in result.rows})
    for k in ks:
        own = [mean for mean in means if mean.row.k == k]
        if len(ks) > 1:
            yield Heading(text=f"k = {k}")
        if any(mean.row.kind is RowKind.ABLATION for mean in own):
            yield ablation_figure(own, number)
        if not result.changes:
            yield whole_figure(own, number)
        rows = [row for row in result.rows if row.k == k]
        kinds = {row.arm: row.kind for row in rows}
        yield Table(
            columns=result.columns,
            rows=cells(rows, result.columns),
            caption=f"Mean over seeds (standard deviation). {legend(result.columns)}. Bold: whole SAEs.",
            strong=[kind is not RowKind.ABLATION for kind in kinds.values()],
        )
    yield Prose(lines=result.caveats(), listed=True)


def changes_figure(changes: Sequence[Change], number: int) -> Figure:
    """Change of FVU and KL in every comparison of one seed, the paper's above the fair ones."""
    rows = headed(
        (heading, plain_rows(_against(change) for change in changes if change.kind is kind))
        for kind, heading in HEADINGS.items()
    )
    data = [
        (_against(change), str(change.kind), metric.name, value)
        for change in changes
        for metric, value in zip(METRICS, (change.fvu_change, change.kl_change), strict=True)
    ]
    marks = [Mark(row=row, group=metric, x=value) for row, _, metric, value in data]
    return Figure(
        name=f"claims-{number}",
        title="The same models, compared with a part of themselves and fairly",
        plot=dot_plot(marks, METRICS, rows, CHANGE, label_width=46, narrow_width=24),
        caption="Relative change of the reconstruction error (FVU) and of the divergence of the model's predictions "
        "(KL); left of zero the SAE named first is better. Above, the paper's comparison: all paths against the direct "
        "path alone, a part of the same SAE that was never trained to stand alone. Below, its controls: SAEs trained "
        "on their own on the same tokens. Staged: features chosen in stages; refined: the same SAE, its activations "
        "fitted to its input. One seed each: no intervals, and differences of a few per cent may be "
        f"chance. {PUBLISHED}",
        data=pd.DataFrame(data, columns=["comparison", "kind", "measure", "relative change"]),
    )


def _against(change: Change) -> str:
    if change.kind is ClaimKind.ABLATION:
        return f"{change.arm} against its own part, {change.paths}"
    return f"{change.arm} against {change.against} ({change.parameter_ratio:.2f} x its parameters)"


def whole_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """FVU and KL of every arm at one k, each seed and the mean; SAEs of a family at other sparsities are left out."""
    chosen = [m for m in means if m.row.kind is not RowKind.ABLATION and m.row.arm == m.row.line]
    fitted = any(m.row.refinement_steps for m in chosen)
    return _means_figure(
        f"arms-{number}",
        "Whole SAEs, each trained on its own",
        chosen,
        Axis(title="lower is better"),
        f"{_mean_over(chosen)}; small dots: the seeds. "
        f"{'Refined: the same SAE, its activations fitted to its input. ' if fitted else ''}The axes do not begin at "
        "zero, so that small differences can be seen. All arms see the same tokens in the same order, so their "
        "seeds are paired: intervals that overlap do not show that arms are alike; the verdicts compare them pair "
        "by pair.",
    )


def ablation_figure(means: Sequence[ArmMean], number: int) -> Figure:
    """The paper's comparison in absolute numbers at one k: SAEs with paths ablated beside the whole ones and TopK."""
    ablated = {mean.row.family for mean in means if mean.row.kind is RowKind.ABLATION}
    shown = [m for m in means if not m.row.refinement_steps]
    chosen = [m for m in shown if m.row.family in ablated or m.row.group is ArmGroup.TOPK]
    return _means_figure(
        f"ablations-{number}",
        "The paper compares an SAE with a part of itself; TopK is the fair neighbour",
        chosen,
        Axis(title="lower is better", from_zero=True),
        "Hollow: paths ablated. The paper reports the distance from there to the whole SAE. In the "
        "canonical gauge all that is linear is written by the direct path, which changes no output of the whole "
        "SAE: the distance that is left is what the other paths do. TopK SAEs, trained on their own on the same "
        f"tokens, are the control. {_mean_over(chosen)}; small dots: the seeds. Axes begin at zero.",
    )


def _means_figure(name: str, title: str, means: Sequence[ArmMean], axis: Axis, caption: str) -> Figure:
    marks, rows = _marks(means), plain_rows(mean.row.arm for mean in means)
    groups = (SEED, *GROUPS.values(), OFF)
    return Figure(
        name=f"{name}-k{means[0].row.k}",
        title=title,
        plot=dot_plot(marks, groups, rows, axis, panels=tuple(PANELS.values()), label_width=32),
        caption=caption,
        data=drawn(marks, rows),
    )


def _marks(means: Sequence[ArmMean]) -> list[Mark]:
    seeds = [
        Mark(panel=PANELS[mean.metric], row=mean.row.arm, group=SEED.name, x=value, note=f"seed {seed}")
        for mean in means
        for seed, value in zip(mean.seeds, mean.values, strict=True)
        if len(mean.seeds) > 1
    ]
    averages = [
        Mark(
            panel=PANELS[m.metric],
            row=m.row.arm,
            group=(OFF if m.row.kind is RowKind.ABLATION else GROUPS[m.row.group]).name,
            x=m.mean,
            low=m.low,
            high=m.high,
            note=f"L0 {m.l0:.1f}, {m.row.kind}",
        )
        for m in means
    ]
    return [*seeds, *averages]


def _mean_over(means: Sequence[ArmMean]) -> str:
    n = max(len(mean.seeds) for mean in means)
    bounded = any(mean.low is not None for mean in means)
    interval = " with its 95 % interval (Student's t over seeds)" if bounded else ""
    return f"Mean over {'one seed' if n == 1 else f'{n} seeds'}{interval}"
