"""The README's Python runs as it stands there, but for the numbers of tokens."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "training_tokens=200_000" in code
    names: dict = {}
    exec(code.replace("training_tokens=200_000", "training_tokens=2_048, train_batch_size_tokens=512"), names)
    tokens, model = names["tokens"], names["model"]
    assert not names["logits"].allclose(model(tokens), atol=1e-3)  # the clamp did something
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} >= {
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "training.jsonl",
    }  # fmt: skip


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("https://") or (README.parent / target).exists(), target
