"""The commands of README, docs and help do what they print: each is run, with sizes and models that are tiny.

The parser's test (`tests/cli/test_examples.py`) reads all of them. Not run here: what needs a hub (push, pull), checkpoints of
other packages, a whole comparison (compare, reproduce, secondary, dynamics: tests of their own) or timings (speed).
"""

import importlib.util
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
from datasets import Dataset
from sae_lens import SAE
from small_training import SIZES
from tiny_models import write_checkpoint

from sae_nfm_cli import main
from sae_nfm_cli.commands import COMMANDS

_spec = importlib.util.spec_from_file_location("examples", Path(__file__).parents[1] / "cli" / "test_examples.py")
examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(examples)

HOOK = "blocks.0.hook_resid_post"
TEXT = "--context-size 16 --batch-size 64 --training-tokens 512 --held-out-tokens 128 --d-sae 32 --k 4 --nfm-dim 4"
FEW = "--batch-size-prompts 2 --n-eval-reconstruction-batches 2 --n-eval-sparsity-variance-batches 2"
TINY = {
    "train": [*SIZES, "--k", "4", "--evaluate_every", "0", "--feature_sampling_window", "1"],
    "demo": TEXT.split(),
    "evaluate": FEW.split(),
    "explore": ["--n-tokens", "300", "--pairs", "20", "--contexts", "2"],
    "attribute": ["--n-tokens", "300", "--control-tokens", "200", "--top", "2"],
    "factorial": ["--n-permutations", "9", "--max-pairs", "20", "--clamps", "4", "--absolute"],
    "report": [], "export": [], "dry-run": [], "convert": [], "completion": [],
}  # fmt: skip
"""Commands that are run, and the options that make them small."""
FOREIGN = re.compile(
    r"smollm2|layers\.10|author|folded|--measure-rates|mine\.yaml|--primary|secondary|formality|--adapter|trainer_0|_model\.pt|scope|\.\.\."
)
"""What is not there: a fetched model, checkpoints of other packages, files that a reader would write."""
WHERE = {"model": "model", "model_name": "model", "hook": HOOK, "hook_name": HOOK, "device": "cpu"}
BOUND = {"nfm_top_k": "2", "lr_decay_steps": "2"}
"""What has to fit to the tiny sizes."""
TEXTS = {"dataset": "hub", "dataset_path": "hub", "held_out": "held_out.parquet"}
"""What stands in for a model and its text."""


@cache
def every_command() -> list[str]:
    printed = [command for command, is_whole, _ in examples.found() if is_whole]
    printed += [line for command in COMMANDS.values() for _, line in command.examples]
    commands = dict.fromkeys(line.partition(" #")[0].strip() for line in printed)
    runs = (line for line in commands if not FOREIGN.search(line) and not set(line) & set("<>|;$'"))
    words = {line: shlex.split(line) for line in runs if line.startswith("sae-nfm ")}
    in_part = (["evaluate"], ["evaluate", "1"])
    return [line for line, (_, *rest) in words.items() if rest[0] in TINY and rest not in in_part]


def name_of(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0].replace("-", "_")


def made_small(line: str) -> list[str]:
    """The arguments with tiny sizes, and with a tiny model in place of another than the embedded one."""
    _, command, *argv = shlex.split(line)
    fixed = [name_of(argument) for argument in TINY[command] if argument.startswith("--")]
    elsewhere = any(name_of(argument) in ("model", "model_name") for argument in argv)
    kept: list[str] = []
    position = 0
    while position < len(argv):
        argument, position = argv[position], position + 1
        if not argument.startswith("--"):
            kept.append(argument)
            continue
        values = []
        while position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        name = name_of(argument)
        if name not in fixed:
            standing_in = (BOUND | (WHERE | TEXTS if elsewhere else {"device": "cpu"})).get(name)
            kept += [argument, *([standing_in] if standing_in else values)]
    tiny = TINY[command]
    if elsewhere and command == "demo" and "--hook" not in kept:  # the default is in a layer that the tiny model lacks
        kept += ["--hook", HOOK]
    if command == "train" and ("--base" in kept or "--warm_start" in kept):
        tiny = [part for i, part in enumerate(tiny) if not {"d_sae", "k"} & {name_of(part), name_of(tiny[i - 1])}]
    return [command, *kept, *tiny]


def write_texts() -> None:
    """Texts, a data set in the layout of the hub and a model, where the pages have theirs."""
    write_checkpoint(Path("model"), "gpt2")
    texts = [" ".join(f"t{(7 * i + j) % 49 + 1}" for j in range(40)) for i in range(200)]
    names = {name: texts[:150] for name in ("train", "corpus-train", "hub/data/train-00000-of-00001")}
    for name, some in (names | {name: texts[150:] for name in ("held_out", "corpus-validation")}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": some}).to_parquet(f"{name}.parquet")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder in which a reader has done what the pages before said: texts, a model, a demo, SAEs under runs."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_texts()
        assert main(made_small("sae-nfm demo")) == 0
        for name, arm in (("mine", "joint_nfm"), ("other", "joint_nfm"), ("topk", "topk"), ("../SAE", "joint_nfm")):
            shutil.copytree(f"runs/demo/saes/{arm}", f"runs/{name}")
        assert main(made_small("sae-nfm explore runs/mine --output runs/explorer")) == 0
    return folder


def run(line: str, workspace: Path, monkeypatch, tmp_path) -> None:
    shutil.copytree(workspace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    argv = made_small(line)
    assert main(argv) == 0, shlex.join(argv)


@pytest.mark.parametrize("line", [line for line in every_command() if "./my-hf-folder" in line])
def test_the_guide_s_training_on_another_model_runs(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts()
    assert main(made_small(line)) == 0
    assert SAE.load_from_disk("output").cfg.metadata.hook_name == HOOK


@pytest.mark.slow  # sixty commands: minutes
@pytest.mark.parametrize("line", every_command())
def test_every_printed_command_runs(line, workspace, monkeypatch, tmp_path):
    run(line, workspace, monkeypatch, tmp_path)


def test_the_commands_that_are_run():
    assert len(every_command()) > 30
    assert {shlex.split(line)[1] for line in every_command()} >= set(TINY) - {"completion"}
