"""Small, seeded things that several test files build on: configs, SAEs, a language model, tokens."""

import atexit
import copy
import functools
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    SAETrainer,
    TopKSAE,
    TopKSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

import sae_nfm  # noqa: F401  (registers the architectures)
from sae_nfm.common.manifest import ManifestConfig, accept


def edited(path: Path, content: str | bytes) -> Path:
    """A file with other content, accepted as by `sae-nfm manifest`."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    accept(ManifestConfig(path=str(path)))
    return path


ARCHITECTURES = ("joint_nfm", "sequential_nfm")
"""Every architecture that the package registers."""
WITH_ENCODER = ("joint_nfm",)
"""Those that train an encoder, normalise their inputs and take part in SAELens's folds."""

HOOK, HOOK_Z = "blocks.0.hook_resid_post", "blocks.0.attn.hook_z"
D_MODEL, D_SAE, D_VOCAB, CONTEXT = 16, 32, 50, 16
NFM_READS = ("hook_nfm_linear_in", "hook_nfm_square_in", "hook_nfm_interaction_in")
NFM_HOOKS = (
    *NFM_READS,
    *("hook_nfm_linear", "hook_nfm_square", "hook_nfm_pooled", "hook_nfm_hidden_pre", "hook_nfm_interaction"),
)
"""The hook points of an SAE made from `training_config`, where every path is switched on."""


def covering_pairs(**axes: Sequence[Any]) -> list[Any]:
    """Rows for `pytest.mark.parametrize`: any two values of two axes meet in one of them. Always the same rows.

    `@pytest.mark.parametrize(("k", "scaled"), covering_pairs(k=(1, 4, 9), scaled=(True, False)))`
    """

    def label(name: str, value: Any) -> str:
        if isinstance(value, (str, torch.dtype)):
            return str(value).removeprefix("torch.")
        return f"{name}={getattr(value, '__name__', value)}".replace(" ", "")

    values = [list(axis) for axis in axes.values()]
    # positions are what AllPairs compares: values may be equal (True and 1) or have no order
    rows = list(AllPairs([list(range(len(axis))) for axis in values]))
    for (i, first), (j, second) in itertools.combinations(enumerate(values), 2):
        assert len({(row[i], row[j]) for row in rows}) == len(first) * len(second)
    chosen = [[axis[at] for axis, at in zip(values, row, strict=True)] for row in rows]
    return [pytest.param(*row, id="-".join(map(label, axes, row))) for row in chosen]


def training_config(architecture: str, hook_name: str = HOOK, **overrides: Any) -> TrainingSAEConfig:
    """A tiny training config with every path on; the NFM reads 3 of the 4 active features.

    A sequential one stands on a random TopK SAE; what it has no field for (d_sae, k, ...) is that SAE's. A normalisation by
    statistics of the data, which an SAE has folded into it when it becomes a base, is left out.
    """
    encoder = {"d_in": D_MODEL, "d_sae": D_SAE, "k": 4}
    if architecture == "sequential_nfm":
        of_base = [f.name for f in fields(TopKSAEConfig) if f.name not in ("metadata", "dtype", "device")]
        encoder |= {name: overrides.pop(name) for name in of_base if name in overrides}
        for name in ("use_sparse_activations", "aux_loss_coefficient"):  # of an encoder in training
            overrides.pop(name, None)
        if encoder.get("normalize_activations") in ("expected_average_only_in", "covariance_whitening"):
            del encoder["normalize_activations"]
        encoder = {"base": str(saved_base(hook_name, **encoder))}
    settings = encoder | {
        "nfm_dim": 8,
        "nfm_top_k": 3,
        "use_square_path": True,
        "square_scale": 2.0,
        "reshape_activations": "hook_z" if hook_name.endswith("hook_z") else "none",
        "metadata": SAEMetadata(model_name="tiny", hook_name=hook_name, context_size=CONTEXT, prepend_bos=True),
    }
    return get_sae_training_class(architecture)[1](**(settings | overrides))


@functools.cache
def saved_base(hook_name: str = HOOK, **fields: Any) -> Path:
    """The folder of a random TopK SAE, gone when the tests are."""
    heads = "hook_z" if hook_name.endswith("hook_z") else "none"
    metadata = SAEMetadata(model_name="tiny", hook_name=hook_name)
    base = TopKSAE(TopKSAEConfig(**({"reshape_activations": heads} | fields), metadata=metadata))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base.save_model(folder)
    return Path(folder)


def random_sae(cfg: TrainingSAEConfig, seed: int = 0) -> TrainingSAE[Any]:
    """The registered training SAE, every trained parameter random, so that no path and no bias is zero."""
    sae = get_sae_training_class(cfg.architecture())[0](copy.deepcopy(cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def inference_sae(cfg: TrainingSAEConfig, seed: int = 0) -> SAE[Any]:
    """The registered inference SAE with the parameters of `random_sae`."""
    sae = SAE.from_dict(cfg.get_inference_sae_cfg_dict())
    state_dict = random_sae(cfg, seed).state_dict()
    state_dict.pop("nfm_scale", None)  # only in training
    sae.load_state_dict(state_dict)
    return sae


def random_activations(rows: int = 24, d_in: int = D_MODEL, seed: int = 1) -> Tensor:
    """Activations [rows, d_in] with a mean, so that a bias or a centring left out shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d_in, generator=generator) + 0.5 * torch.randn(d_in, generator=generator)


def tiny_model(dtype: torch.dtype = torch.float32) -> HookedSAETransformer:
    """A random 2-layer transformer; token 0 is BOS, EOS and padding."""
    vocabulary = {"<bos>": 0} | {f"t{i}": i for i in range(1, D_VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<bos>")),
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<bos>",
        add_bos_token=True,  # else TransformerLens loads the tokenizer again, by its name
        name_or_path="tiny",
    )
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        n_heads=2,
        d_head=D_MODEL // 2,
        d_mlp=2 * D_MODEL,
        n_ctx=32,
        d_vocab=D_VOCAB,
        act_fn="gelu",
        seed=0,
        dtype=dtype,
        device="cpu",
    )
    with torch.random.fork_rng():
        return HookedSAETransformer(cfg, tokenizer, default_padding_side="right").eval()


def rows_of_tokens() -> Tensor:
    """Three rows: one without BOS, one with a BOS in its middle."""
    found = torch.randint(1, D_VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(3))
    found[:2, 0] = found[1, 7] = 0
    return found


def token_dataset(rows: int, context: int = CONTEXT, seed: int = 2) -> Dataset:
    """Random token rows in column `tokens`, each beginning with BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, D_VOCAB, (rows, context), generator=generator)
    tokens[:, 0] = 0
    return Dataset.from_dict({"tokens": tokens.tolist()})


def runner_config(
    sae_cfg: TrainingSAEConfig, folder: Path, *, steps: int, **overrides: Any
) -> LanguageModelSAERunnerConfig[Any]:
    """Training for `steps` batches of 64 tokens, the result in `folder`, nothing sent anywhere."""
    batch = 64
    settings = {
        "hook_name": sae_cfg.metadata.hook_name,
        "model_name": "tiny",
        "context_size": CONTEXT,
        "training_tokens": steps * batch,
        "train_batch_size_tokens": batch,
        "store_batch_size_prompts": 16,
        "n_batches_in_buffer": 32,
        "n_batches_for_norm_estimate": 4,
        "lr": 1e-2,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": str(folder),
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(sae=sae_cfg, **(settings | overrides))


def trainer(sae: TrainingSAE[Any], **overrides: Any) -> SAETrainer[Any, Any]:
    """SAELens's trainer on `random_activations`, in which a feature is dead once a step passes without it."""
    settings = {
        "total_training_samples": 24 * 4,
        "train_batch_size_samples": 24,
        "lr": 1e-3,
        "lr_end": 1e-3,
        "dead_feature_window": 0,
        "n_batches_for_norm_estimate": 4,
    }
    batches = (random_activations(seed=seed) for seed in itertools.count(10))
    return SAETrainer(SAETrainerConfig(**(settings | overrides)), sae, batches)
