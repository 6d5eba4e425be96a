"""Models from local folders through each loader: same logits, same hook points, by names of both kinds; and what is refused."""

import pytest
import torch
from builders import D_MODEL, D_VOCAB, inference_sae, tiny_model, token_dataset, training_config
from datasets import Dataset
from sae_lens import HookedSAETransformer, SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, HF_BLOCK, N_CTX, SHAPE, write_checkpoint, write_checkpoints
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
)

from sae_nfm import demo
from sae_nfm.data.datasets import held_out_tokens
from sae_nfm.models.load import Site, find_site, load_model, resolve_hook_name

CLASSES = {
    "HookedTransformer": HookedSAETransformer,
    "TransformerBridge": SAETransformerBridge,
    "AutoModelForCausalLM": HookedProxyLM,
}
ROUNDING = {"atol": 2e-5, "rtol": 0}  # float32 through two blocks, logits and activations of size 1 to 5
PLACES = {  # HookedTransformer's name: TransformerBridge's in GPT-2, GPT-NeoX, Llama and Gemma, and in Gemma 2
    "hook_resid_pre": ("hook_in", "hook_in"),
    "hook_resid_post": ("hook_out", "hook_out"),
    "hook_attn_out": ("attn.hook_out", "ln1_post.hook_out"),
    "hook_mlp_out": ("mlp.hook_out", "ln2_post.hook_out"),
    "attn.hook_z": ("attn.o.hook_in", "attn.o.hook_in"),
    "mlp.hook_post": ("mlp.out.hook_in", "mlp.out.hook_in"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """Models by family and class, each loaded when first asked for, and not changed by any test."""
    models = {}

    def get(family, model_class_name="HookedTransformer"):
        if (family, model_class_name) not in models:
            models[family, model_class_name] = load_model(checkpoints[family], model_class_name=model_class_name)
        return models[family, model_class_name]

    return get


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(token_dataset(4, N_CTX)["tokens"])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class_name", CLASSES)
def test_logits_are_those_of_the_hugging_face_model(family, model_class_name, checkpoints, loaded, tokens):
    model = loaded(family, model_class_name)
    assert isinstance(model, CLASSES[model_class_name])
    assert not model.training
    reference = AutoModelForCausalLM.from_pretrained(checkpoints[family])(tokens).logits
    torch.testing.assert_close(model(tokens), reference, **ROUNDING)
    assert reference.std() > 0.3
    assert model.tokenizer.convert_tokens_to_ids(["t3", "t49"]) == [3, 49]


@pytest.mark.parametrize(("family", "model_class_name"), zip(FAMILIES, (*CLASSES, *CLASSES), strict=False))
def test_loading_leaves_the_random_state(family, model_class_name, checkpoints):
    state = torch.get_rng_state()
    load_model(checkpoints[family], model_class_name=model_class_name)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_both_kinds_are_one_place(family, loaded, tokens):
    hooked, bridge = loaded(family), loaded(family, "TransformerBridge")
    _, on_hooked = hooked.run_with_cache(tokens)
    _, on_bridge = bridge.run_with_cache(tokens)
    for place, canonical in PLACES.items():
        name, other = f"blocks.1.{place}", f"blocks.1.{canonical[family == 'gemma2']}"
        assert resolve_hook_name(bridge, name) == resolve_hook_name(bridge, other) == other
        assert resolve_hook_name(hooked, name) == resolve_hook_name(hooked, other) == name
        x = on_hooked[name].flatten(2)
        torch.testing.assert_close(on_bridge[other].flatten(2), x, **ROUNDING)
        heads = "hook_z" if place == "attn.hook_z" else "none"
        assert find_site(hooked, other) == Site(hook_name=name, d_in=x.shape[-1], reshape_activations=heads)
        assert find_site(bridge, name) == Site(hook_name=other, d_in=x.shape[-1], reshape_activations="none")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_names(family, loaded, tokens):
    proxy = loaded(family, "AutoModelForCausalLM")
    assert find_site(proxy, HF_BLOCK[family]) == Site(
        hook_name=HF_BLOCK[family], d_in=D_MODEL, reshape_activations="none"
    )
    _, cache = proxy.run_with_cache(tokens, names_filter=[HF_BLOCK[family]])
    _, hooked = loaded(family).run_with_cache(tokens, names_filter="blocks.0.hook_resid_post")
    torch.testing.assert_close(cache[HF_BLOCK[family]], hooked["blocks.0.hook_resid_post"], **ROUNDING)


def test_hook_points_of_a_spliced_sae_follow(checkpoints):
    sae = inference_sae(training_config("joint_nfm"))
    names = [f"blocks.0.{place}.hook_nfm_pooled" for place in ("hook_resid_post", "hook_out")]
    for model_class_name, own in zip(CLASSES, names, strict=False):
        model = load_model(checkpoints["gpt2"], model_class_name=model_class_name)
        with model.saes([sae]):
            for name in names:
                assert resolve_hook_name(model, name) == own
                assert find_site(model, name) == Site(hook_name=own, d_in=8, reshape_activations="none")
            for name in ("blocks.0.hook_resid_post", "blocks.0.hook_out"):
                with pytest.raises(ValueError, match=f"attached at '{name}'"):
                    resolve_hook_name(model, name)


@pytest.mark.parametrize(
    ("model_class_name", "wrong", "near"),
    [
        ("HookedTransformer", "blocks.0.hook_resid_pst", "blocks.0.hook_resid_post"),
        ("TransformerBridge", "blocks.0.hook_resid_pst", "blocks.0.hook_resid_post"),
        ("TransformerBridge", "blocks.0.hook_ot", "blocks.0.hook_out"),
        ("AutoModelForCausalLM", "transformer.h.0.mpl", "transformer.h.0.mlp"),
    ],
)
def test_near_names_are_listed(model_class_name, wrong, near, loaded):
    with pytest.raises(ValueError, match=rf"'{wrong}'.*\b{near}\b"):
        find_site(loaded("gpt2", model_class_name), wrong)


def test_places_without_one_vector_a_token_are_refused(loaded):
    with pytest.raises(ValueError, match=r"hook_pattern'.*\(1, 2, 2, 2\).*\[batch, pos, d_in\]"):
        find_site(loaded("gpt2"), "blocks.0.attn.hook_pattern")
    with pytest.raises(ValueError, match=r"'transformer\.h'.*\bone tensor"):
        find_site(loaded("gpt2", "AutoModelForCausalLM"), "transformer.h")


def test_weights_are_raw_unless_processing_is_asked_for(checkpoints, loaded, tokens):
    raw, reference = loaded("gpt2"), AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"])
    assert torch.equal(raw.W_pos, reference.transformer.wpe.weight)
    assert torch.equal(raw.blocks[1].ln1.w, reference.transformer.h[1].ln_1.weight)
    folded = load_model(checkpoints["gpt2"], fold_ln=True, center_writing_weights=True)
    assert not torch.equal(folded.W_pos, raw.W_pos)
    torch.testing.assert_close(folded(tokens), raw(tokens), **ROUNDING)


def test_options_of_loading(checkpoints, loaded):
    model = load_model(checkpoints["neox"], dtype="bfloat16", n_ctx=16, default_prepend_bos=True)
    assert (model.cfg.dtype, model.cfg.n_ctx) == (torch.bfloat16, 16)
    assert model.to_tokens("t3 t4").tolist() == [[0, 3, 4]]
    assert loaded("neox").to_tokens("t3 t4").tolist() == [[3, 4]]  # GPT-NeoX was trained without BOS
    bridge = load_model(checkpoints["neox"], model_class_name="TransformerBridge", dtype="bfloat16")
    assert bridge(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\bfirst_n_layers\b.*unexpected keyword"):
        load_model(checkpoints["neox"], first_n_layers=1)


@torch.no_grad()
def test_the_embedded_model_through_each_loader():
    expected, tokens = demo.load_model(), torch.arange(40).reshape(2, 20)
    assert isinstance(load_model(demo.MODEL_NAME), HookedSAETransformer)
    for model_class_name in CLASSES:
        for kwargs in ({}, {"dtype": torch.float32}):
            model = load_model(demo.MODEL_NAME, model_class_name=model_class_name, **kwargs)
            torch.testing.assert_close(model(tokens), expected(tokens), atol=1e-4, rtol=0)  # logits of size 10
            if model_class_name != "AutoModelForCausalLM":
                assert model.cfg.model_name == demo.MODEL_NAME
                assert model.to_tokens("The film").tolist() == expected.to_tokens("The film").tolist()


def test_a_folder_without_tokenizer_reads_token_ids(tmp_path):
    folder = write_checkpoint(tmp_path / "gemma", "gemma", tokenizer=False)
    model = load_model(folder)
    assert model.tokenizer is None
    assert held_out_tokens(model, token_dataset(2, 8), 8, 16).shape == (2, 8)
    text = Dataset.from_dict({"text": ["t1 t2"]})
    with pytest.raises(ValueError, match=r"no tokenizer.*\btext\b.*\btoken ids\b"):
        held_out_tokens(model, text, 8, 16)
    for name in ("TransformerBridge", "AutoModelForCausalLM"):
        with pytest.raises(FileNotFoundError, match=rf"no tokenizer.*\b{name}\b"):
            load_model(folder, model_class_name=name)


@pytest.mark.parametrize("model_class_name", CLASSES)
def test_held_out_text_is_cut_alike(model_class_name, loaded):
    text = Dataset.from_dict({"text": ["t1 t2 t3", "t4 t5"]})
    assert held_out_tokens(loaded("llama", model_class_name), text, 4, 4).tolist() == [[0, 1, 2, 3]]


def test_a_conversion_that_predicts_otherwise_is_refused(tmp_path):
    """TransformerLens leaves out the biases of a Llama model's attention, without a word."""
    folder = write_checkpoint(tmp_path / "biased", LlamaForCausalLM(LlamaConfig(attention_bias=True, **SHAPE)))
    with pytest.raises(ValueError, match=r"\bLlamaForCausalLM in .*biased'.*\bmodel_class_name='TransformerBridge'"):
        load_model(folder)
    assert isinstance(load_model(folder, model_class_name="TransformerBridge"), SAETransformerBridge)


def test_an_architecture_without_conversion_is_refused(tmp_path):
    model = Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=1, head_dim=8, **SHAPE))
    folder = write_checkpoint(tmp_path / "gemma3", model)
    with pytest.raises(ValueError, match=r"\bGemma3ForCausalLM in .*gemma3.*\bmodel_class_name='TransformerBridge'"):
        load_model(folder)
    assert isinstance(load_model(folder, model_class_name="TransformerBridge"), SAETransformerBridge)


@pytest.mark.parametrize(
    ("config", "change", "cause"),
    [
        (PhiConfig(**SHAPE), {}, AttributeError),  # the table asks for a field that this version's config lacks
        (LlamaConfig(**SHAPE, hidden_act="quick_gelu"), {}, AssertionError),  # no such activation function there
        (GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=50), {"n_ctx": 64}, RuntimeError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_however_transformer_lens_refuses_it_is_one_clear_error(config, change, cause, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    folder = write_checkpoint(tmp_path / "folder", model)
    with pytest.raises(ValueError, match=rf"(?s)\b{type(model).__name__} in .*folder'.*\bmodel_class_name=") as refused:
        load_model(folder, **change)
    assert type(refused.value.__cause__) is cause


def test_incomplete_folders(tmp_path):
    folder = write_checkpoint(tmp_path / "gpt2", "gpt2")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"gpt2'.*\btransformer\.h\.1\.mlp\.c_fc\.weight\b"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"gpt2'.*\bcomplete\b"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"gpt2'.*\bno config\.json\b"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match=r"'\./nowhere'"):
        load_model("./nowhere")


def test_unknown_names():
    with pytest.raises(ValueError, match="'no-such-model'"):
        load_model("no-such-model")
    with pytest.raises(ValueError, match=r"model_class_name .*'HookedTransformer', 'TransformerBridge'.*'GPT'"):
        load_model(demo.MODEL_NAME, model_class_name="GPT")


@pytest.mark.parametrize("model_class_name", CLASSES)
def test_unreachable_hub(model_class_name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'gpt-neox-20b'.*\bhub\b"):
        load_model("gpt-neox-20b", model_class_name=model_class_name)


def test_a_model_built_by_hand_knows_both_names():
    model = tiny_model()
    assert resolve_hook_name(model, "blocks.1.mlp.hook_out") == "blocks.1.hook_mlp_out"
    assert find_site(model, "blocks.1.attn.o.hook_in").reshape_activations == "hook_z"
    assert find_site(model, "blocks.1.hook_in").d_in == D_MODEL
    assert model.cfg.d_vocab == D_VOCAB
