"""What a converted SAE computes, against a plain forward pass of each format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import random_activations
from checkpoint_writers import (
    author_forward,
    strongest,
    topk_in_training,
    write_author,
    write_dictionary_learning,
    write_sparsify,
    write_statistics,
)
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from torch import Tensor

from sae_nfm.convert.dictionary_learning import dictionary_learning_loader
from sae_nfm.convert.run import ConvertConfig, convert
from sae_nfm.convert.sparsify import sparsify_loader

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
"""Sums of a few dozen products of numbers up to 10, in float32 against float64: 1e-6 was measured."""


def converted(source: Path, **options: Any) -> SAE[Any]:
    output = source.parent / "converted"
    convert(ConvertConfig(source=source, output=output, **options))
    return SAE.load_from_disk(output)


@torch.no_grad()
def assert_computes(sae: SAE[Any], x: Tensor, features: Tensor, reconstruction: Tensor, **tolerance: float) -> None:
    found = sae.encode(x)
    torch.testing.assert_close(found.double(), features, **(FLOAT32 | tolerance))
    assert torch.equal(found > 0, features > 0)
    torch.testing.assert_close(sae(x).double(), reconstruction, **(FLOAT32 | tolerance))


def test_an_author_checkpoint_has_the_value_computed_by_hand(tmp_path: Path) -> None:
    path, tensors = write_author(tmp_path, d_in=1, d_sae=2, nfm_dim=1)
    values = (
        [[2.0], [1.0]],
        [0.0, 1.0],
        [[1.0, 0.5]],
        [[1.0], [3.0]],
        [[0.1, 0.2]],
        [0.3],
        [[0.5]],
        [1.0],
        [[0.1]],
        [-0.2],
    )
    torch.save({name: torch.tensor(value) for name, value in zip(tensors, values, strict=True)}, path)
    (tmp_path / "s.json").write_text('{"mean": [3.0], "std": [2.0]}')
    sae = converted(path, statistics=tmp_path / "s.json", k=2, nfm_top_k=2)
    # y = (5 - 3) / 2 = 1, f = (2, 2); direct 2 + 1; linear 0.2 + 0.4 + 0.3; z = 2 * 2 * 3 = 12, h = 7, interaction 0.7 - 0.2
    assert sae.encode(torch.tensor([[5.0]])).tolist() == [[2.0, 2.0]]
    assert sae(torch.tensor([[5.0]])).item() == pytest.approx((3 + 0.9 + 0.5) * 2 + 3)


@pytest.mark.parametrize(
    ("d_in", "d_sae", "nfm_dim", "k", "nfm_top_k"),
    [(5, 11, 3, 4, 2), (7, 9, 1, 1, 1), (1, 3, 2, 2, 1), (16, 33, 6, 33, 33), (6, 2, 5, 2, 1)],
)
def test_an_author_checkpoint_far_from_zero(
    tmp_path: Path, d_in: int, d_sae: int, nfm_dim: int, k: int, nfm_top_k: int
) -> None:
    path, tensors = write_author(tmp_path, d_in=d_in, d_sae=d_sae, nfm_dim=nfm_dim)
    statistics, mean, std = write_statistics(tmp_path, d_in)
    x = (random_activations(40, d_in) * std + mean).float()
    sae = converted(path, statistics=statistics, k=k, nfm_top_k=nfm_top_k)
    features, reconstruction = author_forward(tensors, x, mean, std, k, nfm_top_k)
    # x itself is rounded to float32, at 30 std with a step of 2e-6 std, b_dec likewise
    assert_computes(sae, x, features, reconstruction, atol=2e-4)
    assert sae.cfg.nfm_top_k == (None if nfm_top_k == k else nfm_top_k)


def test_the_standardisation_is_folded_as_a_whitening(tmp_path: Path) -> None:
    path, _ = write_author(tmp_path)
    statistics, mean, std = write_statistics(tmp_path)
    found = converted(path, statistics=statistics, k=4, nfm_top_k=2)
    (tmp_path / "none.json").write_text(json.dumps({"mean": [0.0] * 5, "std": [1.0] * 5}))
    oracle = converted(path, statistics=tmp_path / "none.json", k=4, nfm_top_k=2)
    oracle.fold_activation_whitening(mean, torch.diag(1 / std), torch.diag(std))
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in oracle.state_dict().items())


@pytest.mark.parametrize("form", ["npz", "safetensors", "with a dimension of size 1"])
def test_statistics_in_every_form_are_the_same(tmp_path: Path, form: str) -> None:
    path, _ = write_author(tmp_path)
    statistics, mean, std = write_statistics(tmp_path)
    wanted = converted(path, statistics=statistics, k=4, nfm_top_k=2).state_dict()
    other = tmp_path / ("other.npz" if form == "npz" else "other.safetensors")
    if form == "npz":
        np.savez(other, mean=mean.numpy(), std=std.numpy())
    else:
        save_file({"mean": mean[None] if form.startswith("with") else mean, "std": std}, other)
    found = converted(path, statistics=other, k=4, nfm_top_k=2).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_half_precision_author_checkpoint_is_folded_in_float32(tmp_path: Path) -> None:
    path, tensors = write_author(tmp_path)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    torch.save({"step": 10, "model_state": halves, "best_loss": 0.1}, path)  # as the training script's checkpoints
    statistics, mean, std = write_statistics(tmp_path)
    x = (random_activations(40, 5) * std + mean).float()
    sae = converted(path, statistics=statistics, k=4, nfm_top_k=2)
    assert sae.W_dec.dtype == torch.float32
    assert_computes(sae, x, *author_forward(halves, x, mean, std, 4, 2), atol=2e-4)


@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(5, 11, 3), (3, 7, 1), (4, 4, 4)])
@pytest.mark.parametrize("to", ["auto", "joint_nfm"])
def test_dictionary_learning_topk(tmp_path: Path, d_in: int, d_sae: int, k: int, to: Any) -> None:
    w = {name: t.double() for name, t in write_dictionary_learning(tmp_path / "a", d_in=d_in, d_sae=d_sae, k=k).items()}
    sae, x = converted(tmp_path / "a", to=to), random_activations(40, d_in)
    features = strongest(((x.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu(), k)
    assert_computes(sae, x, features, features @ w["decoder.weight"].T + w["b_dec"])
    assert sae.cfg.architecture() == ("topk" if to == "auto" else "joint_nfm")
    told = {name: sae.cfg.metadata[name] for name in ("model_name", "hook_name", "context_size", "converted_from")}
    assert told == {
        "model_name": "EleutherAI/pythia-70m",
        "hook_name": "blocks.8.hook_resid_post",
        "context_size": 128,
        "converted_from": "dictionary_learning: a",
    }


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("to", ["auto", "joint_nfm"])
def test_a_batch_topk_becomes_its_threshold(tmp_path: Path, dict_class: str, to: Any) -> None:
    w = {name: tensor.double() for name, tensor in write_dictionary_learning(tmp_path / "a", dict_class).items()}
    W_enc, W_dec = w.get("W_enc", w.get("encoder.weight", torch.empty(0, 0)).T), w.get("W_dec")
    W_dec = w["decoder.weight"].T if W_dec is None else W_dec
    sae, x = converted(tmp_path / "a", to=to), random_activations(40, 5)
    acts = ((x.double() - w["b_dec"]) @ W_enc + w.get("b_enc", w.get("encoder.bias"))).relu()
    features = acts * (acts > 0.4)
    assert 0 < (features > 0).sum() < (acts > 0).sum()  # the threshold decides something
    assert sae.cfg.architecture() == ("jumprelu" if to == "auto" else "joint_nfm")
    assert_computes(sae, x, features, features @ W_dec + w["b_dec"])


def test_older_topk_files_without_k_and_threshold_and_files_of_checkpoints(tmp_path: Path) -> None:
    tensors = write_dictionary_learning(tmp_path / "a")
    plain = SAE.load_from_disk(tmp_path / "a", converter=dictionary_learning_loader).state_dict()
    (tmp_path / "a" / "checkpoints").mkdir()
    file = tmp_path / "a" / "checkpoints" / "ae_100.pt"
    torch.save({name: tensor for name, tensor in tensors.items() if name not in ("k", "threshold")}, file)
    found = converted(file).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("d_in", "d_sae", "config"),
    [
        (5, 11, {}),
        (5, 11, {"k": 1, "normalize_decoder": False}),
        (3, 6, {"num_latents": 0, "expansion_factor": 2, "multi_topk": True}),
    ],
)
@pytest.mark.parametrize("to", ["auto", "joint_nfm"])
def test_sparsify_topk(tmp_path: Path, d_in: int, d_sae: int, config: dict[str, Any], to: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"model": "EleutherAI/pythia-160m", "ctx_len": 2048, "dataset": "some/text"}'
    )
    folder = tmp_path / "layers.5"
    w = {name: t.double() for name, t in write_sparsify(folder, d_in=d_in, d_sae=d_sae, **config).items()}
    sae, x = converted(folder, to=to), random_activations(40, d_in)
    acts = ((x.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    features = strongest(acts, config.get("k", 3))
    assert_computes(sae, x, features, features @ w["W_dec"] + w["b_dec"])
    assert sae.cfg.metadata.hook_name == "blocks.5.hook_resid_post"
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.context_size) == ("EleutherAI/pythia-160m", 2048)


@pytest.mark.parametrize(
    ("name", "hook_name"), [("h.3", "blocks.3.hook_resid_post"), ("embed_tokens", "hook_embed"), ("layers.3.mlp", None)]
)
def test_a_sparsify_hook_point_is_named_where_it_is_known(tmp_path: Path, name: str, hook_name: str | None) -> None:
    write_sparsify(tmp_path / name)
    config, _ = sparsify_loader(tmp_path / name)
    assert config["metadata"].get("hook_name") == hook_name


def test_half_precision_weights_stay_as_they_are(tmp_path: Path) -> None:
    tensors = write_sparsify(tmp_path / "layers.1", dtype=torch.bfloat16)
    sae = converted(tmp_path / "layers.1")
    assert sae.W_dec.dtype == torch.bfloat16
    assert torch.equal(sae.W_dec, tensors["W_dec"])


@pytest.mark.parametrize(
    "fields", [{}, {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}, {"k": 1}]
)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["finished", "checkpoint"])
def test_a_saelens_topk_keeps_every_bit(tmp_path: Path, kind: str, normalize: Any, fields: dict[str, Any]) -> None:
    topk = topk_in_training(normalize_activations=normalize, **fields)
    _ = topk.save_inference_model(tmp_path / "a") if kind == "finished" else topk.save_model(tmp_path / "a")
    wanted, found = SAE.load_from_disk(tmp_path / "a"), converted(tmp_path / "a", nfm_dim=4)
    x = random_activations(40, 5)
    assert torch.equal(found.encode(x), wanted.encode(x))
    assert torch.equal(found(x), wanted(x))
    assert found.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    assert found.cfg.metadata.training_architecture is None


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_a_checkpoint_takes_raw_activations(tmp_path: Path, normalize: Any) -> None:
    topk, x, scaler = topk_in_training(normalize_activations=normalize), random_activations(200, 5), ActivationScaler()
    batches = iter(lambda: x, None)
    if normalize == "covariance_whitening":
        scaler.estimate_whitening(5, batches, 2)
    else:
        scaler.estimate_scaling_factor(5, batches, 2)
    topk.save_model(tmp_path / "a")
    scaler.save(str(tmp_path / "a" / "activation_scaler.json"))
    found = converted(tmp_path / "a")
    # the trainer's way: scale the inputs, undo it on the outputs; the fold multiplies the weights instead
    torch.testing.assert_close(found(x), scaler.unscale(topk(scaler.scale(x))), rtol=1e-5, atol=1e-5)
    assert found.cfg.normalize_activations == "none"


def test_the_added_nfm_writes_zero_and_can_learn(tmp_path: Path) -> None:
    topk_in_training().save_model(tmp_path / "a")
    sae = converted(tmp_path / "a", nfm_dim=4, nfm_top_k=2, seed=3)
    paths = sae.decode_paths(sae.encode(random_activations(40, 5)))
    assert not paths.linear.any()
    assert not paths.interaction.any()
    assert sae.V.std().item() == pytest.approx(0.05, rel=0.5)  # 44 draws
    training = TrainingSAE.load_from_disk(tmp_path / "converted")
    step = TrainStepInput(random_activations(40, 5), {}, None, n_training_steps=0, is_logging_step=False)
    training.training_forward_pass(step).loss.backward()
    gradients = {name: bool(p.grad is not None and p.grad.any()) for name, p in training.named_parameters()}
    assert {name for name, has in gradients.items() if not has} == {"V", "W_1", "b_1"}  # behind W_2 = 0, for one step
    torch.optim.SGD(training.parameters(), lr=0.1).step()
    training.training_forward_pass(step).loss.backward()
    assert all(bool(p.grad is not None and p.grad.any()) for p in (training.V, training.W_1, training.b_1))
    convert(ConvertConfig(source=tmp_path / "a", output=tmp_path / "b", nfm_dim=4, nfm_top_k=2, seed=4))
    assert not torch.equal(SAE.load_from_disk(tmp_path / "b").V, sae.V)
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["architecture"] == "joint_nfm"
