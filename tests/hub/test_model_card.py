"""The card: its header is what the hub reads, its figures are the run's, its Python runs."""

import ast
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from invented_comparison import compared_once
from train_sae import SAES_DIR

from sae_nfm.hub.card import CardSAE, model_card
from sae_nfm.hub.release import ReleasedSAE

CONFIG = {
    "architecture": "joint_nfm", "d_in": 16, "d_sae": 32, "k": 4,
    "metadata": {
        "model_name": "tiny", "hook_name": "blocks.0.mlp", "dataset_path": "/home/me/corpus.parquet", "context_size": 128,
    },
}  # fmt: skip
ENTRY = ReleasedSAE(
    id="mine",
    path="mine",
    sha256={"cfg.json": "0" * 64, "sae_weights.safetensors": "1" * 64},
    variance_explained=0.91,
    l0=4.0,
)
SAE_OF_CARD = CardSAE(entry=ENTRY, config=CONFIG, runner={"training_tokens": 5_000_000, "lr": 0.003})


def test_header_is_what_the_hub_reads():
    data = ModelCard(model_card("user/saes", [SAE_OF_CARD], license="apache-2.0")).data
    assert (data.library_name, data.license) == ("saelens", "apache-2.0")
    assert {"sparse-autoencoder", "joint_nfm"} <= set(data.tags)
    assert ModelCard(model_card("user/saes", [SAE_OF_CARD])).data.license is None


def test_single_sae_without_figures_says_so():
    card = model_card("user/saes", [SAE_OF_CARD])
    assert "| `mine` | joint_nfm | tiny | `blocks.0.mlp` | 16 | 32 | 4 | 4.0 | 0.9100 |" in card
    assert "Nothing was measured on held-out text" in card
    assert "- tokens trained on: 5,000,000\n- context size: 128\n- learning rate: 0.003" in card
    assert "- data: corpus.parquet\n" in card  # no folder of the machine
    assert "/home" not in card
    assert "arXiv 2507.00269 reports -41.3% reconstruction error" in card  # named as the paper's
    assert "None is stated: ask who published this" in card


@pytest.mark.parametrize(
    ("base", "told"), [("/home/me/topk", " (topk)"), ("gemma:layer_12/16k", " (gemma:layer_12/16k)"), ("", "")]
)
def test_a_sequential_sae_says_what_it_stands_on(base, told):
    card = model_card(
        "user/saes", [replace(SAE_OF_CARD, config=CONFIG | {"architecture": "sequential_nfm", "base": base})]
    )
    assert f"`sequential_nfm` is a pretrained SAE{told}, as it was, with such a machine trained on its residual" in card
    assert "`KeyError: 'sequential_nfm'` from SAELens means" in card
    assert "/home" not in card


def test_figures_are_the_runs_and_the_fair_one_stands_beside_the_papers():
    card = model_card("user/saes", [SAE_OF_CARD], result=compared_once())
    assert "| joint | 150 | 32.0 | 0.1000 | 0.2000 | +0.1250 | 1,234 |" in card
    assert "| joint: direct only | 150 | 32.0 | 0.4000 | 0.2500 | +0.1250 |  |" in card
    papers = card.index("all paths against the direct path alone: FVU -75.0%, KL -20.0%")
    assert papers < card.index("against matched (1.00 x its parameters): FVU +100.0%, KL +100.0% (no better on either)")
    assert "averaged over 1,000 held-out tokens" in card
    assert "- seeds: 7" in card
    assert "- tokens trained on: 400\n" in card  # the run's, as its results say


HOSTILE = 'x`\n```\x1b[2J\u202e|<img src=x onerror=alert(1)>[a](http://b)"); import os#'


def test_no_text_of_a_file_becomes_markup_or_code():
    """A config and ids of somebody else: nothing leaves its line, its cell, its code or its string."""
    metadata = {"model_name": HOSTILE, "hook_name": HOSTILE, "dataset_path": HOSTILE, "context_size": HOSTILE}
    config = {"architecture": HOSTILE, "d_in": HOSTILE, "d_sae": 1, "k": HOSTILE, "base": HOSTILE, "metadata": metadata}
    entry = replace(ENTRY, id="it's `\"|x", path="it's `\"|x")
    card = model_card(
        "user/saes", [CardSAE(entry=entry, config=config, runner={"lr": HOSTILE, "training_tokens": HOSTILE})]
    )
    assert HOSTILE in ModelCard(card).data.tags  # YAML knows how to quote it
    body = card.split("---\n", 2)[2]
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", body)
    text = r"x\`\\n\`\`\`\\x1b\[2J\\u202e\|&lt;img src=x onerror=alert(1)>\[a\](http&#58;//b)" + '"); import os#'
    code = r"````x`\n```\x1b[2J\u202e\|<img src=x onerror=alert(1)>[a](http://b)" + '"); import os#````'
    row = ("``it's `\"\\|x``", text, 'b)"); import os#', code, text, "1", text, "4.0", "0.9100")
    assert f"| {' | '.join(row)} |\n" in body
    assert re.findall("(?m)^```.*", body) == ["```python", "```"]
    (code,) = re.findall(r"```python\n(.*?)\n```", body, re.DOTALL)
    call = ast.parse(code).body[-1].value
    assert [argument.value for argument in call.args] == ["user/saes", "it's `\"|x"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/home/me/corpus", "corpus"),
        ("/home/me/secret-folder/", "secret-folder"),
        ("C:\\Users\\me\\corpus.parquet", "corpus.parquet"),
        ("~/corpus", "corpus"),
        ("../me/corpus", "corpus"),
        ("me/data/corpus", "corpus"),
        ("data/corpus.jsonl.gz", "corpus.jsonl.gz"),
        ("file:///home/me/corpus", "corpus"),
        ("https://me:token@host/corpus?key=1", "corpus"),
        ("NeelNanda/pile-10k", "NeelNanda/pile-10k"),
        ("gemma:layer_12/width/16k", "gemma:layer_12/width/16k"),
        ("gpt2", "gpt2"),
        ("", ""),
    ],
)
def test_no_folder_of_a_machine_is_stated(source, told):
    names = {"model_name": source, "dataset_path": source}
    config = CONFIG | {"metadata": CONFIG["metadata"] | names, "architecture": "sequential_nfm", "base": source}
    card = model_card("user/saes", [replace(SAE_OF_CARD, config=config)])
    assert f"| {told} | `blocks.0.mlp`" in card
    assert "/me" not in card
    assert "Users" not in card


@pytest.mark.parametrize("architecture", ["joint_nfm", "topk"])
def test_loading_is_explained_for_the_architecture_at_hand(architecture):
    card = model_card("user/saes", [replace(SAE_OF_CARD, config=CONFIG | {"architecture": architecture})])
    ours = architecture == "joint_nfm"
    assert ("`KeyError: 'joint_nfm'` from SAELens means that `import sae_nfm` did not come first." in card) == ours
    assert ("import sae_nfm " in card) == ours
    assert "    sae-nfm pull user/saes FOLDER\n" in card
    assert 'SAE.from_pretrained("user/saes", "mine")' in card


def test_python_of_the_packaged_card_runs():
    card = (SAES_DIR / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["sae"].cfg.architecture() == "joint_nfm"
    assert "sae-nfm pull" not in card  # nothing to pull: it is installed
