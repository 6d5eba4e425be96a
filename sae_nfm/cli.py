"""The command line: `sae-nfm demo`. Options are the fields of the configuration classes; their docstrings are the help."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sae_lens.training._interruption import InterruptedException
from simple_parsing import ArgumentParser
from simple_parsing.wrappers.field_wrapper import DashVariant

from sae_nfm.benchmark import BenchmarkConfig, run_benchmark
from sae_nfm.report.page import write_report
from sae_nfm.summary import table, words
from sae_nfm.training import read_training_record


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A caller's mistake is one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="sae-nfm",
        description="Sparse autoencoders trained jointly with a Neural Factorization Machine, compared honestly.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        add_option_string_dash_variants=DashVariant.DASH,
        help="train joint_nfm and its baselines, print the table, write results.json and report.html",
        description="Train joint_nfm and its baselines on one activation stream, evaluate them spliced into the model, "
        "print the table and write results.json and report.html. Without options: the embedded model, offline.",
    )
    demo.add_arguments(BenchmarkConfig, dest="config")
    try:
        arguments = parser.parse_args(argv)
        run_demo(arguments.config, command=" ".join(["sae-nfm", *argv]))
    except (ValueError, FileNotFoundError) as error:
        print(f"sae-nfm: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, InterruptedException):
        print("\nsae-nfm: interrupted; finished files are whole, others end in .partial", file=sys.stderr)
        return 130
    return 0


def run_demo(config: BenchmarkConfig, command: str) -> None:
    """The main job: benchmark, table, words, report."""
    result = run_benchmark(config, command=command)
    output = Path(config.output)
    page = write_report(result, read_training_record(output / "training.jsonl"), output / "report.html")
    print(f"\n{table(result)}\n\n{words(result)}\n\nResults: {output / 'results.json'}\nReport:  {page}")
