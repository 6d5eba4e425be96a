import json
import re
import socket
from pathlib import Path

import pytest
import torch
from convert_lm import ConvertConfig, convert
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae_nfm.demo import MODEL_NAME, load_model, load_tokens
from sae_nfm.demo.model import MODEL_DIR, load_gpt2, load_tokenizer


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def gpt2():
    """Hugging Face's model, from the packaged files without any code of the package."""
    model = GPT2LMHeadModel(GPT2Config(**json.loads((MODEL_DIR / "config.json").read_text()))).float().eval()
    weights = {name: weight.float() for name, weight in load_file(MODEL_DIR / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the embedded model went to the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_logits_are_those_of_the_hugging_face_model(model, gpt2):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (4, 256), generator=generator)
    tokens[:, 0] = 0
    tokens[1, 100] = 0  # a document boundary
    tokens[2, -1] = 0  # would be masked if it were taken for padding
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), gpt2(tokens).logits, atol=1e-4, rtol=0)


def test_hook_values_are_those_of_the_raw_model(model, gpt2):
    tokens = torch.tensor(load_tokens("validation")[:2]["tokens"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.2.hook_resid_post")
        raw = gpt2(tokens, output_hidden_states=True).hidden_states[3]  # 0 is the embedding
    assert cache["blocks.2.hook_resid_post"].shape == (2, 256, 256)
    torch.testing.assert_close(cache["blocks.2.hook_resid_post"], raw, atol=1e-4, rtol=0)


def test_config_and_mode(model):
    cfg = model.cfg
    assert cfg.model_name == MODEL_NAME == "sae-nfm-demo"
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_ctx, cfg.d_vocab) == (4, 256, 4, 256, 4096)
    assert cfg.default_prepend_bos
    assert cfg.normalization_type == "LN"
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_files_are_small_and_half_precision():
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 9_000_000
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"F16"}
    assert [name for name, shape in shapes.items() if shape == [4096, 256]] == ["transformer.wte.weight"]


def test_tokenizer_round_trip(model):
    text = "The naïve café — 'Quoted', 3.14%\n\tand a tab. 漢"
    ids = model.to_tokens(text)[0].tolist()
    assert ids[0] == model.tokenizer.bos_token_id == 0
    assert 0 not in ids[1:]
    assert model.tokenizer.decode(ids[1:]) == text
    assert model.to_tokens(text, prepend_bos=False)[0].tolist() == ids[1:]


def test_loads_and_generates_without_a_network(no_network):
    model = load_model()
    prompt = model.to_tokens("The film was")
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    n_prompt = prompt.shape[1]
    assert generated.shape == (1, n_prompt + 8)
    with torch.no_grad():
        logits = model(generated)[0, n_prompt - 1 : -1]
    taken = logits.gather(-1, generated[0, n_prompt:, None]).squeeze(-1)
    torch.testing.assert_close(taken, logits.amax(dim=-1), atol=1e-3, rtol=0)  # the cache adds in another order
    assert logits.topk(2).values.diff().abs().median() > 1e-2  # else this says nothing
    assert model.generate("The film was", max_new_tokens=3, verbose=False).startswith("The film was")


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    load_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_is_strict(tmp_path):
    config = json.loads((MODEL_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    (tmp_path / "model.safetensors").symlink_to(MODEL_DIR / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"transformer\.h\.4\.attn\.c_attn\.weight"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize(("load", "name"), [(load_gpt2, "config.json"), (load_tokenizer, "tokenizer.json")])
def test_a_missing_file_is_named(tmp_path, load, name):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        load(tmp_path)


def test_converting_again_changes_nothing(tmp_path):
    convert(ConvertConfig(source=MODEL_DIR, output=tmp_path / "model"))
    written = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert written == sorted(file.name for file in MODEL_DIR.iterdir())
    assert list(Path(tmp_path).iterdir()) == [tmp_path / "model"]  # no temporary folder is left
    before, after = (load_file(folder / "model.safetensors") for folder in (MODEL_DIR, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_refuses_what_half_precision_cannot_hold(tmp_path):
    gpt2 = load_gpt2(MODEL_DIR)
    gpt2.transformer.ln_f.bias.data[0] = 1e6
    gpt2.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias.*half precision"):
        convert(ConvertConfig(source=tmp_path / "large", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
