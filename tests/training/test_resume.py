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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import WhitespaceSplit

from sae_nfm import record_training
from sae_nfm.common.files import DIGESTS_FILENAME
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
    "settings",
    [
        {"encoder": "batchtopk", "k": 3.5},
        {"encoder": "jumprelu", "k": None, "jumprelu_bandwidth": 1.0, "l0_warm_up_steps": 9},
    ],
    ids=lambda settings: settings["encoder"],
)
def test_same_thresholds_after_sigterm(tmp_path, settings):
    """Of batchtopk the number that follows each batch, of jumprelu the parameters and their coefficient on its way up."""
    sae_cfg = training_config("joint_nfm", normalize_activations="expected_average_only_in", **settings)
    whole, resumed = interrupted_and_resumed(tmp_path, sae_cfg)
    assert_same_bits(whole, resumed)
    assert (weights(whole)["threshold"] > 0).all()


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
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.? is damaged "):
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


def test_a_checkpoint_of_0_1_0_is_resumed(finished, checkpoint, tmp_path):
    """It says less of the data and the model than today's."""
    path = checkpoint / STREAM_STATE_FILENAME
    with safe_open(path, framework="pt") as file:
        counters = json.loads(file.metadata()["counters"])
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "model_sample"}
    fewer = {name: counters[name] for name in ("epoch", "sequences", "rows", "cached_row", "steps_done")}
    save_file(tensors, path, metadata={"counters": json.dumps(fewer)})
    (checkpoint / DIGESTS_FILENAME).unlink()
    assert len(counters) == len(fewer) + 3
    resume(finished, checkpoint, tmp_path)
    assert_same_bits(finished.output_path, tmp_path / "resumed")


def changed(cfg, **changes):
    again = copy.deepcopy(cfg)
    for name, value in changes.items():
        target = again.sae if name in again.sae.__dataclass_fields__ and name != "device" else again
        setattr(target, name, value)
    return again


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 5e-3),
        ("lr_end", 1.0),
        ("seed", 7),
        ("adam_beta1", 0.8),
        ("lr_decay_steps", 2),
        ("lr_scheduler_name", "cosineannealing"),
        ("train_batch_size_tokens", 32),
        ("n_batches_in_buffer", 16),
        ("activations_mixing_fraction", 0.25),
        ("exclude_special_tokens", True),
        ("training_tokens", STEPS * 32),
        ("prefetch_llm_batches", 1),
        ("autocast", True),
        ("dead_feature_window", 3),
        ("hook_name", "blocks.1.hook_resid_post"),
        ("dataset_path", "elsewhere"),
        ("k", 3),
        ("nfm_top_k", 2),
        ("nfm_dropout", 0.5),
        ("normalize_activations", "layer_norm"),
        ("aux_loss_coefficient", 0.5),
        ("kernel", "sparse"),
    ],
)
def test_a_run_with_another_setting_is_refused(name, value, finished, checkpoint, tmp_path):
    if name in ("lr", "k"):  # also where SAELens alone has made the checkpoint
        (checkpoint / STREAM_STATE_FILENAME).unlink()
    was = getattr(finished.sae if name in finished.sae.__dataclass_fields__ else finished, name)
    checkpoint = checkpoint.rename(checkpoint.with_name("384"))
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}, and {re.escape(repr(was))} in .*384"):
        resume(changed(finished, **{name: value}), checkpoint, tmp_path)
    with pytest.raises(ValueError, match=rf"none of the 1 .*384 \(384 tokens, .*\) has {name} "):
        resume(changed(finished, **{name: value}), tmp_path, tmp_path)
    assert not (tmp_path / "resumed").exists()


def test_another_architecture_is_refused(finished, checkpoint, tmp_path):
    other = copy.deepcopy(finished)
    other.sae = TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, metadata=copy.deepcopy(finished.sae.metadata))
    other.resume_from_checkpoint = str(checkpoint)
    with pytest.raises(ValueError, match="architecture is 'topk', and 'joint_nfm' in"):
        exact_resume(make_runner(other))


def test_what_may_change(finished, checkpoint, tmp_path):
    again = changed(finished, n_checkpoints=0, verbose=False, save_final_checkpoint=True, n_eval_batches=3)
    again.logger = LoggingConfig(log_to_wandb=False, run_name="another", wandb_log_frequency=3)
    resume(again, checkpoint, tmp_path)
    assert_same_bits(finished.output_path, tmp_path / "resumed")


def test_more_tokens_at_a_constant_rate_are_one_longer_run(finished, checkpoint, tmp_path):
    longer = changed(finished, training_tokens=(STEPS + 4) * 64, n_checkpoints=0)
    resume(longer, checkpoint, tmp_path)
    longer.output_path, longer.checkpoint_path = str(tmp_path / "whole"), None
    run(make_runner(longer))
    assert_same_bits(tmp_path / "whole", tmp_path / "resumed")


def test_a_finished_run_whose_normalisation_is_folded_does_not_go_on(tmp_path):
    cfg = finished_run(tmp_path, normalize_activations="expected_average_only_in", save_final_checkpoint=True)
    with pytest.raises(ValueError, match=f"training_tokens is {STEPS * 128}, and {STEPS * 64} in .*final_{STEPS * 64}"):
        resume(changed(cfg, training_tokens=STEPS * 128), Path(cfg.checkpoint_path) / f"final_{STEPS * 64}", tmp_path)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Configs of two runs, at two rates, whose checkpoints lie in one folder; the other one's has more tokens."""
    folder = tmp_path_factory.mktemp("several")
    cfgs = []
    for rate, steps in ((1e-2, STEPS), (1e-3, 2 * STEPS)):
        cfg = runner_config(
            training_config("joint_nfm"),
            folder / f"{rate}",
            steps=steps,
            n_checkpoints=1,
            lr=rate,
            checkpoint_path=str(folder / "checkpoints"),
            logger=LoggingConfig(log_to_wandb=False, wandb_id=f"rate-{rate}"),
        )
        run(make_runner(cfg))
        cfgs.append(cfg)
    return folder / "checkpoints", cfgs


def test_each_run_goes_on_from_its_own_checkpoint(several, tmp_path):
    folder, cfgs = several
    for cfg in cfgs:
        run_again = changed(cfg, resume_from_checkpoint=str(folder), output_path=str(tmp_path / f"{cfg.lr}"))
        run_again.checkpoint_path = str(tmp_path / "later")
        runner = make_runner(run_again, seed=5)
        run(runner, seed=6)
        assert Path(runner.cfg.resume_from_checkpoint).parent == Path(cfg.checkpoint_path)
        assert_same_bits(cfg.output_path, tmp_path / f"{cfg.lr}")


def test_no_run_and_several_runs_with_these_settings_are_listed(several, tmp_path):
    folder, (cfg, other) = several
    message = (
        r"none of the 2 .*rate-0.001/704 .* has training_tokens 1280, this run 640; .*rate-0.01/384 .* has lr 0.01"
    )
    with pytest.raises(ValueError, match=message):
        resume(changed(cfg, lr=0.5), folder, tmp_path)
    shutil.copytree(folder, tmp_path / "copied")
    shutil.copytree(cfg.checkpoint_path, tmp_path / "copied" / "twin")
    with pytest.raises(
        ValueError, match=r"2 runs with these settings: .*rate-0.01/384 \(384 .*twin/384 \(384 .*name one"
    ):
        resume(cfg, tmp_path / "copied", tmp_path)
    resume(other, tmp_path / "copied", tmp_path)


def test_a_damaged_or_unfinished_checkpoint_among_others(several, tmp_path):
    folder, (cfg, other) = several
    copied = shutil.copytree(folder, tmp_path / "copied")
    damaged = copied / Path(other.checkpoint_path).name / "704"
    (damaged / "runner_cfg.json").write_text('{"lr": 1')
    resume(cfg, copied, tmp_path)
    with pytest.raises(
        ValueError, match=r"none of the 2 .*704 .* has a file that cannot be read: .*runner_cfg.json is damaged"
    ):
        resume(other, copied, tmp_path)
    unfinished = damaged.rename(damaged.with_name("705.partial"))
    with pytest.raises(ValueError, match=r"705\.partial was not written to its end"):
        resume(other, unfinished, tmp_path)


def test_a_run_that_was_interrupted_twice_is_one_run(tmp_path):
    """Each process has a folder of checkpoints of its own; the second one's say what they went on from."""
    settings = {"checkpoint_path": str(tmp_path / "checkpoints"), "steps": STEPS}
    whole = runner_config(training_config("joint_nfm"), tmp_path / "whole", **settings)
    run(make_runner(whole))
    stop_after(make_runner(runner_config(training_config("joint_nfm"), tmp_path / "parts", **settings)), 2)
    settings["resume_from_checkpoint"] = str(tmp_path / "checkpoints")
    stop_after(make_runner(runner_config(training_config("joint_nfm"), tmp_path / "parts", **settings)), 3)
    last = runner_config(training_config("joint_nfm"), tmp_path / "parts", **settings)
    run(make_runner(last, seed=5), seed=6)
    assert Path(last.checkpoint_path).parent == tmp_path / "checkpoints"
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_checkpoints_of_two_runs_do_not_come_to_lie_in_one_folder(several):
    _, (cfg, _) = several
    with pytest.raises(
        ValueError, match=r"rate-0.01 has the checkpoints of another run \(lr 0.01, this run 0.02\).*wandb_id"
    ):
        run(make_runner(changed(cfg, lr=0.02)))


def test_rows_that_come_later_in_the_data_are_compared(finished, checkpoint, tmp_path):
    """The text up to the checkpoint's place is the same, and what follows is not."""
    other = Dataset.from_dict({"text": [*documents()["text"][:-1], "t1 t2 t3"]})
    with pytest.raises(ValueError, match=r"after sequence \d+ of the data set there are other rows"):
        resume(finished, checkpoint, tmp_path, other)


def test_a_language_model_with_other_weights_is_refused(finished, checkpoint, tmp_path):
    again = changed(finished, resume_from_checkpoint=str(checkpoint))
    runner = make_runner(again)
    runner.model = shared_model.__wrapped__()
    with torch.no_grad():
        runner.model.blocks[0].mlp.W_in[0].add_(0.01)
    with pytest.raises(ValueError, match="weights of the language model 'tiny' are not those"):
        exact_resume(runner)


def test_the_same_base_elsewhere_is_the_same_base(tmp_path):
    cfg = runner_config(
        training_config("sequential_nfm"),
        tmp_path / "out",
        steps=STEPS,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "c"),
    )
    run(make_runner(cfg))
    again = copy.deepcopy(cfg)
    again.sae.base = str(shutil.copytree(cfg.sae.base, tmp_path / "moved"))
    resume(again, cfg.checkpoint_path, tmp_path)
    assert_same_bits(tmp_path / "out", tmp_path / "resumed")


def test_several_saes_are_compared_one_by_one(tmp_path):
    cfg = multi_config(tmp_path, "whole")
    MultiSAETrainingRunner(cfg, override_dataset=documents(), override_model=shared_model()).run()

    def refused(message, **overrides):
        again = multi_config(tmp_path, "resumed", resume_from_checkpoint=cfg.checkpoint_path)
        for name, change in overrides.items():
            change(getattr(again, name))
        runner = MultiSAETrainingRunner(again, override_dataset=documents(), override_model=shared_model())
        with pytest.raises(ValueError, match=message):
            exact_resume(runner)

    refused(r"saes\[b\]\.k 4, this run 2", saes=lambda saes: setattr(saes["b"], "k", 2))
    refused(r"saes \['a', 'b', 'z'\], this run \['a', 'z'\]", saes=lambda saes: saes.pop("b"), **_without_b())


def _without_b():
    """Everything else that names an SAE by its name."""
    names = ("hook_names", "_hook_names_per_sae", "_hook_head_indices_per_sae")
    return {name: lambda found: found.pop("b", None) for name in names}


def test_mixing_buffer_of_the_host_is_the_one_we_follow():
    """SAELens's generator on plain numbers, so that a change of its rule shows here first."""
    loader = (torch.arange(i * 10.0, i * 10.0 + 10)[:, None] for i in itertools.count())
    batches = [b.flatten().tolist() for b in itertools.islice(mixing_buffer(20, 4, loader, 0.0), 5)]
    assert batches == [[4.0 * i + j for j in range(4)] for i in range(5)]
