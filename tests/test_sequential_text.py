"""An NFM on every kind of SAE, on real text: 200 steps by SAELens's runner, saved, loaded by a new process, spliced."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.util import temporary_seed

from sae_nfm import demo
from sae_nfm.loading import sha256_of
from sae_nfm.sequential_config import SequentialNFMTrainingSAEConfig
from sae_nfm.training import read_training_record, record_training

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus-train.parquet"
HOOK = "blocks.2.hook_resid_post"
D_SAE, STEPS, BATCH = 256, 200, 256
SETTINGS = {
    "standard": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
    "topk": {"k": 8},
    "abstopk": {"k": 8},
    "jumprelu": {"l0_coefficient": 0.5},
    "batchtopk": {"k": 8, "topk_threshold_lr": 0.1},
    "matryoshka_batchtopk": {"k": 8, "topk_threshold_lr": 0.1, "matryoshka_widths": [64, D_SAE]},
    "matching_pursuit": {"max_iterations": 8, "decoder_init_norm": 1.0},
}
SCRIPT = """
import json, sys
import torch
import sae_nfm
from sae_lens import SAE
from sae_nfm import demo
from sae_nfm.splicing import splice

model, tokens = demo.load_model(), torch.tensor(json.loads(sys.argv[1]))
logits = model(tokens)
figures = {}
for name in sys.argv[3:]:
    sae = SAE.load_from_disk(f"{sys.argv[2]}/{name}")
    _, cache = model.run_with_cache(tokens, names_filter=sae.cfg.metadata.hook_name)
    x = cache[sae.cfg.metadata.hook_name]
    with splice(model, sae):
        spliced = model(tokens)
    figures[name] = {
        "architecture": sae.cfg.architecture(),
        "moved": float((spliced - logits).abs().max()),
        "acts": sae.encode(x).sum().item(),
        "out": sae(x).sum().item(),
    }
print(json.dumps(figures))
"""


def trained(saes, folder, dataset, model, lr):
    """SAELens's runner on all of them at once; returns the record."""
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=HOOK,
        context_size=64,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=16,
        n_batches_in_buffer=16,
        n_batches_for_norm_estimate=8,
        exclude_special_tokens=True,
        lr=lr,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(folder),
    )
    with temporary_seed(0):
        runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
        with record_training(runner, folder / "training.jsonl", every=1):
            runner.run()
    return read_training_record(folder / "training.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if not CORPUS.is_file():
        pytest.skip("the corpus of real text is not beside this checkout")
    folder, model = tmp_path_factory.mktemp("text"), demo.load_model()
    texts = Dataset.from_parquet(str(CORPUS)).select(range(600)).select_columns("text")
    bases = {}
    for name, settings in SETTINGS.items():
        scaled = "none" if name == "matching_pursuit" else "expected_average_only_in"
        config = get_sae_training_class(name)[1]
        bases[name] = config(d_in=256, d_sae=D_SAE, normalize_activations=scaled, **settings)
    trained(bases, folder / "bases", texts, model, lr=3e-3)
    before = {name: sha256_of(SAE.load_from_disk(folder / "bases" / name).state_dict()) for name in SETTINGS}
    configs = {name: SequentialNFMTrainingSAEConfig(base=str(folder / "bases" / name), nfm_dim=32) for name in SETTINGS}
    lines = trained(copy.deepcopy(configs), folder / "nfm", texts, model, lr=3e-3)
    tokens = model.to_tokens(texts[7]["text"])[:, :32]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        SCRIPT,
        json.dumps(tokens.tolist()),
        str(folder / "nfm"),
        *SETTINGS,
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return SimpleNamespace(
        folder=folder,
        before=before,
        lines=lines,
        tokens=tokens,
        model=model,
        figures=json.loads(output.splitlines()[-1]),
    )


@pytest.mark.parametrize("architecture", SETTINGS)
def test_an_nfm_on_every_kind_of_sae(architecture, run):
    losses = [line["losses/mse_loss"] for line in run.lines if line["sae"] == architecture]
    added = [line["metrics/fvu_all"] - line["metrics/fvu_direct"] for line in run.lines if line["sae"] == architecture]
    assert len(losses) == STEPS
    assert sum(losses[-20:]) < sum(losses[:20])
    assert 0 < added[0] < 0.05  # the small initial weights are noise on top of the base
    assert sum(added[-20:]) / 20 < added[0] - 0.01  # on the same tokens, that noise and perhaps more is gone

    base = SAE.load_from_disk(run.folder / "bases" / architecture)
    loaded = SAE.load_from_disk(run.folder / "nfm" / architecture)
    assert sha256_of(loaded.base.state_dict()) == run.before[architecture]
    _, cache = run.model.run_with_cache(run.tokens, names_filter=HOOK)
    x = cache[HOOK]
    assert torch.equal(loaded.encode(x), base.encode(x))

    figures = run.figures[architecture]
    assert figures["architecture"] == "sequential_nfm"
    assert figures["moved"] > 0.1
    assert figures["acts"] == pytest.approx(base.encode(x).sum().item(), rel=1e-4)  # another process, other threads
    assert figures["out"] == pytest.approx(loaded(x).sum().item(), rel=1e-3, abs=0.1)
