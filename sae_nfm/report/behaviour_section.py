"""What an SAE's error does to the model, beside other changes of its size."""

from collections.abc import Iterator

from sae_nfm.evaluation.error_controls import MeasuredKL, has_controls, kl_by_arm
from sae_nfm.interventions import UNDER_TEST
from sae_nfm.report.behaviour_figures import arms_figure, ratios_figure, scales_figure
from sae_nfm.report.blocks import Block, Heading, Prose, Section
from sae_nfm.report.run_folder import Run
from sae_nfm.stats import Estimate

TITLE = "Behaviour: what the error does to the model"
COMMAND = "sae-nfm reproduce --output RUN/reproduce"


def section(run: Run) -> Section | None:
    """The chapter; None without a measurement of an SAE beside its controls."""
    measured = [folder for folder in run.measurements if has_controls(folder)]
    if not measured:
        return None
    blocks: list[Block] = []
    verdicts: list[str] = []
    for number, folder in enumerate(measured, 1):
        if len(measured) > 1:
            blocks.append(Heading(text=run.label(folder)))
        try:
            kl = kl_by_arm(folder)
        except ValueError as error:  # one that was interrupted: the other chapters are still worth having
            blocks.append(Prose(lines=[f"{run.label(folder)} is left out: {_without_folder(error, folder)}."]))
            continue
        blocks += _blocks(kl, number)
        verdicts += _said(kl)
    return Section(
        id="behaviour",
        title=TITLE,
        lead="An SAE in place of the activations moves the model's predictions. Is that more than any change of the "
        "same size would do? It depends on which change.",
        blocks=blocks,
        verdicts=verdicts,
    )


def _without_folder(error: ValueError, folder: object) -> str:
    return str(error).replace(f"in {str(folder)!r} ", "")


def _blocks(measured: MeasuredKL, number: int) -> Iterator[Block]:
    for sae in measured.ratios:
        name = sae.replace(" ", "-")
        if len(measured.ratios) > 1:
            yield Heading(text="The SAE under test" if sae == UNDER_TEST else sae)
        yield arms_figure(measured, sae, f"arms-{number}-{name}")
        scales = scales_figure(measured, sae, f"scales-{number}-{name}")
        if scales is not None:
            yield scales
        yield ratios_figure(measured.ratios[sae], f"ratios-{number}-{name}")


def _said(measured: MeasuredKL) -> Iterator[str]:
    for sae, ratios in measured.ratios.items():
        words = [f"{_ratio(ratio)} against {control}" for control, ratio in ratios.items()]
        yield f"KL of {'the SAE' if sae == 'sae' else sae} over that of a change of equal distance: {'; '.join(words)}."


def _ratio(ratio: Estimate) -> str:
    return f"{ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
