"""KL, CE and FVU against a naive float64 loop; the splice is always removed."""

import pytest
import torch
from builders import CONTEXT, HOOK, inference_sae, tiny_model, training_config
from naive_behaviour import CLOSE, by_hand, random_tokens
from tiny_models import write_checkpoint

from sae_nfm.evaluation.fidelity import Arm, counted_tokens, evaluate, spliced
from sae_nfm.models.load import load_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def sae():
    return inference_sae(training_config("joint_nfm"))


@pytest.fixture(scope="module")
def naive(model, sae):
    return by_hand(model, random_tokens(), sae, lambda x: sae(x[None])[0])


@pytest.mark.parametrize("batch_rows", [1, 2, 16])
def test_figures_equal_a_naive_loop(model, sae, naive, batch_rows):
    tokens = random_tokens()
    found = evaluate(model, tokens, [Arm(name="sae", sae=sae)], batch_rows=batch_rows, show_progress=False)["sae"]
    for name, value in naive.items():
        assert getattr(found, name) == pytest.approx(value, **CLOSE), name
    assert found.kl_nats > 1e-3  # the figures compared above are not all zero


@pytest.mark.parametrize(
    ("off", "kept"),
    [
        (("hook_nfm_linear",), ("direct", "square", "interaction")),
        (("hook_nfm_interaction", "hook_nfm_square"), ("direct", "linear")),
        (("hook_nfm_linear", "hook_nfm_interaction", "hook_nfm_square"), ("direct",)),
    ],
)
def test_a_path_switched_off_writes_nothing(model, sae, off, kept):
    tokens = random_tokens()

    def replace(x):
        paths = sae.decode_paths(sae.encode(x[None])).present()
        return sum(paths[name] for name in kept)[0]

    arms = [Arm(name="part", sae=sae, off=off), Arm(name="whole", sae=sae)]
    found = evaluate(model, tokens, arms, show_progress=False)
    for name, value in by_hand(model, tokens, sae, replace).items():
        assert getattr(found["part"], name) == pytest.approx(value, **CLOSE), name
    assert found["part"].fvu != pytest.approx(found["whole"].fvu, rel=1e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def naive_of_checkpoint(checkpoint, sae):
    """Of the whole SAE and of two of its paths, with special tokens within a row."""

    def two_paths(x):
        paths = sae.decode_paths(sae.encode(x[None]))
        return (paths.direct + paths.interaction)[0]

    reference = load_model(checkpoint)
    arms = {"whole": lambda x: sae(x[None])[0], "part": two_paths}
    return {arm: by_hand(reference, random_tokens(), sae, replace) for arm, replace in arms.items()}


@pytest.mark.parametrize(
    ("model_class_name", "hook_name"),
    [
        ("HookedTransformer", "blocks.0.hook_out"),
        ("TransformerBridge", "blocks.0.hook_resid_post"),
        ("TransformerBridge", "blocks.0.hook_out"),
        ("AutoModelForCausalLM", "transformer.h.0"),
    ],
)
def test_figures_are_the_same_on_every_kind_of_model(model_class_name, hook_name, checkpoint, naive_of_checkpoint):
    """Also with a special token within a row, which must bypass the SAE."""
    tokens = random_tokens()
    sae = inference_sae(training_config("joint_nfm", hook_name))
    arms = [Arm(name="whole", sae=sae), Arm(name="part", sae=sae, off=("hook_nfm_linear", "hook_nfm_square"))]
    model = load_model(checkpoint, model_class_name=model_class_name)
    found = evaluate(model, tokens, arms, batch_rows=2, show_progress=False)
    for arm, naive in naive_of_checkpoint.items():
        for name, value in naive.items():
            assert getattr(found[arm], name) == pytest.approx(value, rel=1e-5, abs=2e-6), (arm, name)  # float32 logits
    assert found["whole"].kl_nats != pytest.approx(found["part"].kl_nats, rel=1e-2)
    assert sae.cfg.metadata.hook_name == hook_name


@torch.no_grad()
def test_a_bridge_is_left_as_it_was(checkpoint):
    """SAELens's own splice leaves a hook point behind that hooks do not find, and that does not tell heads apart."""
    model, tokens = load_model(checkpoint, model_class_name="TransformerBridge"), random_tokens()
    clean = model(tokens)
    for hook_name, shape in {"blocks.0.attn.o.hook_in": (5, CONTEXT, 2, 8), HOOK: (5, CONTEXT, 16)}.items():
        sae = inference_sae(training_config("joint_nfm", hook_name))
        own = hook_name.replace("hook_resid_post", "hook_out")
        with pytest.raises(RuntimeError, match="stop"), spliced(model, Arm(name="sae", sae=sae)):
            assert not torch.equal(model(tokens), clean)
            raise RuntimeError("stop")
        shapes = []
        model.run_with_hooks(tokens, fwd_hooks=[(own, lambda value, hook, shapes=shapes: shapes.append(value.shape))])
        assert shapes == [shape]
        assert torch.equal(model(tokens), clean)
        assert not model.acts_to_saes
        assert not model.original_model._forward_pre_hooks


def test_special_tokens_and_position_0_are_not_counted(model):
    mask = counted_tokens(model, torch.tensor([[0, 5, 0, 6], [7, 8, 9, 10]]))
    assert mask.tolist() == [[False, True, False, True], [False, True, True, True]]


def test_the_splice_is_removed_even_after_an_error(model, sae):
    tokens = random_tokens()
    before = model(tokens)
    arm = Arm(name="sae", sae=sae, off=("hook_nfm_linear",))
    with pytest.raises(RuntimeError, match="stop"), spliced(model, arm):
        assert not torch.equal(model(tokens), before)
        raise RuntimeError("stop")
    assert torch.equal(model(tokens), before)
    assert not model.acts_to_saes
    assert not any(hook.fwd_hooks for hook in sae.hook_dict.values())


def test_errors_say_what_is_wrong(model, sae):
    tokens = random_tokens()
    arm = Arm(name="sae", sae=sae)
    with pytest.raises(ValueError, match=r"\barm names .*\bsae\b"):
        evaluate(model, tokens, [arm, arm], show_progress=False)
    with pytest.raises(ValueError, match=r"\bno token\b.*\b32 tokens\b"):
        evaluate(model, torch.zeros(2, 16, dtype=torch.long), [arm], show_progress=False)
    with pytest.raises(ValueError, match=r"'sae'.*\bhook_nfm_cubic\b.*\bhook_sae_input\b"):
        evaluate(model, tokens, [Arm(name="sae", sae=sae, off=("hook_nfm_cubic",))], show_progress=False)
    elsewhere = inference_sae(training_config("joint_nfm", hook_name="blocks.9.hook_resid_post"))
    with pytest.raises(ValueError, match=r"'blocks\.9\.hook_resid_post'"):
        evaluate(model, tokens, [Arm(name="far", sae=elsewhere)], show_progress=False)
