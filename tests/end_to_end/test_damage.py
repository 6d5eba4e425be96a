"""Every kind of file that is written, with a flipped bit or cut short: it is noticed and named, or changes nothing."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from builders import inference_sae, training_config
from damage import damaged, outcome
from invented_comparison import compared
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from sae_nfm.common import check_digests, read_json, read_parquet, seal, whole, write_json, write_parquet
from sae_nfm.common.files import DIGESTS_FILENAME, SIDECAR
from sae_nfm.comparison.results import CompareResult
from sae_nfm.evaluation.token_table import Activations, Manifest, begin, document_sums, table, write_part
from sae_nfm.loading import digest
from sae_nfm.training import read_training_record
from sae_nfm.training.results import record_line

Readers = Mapping[Path, Callable[[], object]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    """A file of each kind, with what reads it."""
    root = tmp_path_factory.mktemp("files")
    run = root / "run"
    sae = inference_sae(training_config("joint_nfm"))
    sae.save_model(run / "saes" / "joint_nfm")
    seal(run / "saes" / "joint_nfm")
    write_json(run / "sweep.json", {"kind": "sweep/1", "rows": [1.5, 2.5]})
    with whole(run / "training.jsonl") as partial:
        partial.write_text("".join(record_line({"sae": "sae", "step": step, "loss": 0.5}) for step in range(20)))
    write_parquet(pd.DataFrame({"a": np.arange(50) / 7}), run / "documents.parquet")
    compared().save(run / "results.json")
    for sidecar in run.glob(f"*{SIDECAR}"):
        sidecar.unlink()
    seal(run)
    compared().save(root / "mine.json")
    rows = measurement(root / "rows")

    def load() -> object:
        return digest(SAE.load_from_disk(run / "saes" / "joint_nfm").state_dict())

    folder = run / "saes" / "joint_nfm"
    return {
        folder / "sae_weights.safetensors": load,
        folder / "cfg.json": load,
        folder / DIGESTS_FILENAME: load,
        run / "results.json": lambda: CompareResult.load(run / "results.json"),
        run / DIGESTS_FILENAME: lambda: CompareResult.load(run / "results.json"),
        run / "sweep.json": lambda: read_json(run / "sweep.json"),
        run / "training.jsonl": lambda: read_training_record(run / "training.jsonl"),
        run / "documents.parquet": lambda: read_parquet(run / "documents.parquet").to_dict(),
        root / "mine.json": lambda: CompareResult.load(root / "mine.json"),
        root / f"mine.json{SIDECAR}": lambda: CompareResult.load(root / "mine.json"),
        rows / "part-00000.parquet": lambda: document_sums(rows).to_dict(),
        rows / "part-00000.safetensors": lambda: document_sums(rows).to_dict(),
        rows / "manifest.json": lambda: document_sums(rows).to_dict(),
    }


def measurement(folder: Path) -> Path:
    arms = {"sae": "a"}
    manifest = Manifest(
        model="m",
        tokens="t",
        documents="d",
        arms=arms,
        hook_names={"sae": "h"},
        seed=0,
        batch_rows=1,
        batches_per_part=1,
        parts=1,
    )
    begin(folder, manifest)
    documents, x = np.repeat([0, 1], 8), np.random.default_rng(0).normal(size=(16, 3))
    names = ("kl_nats", "ce_nats", "ce_delta_nats", "error_norm", "error_energy", "cosine", "x_norm")
    columns = {"document": documents, "row": documents, "position": np.arange(16)} | dict.fromkeys(names, x[:, 0])
    write_part(folder, 0, [table("sae", list(arms), columns)], {"h": Activations.of(documents, x)})
    return folder


def test_forty_damaged_files_are_named_or_harmless(files: Readers) -> None:
    draw = random.Random(0)
    for path, read in files.items():
        right = f"read {read()!r}"
        for _ in range(4):
            content = damaged(path.read_bytes(), draw)
            found = outcome(path, content, read)
            assert found in ("named", right), (path.name, found)
        assert f"read {read()!r}" == right


def test_pages_of_parquet_are_checked_by_themselves(files: Readers) -> None:
    """Without any digest of ours, by what the format has for it."""
    path = next(path for path in files if path.name == "documents.parquet")
    alone = path.parent.parent / "alone.parquet"
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content[column.dictionary_page_offset + column.total_compressed_size - 3] ^= 1  # in the last page
    alone.write_bytes(content)
    with pytest.raises(ValueError, match=r"alone\.parquet.*is not a parquet file"):
        read_parquet(alone)


def test_files_of_saelens_are_read_without_digests_and_saving_over_an_sae_renews_them(tmp_path: Path) -> None:
    topk = TopKSAE(TopKSAEConfig(d_in=8, d_sae=16, k=4))
    topk.save_model(tmp_path / "topk")
    assert sorted(path.name for path in (tmp_path / "topk").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    config = json.loads((tmp_path / "topk" / "cfg.json").read_text())
    (tmp_path / "topk" / "cfg.json").write_text(json.dumps(config | {"k": 3}))
    assert SAE.load_from_disk(tmp_path / "topk").cfg.k == 3
    seal(tmp_path / "topk")
    topk.save_model(tmp_path / "topk")
    assert SAE.load_from_disk(tmp_path / "topk").cfg.k == topk.cfg.k
    check_digests(tmp_path / "topk")
