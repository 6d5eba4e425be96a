"""The command line: `sae-nfm COMMAND`. Options are the fields of configuration classes; their docstrings are the help."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sae_lens.training._interruption import InterruptedException
from simple_parsing.wrappers.field_wrapper import DashVariant

from sae_nfm import __version__
from sae_nfm.flags import CommandParser, dashed, underscored


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. Its modules are imported when it is called."""

    summary: str
    """Its line in `sae-nfm --help`."""
    description: str = ""
    """What its own help begins with."""
    config: str
    """Its configuration class, or a function that makes a configuration of the arguments, as module:name."""
    run: Callable[[Any, str], str]
    """Does it, given the configuration and the whole command line; returns what to print."""
    arguments: str = ""
    """Its arguments without a flag, as its usage line names them."""
    dashes: bool = False
    """Whether its options are spelt with dashes in the help; both spellings are understood."""

    def parse(self, name: str, argv: Sequence[str]) -> Any:
        """Its configuration from the arguments that follow its name."""
        config = _imported(self.config)
        if not isinstance(config, type):
            return config(argv)
        parser = CommandParser(
            prog=f"sae-nfm {name}",
            usage=" ".join(["%(prog)s", *self.arguments.split(), "[options]"]),
            description=self.description or f"{self.summary[0].upper()}{self.summary[1:]}.",
            titles={config.__name__: "options"},
            add_option_string_dash_variants=DashVariant.DASH if self.dashes else DashVariant.UNDERSCORE,
        )
        parser.add_arguments(config, dest="config")
        return parser.parse_args(dashed(argv) if self.dashes else underscored(argv)).config


def words_of(function: str, *, keeps_command: bool = False) -> Callable[[Any, str], str]:
    """The `run` of a command: "module:function" is given the configuration, and its result has `words()`.

    Args:
        function: what does it.
        keeps_command: whether it is given the command line too, for the provenance.
    """

    def run(config: Any, line: str) -> str:
        given = {"command": line} if keeps_command else {}
        return _imported(function)(config, **given).words()

    return run


def run_demo(config: Any, line: str) -> str:
    """The main job: benchmark, table, words, report."""
    from sae_nfm.benchmark import run_benchmark
    from sae_nfm.report.page import write_report
    from sae_nfm.summary import table, words
    from sae_nfm.training import read_training_record

    result = run_benchmark(config, command=line)
    output = Path(config.output)
    page = write_report(result, read_training_record(output / "training.jsonl"), output / "report.html")
    return f"\n{table(result)}\n\n{words(result)}\n\nResults: {output / 'results.json'}\nReport:  {page}"


COMMANDS = {
    "demo": Command(
        summary="train joint_nfm and its baselines, print the table, write results.json and report.html",
        description="Train joint_nfm and its baselines on one activation stream, evaluate them spliced into the model, "
        "print the table and write results.json and report.html. Without options: the embedded model, offline.",
        config="sae_nfm.benchmark:BenchmarkConfig",
        run=run_demo,
        dashes=True,
    ),
    "train": Command(
        summary="train one SAE of any architecture, with SAELens's flags; interrupted, it resumes to the same bits",
        config="sae_nfm.train_flags:parse",
        run=words_of("sae_nfm.train:train"),
    ),
    "evaluate": Command(
        summary="evaluate a saved or released SAE with SAELens's metrics, on held-out text",
        config="sae_nfm.evals:parse",
        run=words_of("sae_nfm.evals:evaluate_saved", keeps_command=True),
    ),
    "compare": Command(
        summary="compare arms at matched width, parameters and FLOPs over several seeds, with a verdict for each claim",
        description="Train joint_nfm, its controls and SAEs on their own over several seeds, each at its own learning rate, and "
        "judge every claim over seeds and documents. Interrupted, it goes on when called again. Without options: the embedded "
        "model, offline, less than an hour on 2 cores.",
        config="sae_nfm.compare:CompareConfig",
        run=words_of("sae_nfm.compare:run_compare", keeps_command=True),
        dashes=True,
    ),
    "reproduce": Command(
        summary="print every published figure beside the same statistic here and the control that it needs",
        description="Measure what arXiv 2507.00269 reports, and the same under the controls that it lacks, on SAEs trained for "
        "one seed or on those of a finished comparison. Without options: the embedded model, offline, minutes on 2 cores.",
        config="sae_nfm.reproduce:ReproduceConfig",
        run=words_of("sae_nfm.reproduce:run_reproduce", keeps_command=True),
        dashes=True,
    ),
    "speed": Command(
        summary="measure what a training step of joint_nfm costs, beside SAELens's TopK and beside the least it must cost",
        config="sae_nfm.speed:SpeedConfig",
        run=words_of("sae_nfm.speed:measure_speed"),
    ),
    "dry-run": Command(
        summary="check that a training run works and fits, and how long it takes at least, before anything is downloaded",
        description="Shapes, parameters, memory and time of a training run: a .yaml file, or an experiment that comes with the "
        "package (paper: the set-up of arXiv 2507.00269).",
        config="sae_nfm.dry_run:DryRunConfig",
        arguments="[EXPERIMENT]",
        run=words_of("sae_nfm.dry_run:check"),
    ),
    "attribute": Command(
        summary="show which features interact on a token of a prompt, or over held-out text, and what removing the pair does",
        description="Pairs of features on the tokens of a prompt: what each writes, which tokens that promotes, its effect on a "
        "logit, predicted and measured by removing it. With --corpus: pairs over held-out text, with contexts, the weight-only "
        "view and the co-occurrence control. Without further options: the packaged SAE of the embedded model, offline, seconds "
        "(--corpus: a minute).",
        config="sae_nfm.attribute:AttributeConfig",
        arguments="[PROMPT]",
        run=words_of("sae_nfm.attribute:attribute", keeps_command=True),
        dashes=True,
    ),
    "factorial": Command(
        summary="test in a 2x2 experiment whether features or pairs act on two factors together, with stimuli as units",
        description="Select features by main effects and pairs by the interaction on one half of the stimuli, clamp them on the "
        "other, and test what that does to target words, with controls. Without options: the embedded model, offline, minutes.",
        config="sae_nfm.factorial:FactorialConfig",
        run=words_of("sae_nfm.factorial:run_factorial", keeps_command=True),
        dashes=True,
    ),
    "dynamics": Command(
        summary="follow features over the checkpoints of a joint_nfm run: shares, norms, firing, beside shuffled identities",
        description="Measure every checkpoint of one joint_nfm run on the same held-out tokens: do features pass from "
        "integration to identity while it is trained? Beside it stand shuffled identities of features, the canonical gauge, and "
        "a topk run.",
        config="sae_nfm.learning_dynamics:DynamicsConfig",
        arguments="RUN_CHECKPOINTS",
        run=words_of("sae_nfm.learning_dynamics:run_dynamics", keeps_command=True),
        dashes=True,
    ),
    "secondary": Command(
        summary="train a secondary SAE on a primary's hidden code, beside its controls, and measure what each keeps",
        description="Train SAEs on the hidden code of an SAE's interaction path, on a permuted hidden code, on the linear path's "
        "output and on the residual; put each reconstruction in place and measure error, KL and cross-entropy. Interrupted, it "
        "goes on when called again. Without options: the packaged SAE on the embedded model, offline, minutes on 2 cores.",
        config="sae_nfm.secondary_command:SecondaryConfig",
        arguments="[PRIMARY]",
        run=words_of("sae_nfm.secondary_command:run_secondary", keeps_command=True),
        dashes=True,
    ),
    "convert": Command(
        summary="turn a checkpoint of the paper's author, dictionary_learning, sparsify or SAELens into a SAELens folder",
        config="sae_nfm.convert:ConvertConfig",
        arguments="SOURCE OUTPUT",
        run=words_of("sae_nfm.convert:convert"),
    ),
    "push": Command(
        summary="publish a saved SAE, or those of a demo, on the Hugging Face hub, with a model card",
        config="sae_nfm.hub:PushConfig",
        arguments="SOURCE REPO_ID",
        run=words_of("sae_nfm.hub:push"),
    ),
    "pull": Command(
        summary="fetch and verify SAEs that `push` has published",
        config="sae_nfm.hub:PullConfig",
        arguments="REPO_ID OUTPUT",
        run=words_of("sae_nfm.hub:pull"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A caller's mistake is one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = _command_name(argv[:1])
    try:
        config = COMMANDS[name].parse(name, argv[1:])
        print(COMMANDS[name].run(config, shlex.join(["sae-nfm", *argv])))
        return 0
    except (ValueError, FileNotFoundError) as error:
        told, status = " ".join(str(error).split()), 2
    except (KeyboardInterrupt, InterruptedException) as stop:
        told, status = str(stop) or "interrupted; finished files are whole, others end in .partial", 130
    # here, where the error and its frames, with their progress bars, are gone
    print(f"sae-nfm: {told}", file=sys.stderr)
    return status


def _command_name(argv: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(
        prog="sae-nfm",
        description="Sparse autoencoders trained jointly with a Neural Factorization Machine, and any other that SAELens "
        "trains: trained, evaluated, compared honestly.",
        epilog="`sae-nfm COMMAND --help` describes a command and its options.",
    )
    parser.add_argument("--version", action="version", version=f"sae-nfm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser.parse_args(argv).command


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
