"""An interrupted run, resumed, ends with the same bits as one that was not."""

import copy
import functools
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from builders import ARCHITECTURES, runner_config, tiny_model, token_dataset, training_config
from datasets import Dataset
from sae_lens import (
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import WhitespaceSplit

from sae_nfm import record_training
from sae_nfm.training.activation_stream import ActivationStream
from sae_nfm.training.results import read_training_record
from sae_nfm.training.resume import STREAM_STATE_FILENAME, checkpoint_folder, exact_resume

STEPS, STOP_AFTER = 10, 4
for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def shared_model():
    """Reads texts word by word."""
    model = tiny_model()
    model.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return model


def language_model(cfg):
    """A thread that prefetches can be at work with its model a little longer than the run: that one is its own."""
    return shared_model.__wrapped__() if cfg.prefetch_llm_batches else shared_model()


@functools.cache
def documents() -> Dataset:
    """Texts of very unequal length: sequences begin within documents, and the data lasts for less than a run."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 70, 1, 25, 200, 9] * 4
    words = (" ".join(f"t{i}" for i in torch.randint(1, 50, (n,), generator=generator)) for n in lengths)
    return Dataset.from_dict({"text": list(words)})


def make_runner(cfg, dataset=None, seed=0):
    with temporary_seed(seed):
        return LanguageModelSAETrainingRunner(
            copy.deepcopy(cfg), override_dataset=dataset or documents(), override_model=language_model(cfg)
        )


def run(runner, seed=1):
    with temporary_seed(seed):
        return runner.run()


def stop_after(runner, steps, number=signal.SIGTERM):
    """Send the process a signal in the middle of a step, once `steps` are behind."""
    sae, done = runner.sae, itertools.count()
    forward = sae.training_forward_pass

    def forward_then_signal(step_input):
        if next(done) == steps:
            os.kill(os.getpid(), number)
        return forward(step_input)

    sae.training_forward_pass = forward_then_signal
    with pytest.raises(InterruptedException):
        run(runner)


def weights(folder):
    return load_file(Path(folder) / "sae_weights.safetensors")


def assert_same_bits(one, other):
    assert weights(one).keys() == weights(other).keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
    assert torch.equal(*(load_file(Path(f) / "sparsity.safetensors")["sparsity"] for f in (one, other)))


def test_texts_are_read_word_by_word_and_run_out():
    """Else the tests with texts say little."""
    lengths = [shared_model().to_tokens(text).shape[1] for text in documents()["text"]]
    assert len(set(lengths)) > 4
    assert sum(lengths) < STEPS * 64


def interrupted_and_resumed(tmp_path, sae_cfg, dataset=None, **settings):
    """Folders of a run left alone and of one stopped and resumed, which begins anew in another random state."""
    settings |= {"checkpoint_path": str(tmp_path / "checkpoints")}
    whole = runner_config(sae_cfg, tmp_path / "whole", steps=STEPS, **settings)
    run(make_runner(whole, dataset))
    stopped = runner_config(sae_cfg, tmp_path / "resumed", steps=STEPS, **settings)
    stop_after(make_runner(stopped, dataset), STOP_AFTER)
    (checkpoint,) = Path(stopped.checkpoint_path).iterdir()
    assert checkpoint.name == str(64 * (STOP_AFTER + 1))  # the step that the signal met was finished
    again = runner_config(
        sae_cfg, tmp_path / "resumed", steps=STEPS, **settings, resume_from_checkpoint=str(checkpoint)
    )
    run(make_runner(again, dataset, seed=7), seed=8)
    return tmp_path / "whole", tmp_path / "resumed"


@for_every_architecture
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize_activations": "expected_average_only_in", "nfm_dropout": 0.2},
        {"normalize_activations": "covariance_whitening", "use_sparse_activations": True},
    ],
    ids=["plain", "scaled with dropout", "whitened, sparse"],
)
def test_same_bits_after_sigterm(tmp_path, architecture, settings):
    assert_same_bits(*interrupted_and_resumed(tmp_path, training_config(architecture, **settings)))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("joint_nfm", {"prefetch_llm_batches": 2}),
        ("joint_nfm", {"autocast": True}),
        ("sequential_nfm", {"autocast": True}),
        (
            "sequential_nfm",
            {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 3, "lr_decay_steps": 3},
        ),
        (
            "joint_nfm",
            {"seqpos_slice": (1, None), "exclude_special_tokens": True, "activations_mixing_fraction": 0.9},
        ),
        ("joint_nfm", {"dead_feature_window": 2, "feature_sampling_window": 4, "train_batch_size_tokens": 64}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_same_bits_whatever_the_runner_does(tmp_path, architecture, settings):
    sae_cfg = training_config(architecture, normalize_activations="expected_average_only_in", nfm_dropout=0.2)
    assert_same_bits(*interrupted_and_resumed(tmp_path, sae_cfg, **settings))


@for_every_architecture
def test_same_bits_on_tokens(tmp_path, architecture):
    assert_same_bits(*interrupted_and_resumed(tmp_path, training_config(architecture), dataset=token_dataset(20)))


@for_every_architecture
def test_same_bits_from_a_checkpoint_made_on_the_way(tmp_path, architecture):
    cfg = runner_config(
        training_config(architecture),
        tmp_path / "whole",
        steps=STEPS,
        n_checkpoints=3,
        feature_sampling_window=4,
        checkpoint_path=str(tmp_path / "checkpoints"),
    )
    run(make_runner(cfg))
    folders = sorted(Path(cfg.checkpoint_path).iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) == 3
    for folder in folders:
        again = copy.deepcopy(cfg)
        again.resume_from_checkpoint, again.output_path = str(folder), str(tmp_path / folder.name)
        again.checkpoint_path = str(tmp_path / "later" / folder.name)
        run(make_runner(again, seed=5), seed=6)
        assert_same_bits(tmp_path / "whole", tmp_path / folder.name)
        # only the checkpoints that lay ahead are written
        later = {path.name for path in Path(again.checkpoint_path).glob("*")}
        assert later == {path.name for path in folders if int(path.name) > int(folder.name)}


def test_any_architecture_can_have_exact_checkpoints(tmp_path):
    cfg = runner_config(
        StandardTrainingSAEConfig(d_in=16, d_sae=32, metadata=training_config("joint_nfm").metadata),
        tmp_path / "whole",
        steps=STEPS,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
    )
    runner = make_runner(cfg)
    exact_resume(runner)
    run(runner)
    again = copy.deepcopy(cfg)
    again.resume_from_checkpoint, again.output_path = cfg.checkpoint_path, str(tmp_path / "resumed")
    runner = make_runner(again, seed=5)
    exact_resume(runner)
    run(runner, seed=6)
    assert_same_bits(tmp_path / "whole", tmp_path / "resumed")


def test_other_architectures_are_left_alone(tmp_path):
    cfg = runner_config(
        TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, metadata=training_config("joint_nfm").metadata),
        tmp_path / "out",
        steps=STEPS,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
    )
    run(make_runner(cfg))
    (checkpoint,) = Path(cfg.checkpoint_path).iterdir()
    assert not (checkpoint / STREAM_STATE_FILENAME).exists()


def multi_config(tmp_path, name, **overrides):
    hooks = {"a": "blocks.0.hook_resid_post", "b": "blocks.0.hook_resid_post", "z": "blocks.0.attn.hook_z"}
    saes = {
        "a": training_config("joint_nfm", normalize_activations="expected_average_only_in"),
        "b": TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4),
        "z": training_config("joint_nfm", hook_name=hooks["z"]),
    }
    settings = {
        "model_name": "tiny",
        "context_size": 16,
        "training_tokens": STEPS * 64,
        "train_batch_size_tokens": 64,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 3,
        "lr": 1e-2,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_checkpoints": 1,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "output_path": str(tmp_path / name),
    }
    return MultiSAETrainingRunnerConfig(saes=saes, hook_names=hooks, **(settings | overrides))


@pytest.mark.parametrize("prefetch", [False, 2])
def test_several_saes_on_one_stream(tmp_path, prefetch):
    def train(cfg, seed):
        with temporary_seed(seed):
            MultiSAETrainingRunner(cfg, override_dataset=documents(), override_model=language_model(cfg)).run()

    whole = multi_config(tmp_path, "whole", prefetch_llm_batches=prefetch)
    train(whole, seed=0)
    again = multi_config(
        tmp_path, "resumed", prefetch_llm_batches=prefetch, resume_from_checkpoint=whole.checkpoint_path
    )
    train(again, seed=1)
    for name in whole.saes:
        assert_same_bits(tmp_path / "whole" / name, tmp_path / "resumed" / name)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch", [16, 24, 64])
def test_stream_serves_what_saelens_serves(tmp_path, fraction, batch):
    cfg = runner_config(
        training_config("joint_nfm"),
        tmp_path,
        steps=1,
        activations_mixing_fraction=fraction,
        train_batch_size_tokens=batch,
        n_batches_in_buffer=6,
        store_batch_size_prompts=5,
    )
    stores = [make_runner(cfg).activations_store for _ in range(2)]
    served = []
    for store, make in zip(stores, (ActivationStream, iter), strict=True):
        with temporary_seed(0):
            served.append([batch.clone() for batch in itertools.islice(make(store), 25)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*served, strict=True))
    assert stores[0].n_dataset_processed == stores[1].n_dataset_processed


def test_record_goes_on_where_the_checkpoint_was_made(tmp_path):
    cfg = runner_config(
        training_config("joint_nfm"), tmp_path / "out", steps=STEPS, checkpoint_path=str(tmp_path / "checkpoints")
    )
    whole = make_runner(cfg)
    with record_training(whole, tmp_path / "whole.jsonl", every=1):
        run(whole)
    stopped = make_runner(cfg)
    with pytest.raises(InterruptedException), record_training(stopped, tmp_path / "record.jsonl", every=1):
        sae, forward, done = stopped.sae, stopped.sae.training_forward_pass, itertools.count()

        def forward_then_signal(step_input):
            if next(done) == STOP_AFTER:
                os.kill(os.getpid(), signal.SIGINT)
            return forward(step_input)

        sae.training_forward_pass = forward_then_signal
        run(stopped)
    again = copy.deepcopy(cfg)
    again.resume_from_checkpoint = cfg.checkpoint_path
    resumed = make_runner(again)
    with record_training(resumed, tmp_path / "record.jsonl", every=1):
        run(resumed)

    def without_time(path):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read_training_record(path)]

    assert without_time(tmp_path / "record.jsonl") == without_time(tmp_path / "whole.jsonl")
    seconds = [line["seconds"] for line in read_training_record(tmp_path / "record.jsonl")]
    assert seconds == sorted(seconds)


def finished_run(folder, normalize_activations="none", **settings):
    cfg = runner_config(
        training_config("joint_nfm", normalize_activations=normalize_activations),
        folder / "out",
        steps=STEPS,
        n_checkpoints=1,
        checkpoint_path=str(folder / "checkpoints"),
        **settings,
    )
    run(make_runner(cfg))
    return cfg


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config of a run with a checkpoint on the way."""
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of the run's checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint_folder(finished.checkpoint_path), tmp_path / "checkpoint"))


def resume(cfg, folder, tmp_path, dataset=None):
    again = copy.deepcopy(cfg)
    again.resume_from_checkpoint, again.output_path = str(folder), str(tmp_path / "resumed")
    again.checkpoint_path = str(tmp_path / "later")
    return run(make_runner(again, dataset))


def test_a_checkpoint_of_saelens_alone_resumes_with_a_warning(finished, checkpoint, tmp_path):
    (checkpoint / STREAM_STATE_FILENAME).unlink()
    with pytest.warns(UserWarning, match=rf"{re.escape(str(checkpoint))}.*{STREAM_STATE_FILENAME}.*not exactly"):
        resume(finished, checkpoint, tmp_path)
    # what the other tests compare is no constant: another buffer, other weights
    assert not torch.equal(weights(finished.output_path)["V"], weights(tmp_path / "resumed")["V"])


def test_no_checkpoint_there(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere'.*\bcheckpoint\b"):
        resume(finished, tmp_path / "nowhere", tmp_path)


def test_damaged_state(finished, checkpoint, tmp_path):
    path = checkpoint / STREAM_STATE_FILENAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is damaged .*another checkpoint"):
        resume(finished, checkpoint, tmp_path)


@pytest.mark.parametrize("dataset", [token_dataset(20), documents().select([0])], ids=["other", "shorter"])
def test_another_data_set(finished, checkpoint, tmp_path, dataset):
    with pytest.raises(ValueError, match=r"sequence \d+ of the data set"):
        resume(finished, checkpoint, tmp_path, dataset)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, InterruptedException])
def test_an_interrupt_from_within_a_step_keeps_what_saelens_keeps(tmp_path, exception):
    cfg = runner_config(
        training_config("joint_nfm"), tmp_path / "out", steps=STEPS, checkpoint_path=str(tmp_path / "checkpoints")
    )
    runner, done = make_runner(cfg), itertools.count()
    forward = runner.sae.training_forward_pass

    def interrupted_forward(step_input):
        if next(done) == STOP_AFTER:
            raise exception
        return forward(step_input)

    runner.sae.training_forward_pass = interrupted_forward
    with pytest.raises(exception):
        run(runner)
    folder = checkpoint_folder(cfg.checkpoint_path)
    assert not (folder / STREAM_STATE_FILENAME).exists()  # the step was begun: there is no exact place to resume from
    with pytest.warns(UserWarning, match=rf"{re.escape(str(folder))}.*{STREAM_STATE_FILENAME}.*not exactly"):
        resume(cfg, folder, tmp_path)


@pytest.mark.parametrize("normalisation", ["none", "expected_average_only_in", "covariance_whitening"])
def test_a_finished_run_resumed_is_the_finished_run(tmp_path, normalisation):
    cfg = finished_run(tmp_path, normalize_activations=normalisation, save_final_checkpoint=True)
    final = checkpoint_folder(cfg.checkpoint_path)
    assert final.name == f"final_{STEPS * 64}"
    resume(cfg, final, tmp_path)
    assert_same_bits(tmp_path / "out", tmp_path / "resumed")


def test_a_run_without_checkpoints_stops_and_leaves_nothing(tmp_path):
    cfg = runner_config(training_config("joint_nfm"), tmp_path / "out", steps=STEPS)
    handlers = signal.getsignal(signal.SIGTERM)
    stop_after(make_runner(cfg), STOP_AFTER)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handlers


def test_the_newest_of_several_checkpoints(tmp_path):
    for name in ("a/128", "a/1024", "b/final_512", "b/2048.partial"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "runner_cfg.json").write_text(json.dumps({}))
    assert checkpoint_folder(tmp_path) == tmp_path / "a" / "1024"
    assert checkpoint_folder(tmp_path / "b") == tmp_path / "b" / "final_512"
    assert checkpoint_folder(tmp_path / "a" / "128") == tmp_path / "a" / "128"


def test_mixing_buffer_of_the_host_is_the_one_we_follow():
    """SAELens's generator on plain numbers, so that a change of its rule shows here first."""
    loader = (torch.arange(i * 10.0, i * 10.0 + 10)[:, None] for i in itertools.count())
    batches = [b.flatten().tolist() for b in itertools.islice(mixing_buffer(20, 4, loader, 0.0), 5)]
    assert batches == [[4.0 * i + j for j in range(4)] for i in range(5)]
