"""A streamed data set that breaks off is asked again; what cannot be had ends the run with a checkpoint, not as a shorter run."""

import copy
import shlex

import pytest
import torch
from builders import runner_config, tiny_model, token_dataset, training_config
from datasets import IterableDataset, SplitDict, SplitInfo
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from small_training import SIZES

from sae_nfm.training import DataLostError, activation_stream
from sae_nfm.training import run as training
from sae_nfm_cli import main

ROWS = [{"tokens": list(row)} for row in token_dataset(60)[:]["tokens"]]
STEPS = 12


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(activation_stream, "PAUSES", (0.0, 0.0, 0.0))


class Source:
    """Rows that break off at a row so many times, or end there."""

    def __init__(self, at: int, times: int, error: Exception | None) -> None:
        self.at, self.times, self.error, self.begun = at, times, error, 0

    def rows(self):
        self.begun += 1
        for number, row in enumerate(ROWS):
            if number == self.at and self.times > 0:
                self.times -= 1
                if self.error is None:
                    return
                raise self.error
            yield row

    def streamed(self, **promise) -> IterableDataset:
        found = IterableDataset.from_generator(self.rows)
        if promise:
            found.info.splits = SplitDict({"train": SplitInfo("train", **promise)})
        return found


def train(cfg, dataset):
    with temporary_seed(0):
        return LanguageModelSAETrainingRunner(
            copy.deepcopy(cfg), override_dataset=dataset, override_model=tiny_model()
        ).run()


def config(folder, **settings):
    settings = {"checkpoint_path": str(folder / "checkpoints")} | settings
    return runner_config(training_config("joint_nfm"), folder / "out", steps=STEPS, **settings)


def weights(folder):
    return load_file(folder / "sae_weights.safetensors")


def assert_same(one, other):
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder), Source(0, 0, None).streamed())
    return folder / "out"


class HttpxError(Exception):
    """As of a package of the network's."""


HttpxError.__module__ = "httpx._exceptions"


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), TimeoutError("slow"), HttpxError("closed")])
def test_what_breaks_off_for_a_while_is_the_same_run(error, whole, tmp_path):
    source = Source(45, 3, error)
    train(config(tmp_path), source.streamed())
    assert source.times == 0
    assert_same(whole, tmp_path / "out")


@pytest.mark.parametrize("prefetch", [False, 2])
def test_what_breaks_off_for_good_leaves_a_checkpoint_to_go_on_from(prefetch, tmp_path):
    cfg = config(tmp_path, prefetch_llm_batches=prefetch)
    train(config(tmp_path / "alone", prefetch_llm_batches=prefetch), Source(0, 0, None).streamed())
    with pytest.raises(
        DataLostError, match=r"broke off after 55 rows \(ConnectionResetError: peer\), 4 times.*checkpoint is"
    ):
        train(cfg, Source(55, 1_000, ConnectionResetError("peer")).streamed())
    assert not (tmp_path / "out").exists()
    cfg.resume_from_checkpoint = str(tmp_path / "checkpoints")
    train(cfg, Source(0, 0, None).streamed())
    assert_same(tmp_path / "alone" / "out", tmp_path / "out")


def test_other_errors_are_not_asked_again(tmp_path):
    source = Source(20, 1_000, KeyError("column"))
    with pytest.raises(KeyError):
        train(config(tmp_path), source.streamed())
    assert source.begun == 2  # SAELens looks at the first row by itself
    assert not (tmp_path / "out").exists()


def test_what_ends_early_is_no_finished_run(tmp_path):
    steps = {"training_tokens": 64 * 20, "n_batches_in_buffer": 16}
    source = Source(50, 1_000, None)
    with pytest.raises(DataLostError, match="ended after 50 rows, and says that it has 60"):
        train(config(tmp_path, **steps), source.streamed(num_examples=60))
    some = source.streamed(num_examples=60).take(40)
    train(config(tmp_path / "some", **steps), some)  # rows left out on purpose
    with pytest.raises(DataLostError, match="ended after 60 rows, and after 50 when it was read before"):
        train(config(tmp_path / "other", **(steps | {"training_tokens": 64 * 60})), Source(50, 2, None).streamed())


def test_the_command_says_how_to_go_on(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = [Source(30, 1_000, ConnectionResetError("peer")), Source(0, 0, None)]
    monkeypatch.setattr(training, "training_data", lambda *_, **__: sources[0].streamed())
    where = [
        "--model_name",
        str(shared / "model"),
        "--dataset_path",
        "user/streamed",
        "--hook_name",
        "blocks.0.hook_resid_post",
    ]
    argv = ["train", *SIZES, "--k", "4", *where, "--output_path", "out"]
    assert main(argv) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the data set broke off after 30 rows" in told
    command = told.partition("to go on: ")[2]
    sources.pop(0)
    assert main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "out").is_dir()
