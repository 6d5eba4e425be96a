"""Predicted effects are measured ones with gates held, through a model's logits too; a planted pair is found."""

import pytest
import torch
from builders import ARCHITECTURES, D_VOCAB, HOOK, tiny_model
from pair_inputs import pair_sae, pairs_by_loop, planted_pair_sae, some_tokens
from planted import linear_model

from sae_nfm.architectures.nfm_paths import PathWeights
from sae_nfm.attribution.direct_logits import SCALE, DirectPath, Target
from sae_nfm.attribution.pair_effects import PromptRun, Removal, attribute_token, gradients, remove_pairs, run_prompt
from sae_nfm.attribution.pairs import TokenPairs, along, norms, written
from sae_nfm.interventions.edits import PairEdit
from sae_nfm.interventions.intervene import Splice
from sae_nfm.models.splicing import splice

LAST = "blocks.1.hook_resid_post"
POSITION = 6
TARGET = Target.logit(7, D_VOCAB, "t7")


def removals(run: PromptRun, n: int = 3) -> tuple[list[Removal], torch.Tensor, TokenPairs]:
    pairs = TokenPairs.of(run.reads.of(torch.tensor([POSITION])).read)
    chosen = [
        Removal(position=POSITION, first=int(i), second=int(j), target=TARGET)
        for i, j in zip(pairs.first[0], pairs.second[0], strict=True)
    ]
    return chosen[:n], run.reads.gates[POSITION][None], pairs


def test_a_target_by_hand():
    logits = torch.tensor([1.0, 2.0, 6.0])
    assert Target.logit(2, 3, "").of(logits).item() == pytest.approx(3.0)  # less the mean, 3
    assert Target.logit(2, 3, "", against=0).of(logits).item() == pytest.approx(5.0)
    with pytest.raises(ValueError, match=r"\btoken id 3\b.*\b0 to 2\b"):
        Target.logit(3, 3, "")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_path_changes_by_what_the_pair_writes_when_gates_are_held(architecture):
    model, sae = tiny_model(torch.float64), pair_sae(architecture)
    run = run_prompt(model, sae, some_tokens()[0])
    chosen, _, _ = removals(run)
    by_loop = pairs_by_loop(sae, run.reads, POSITION)
    for removal, measured in zip(chosen, remove_pairs(model, sae, run, chosen, batch_rows=2), strict=True):
        torch.testing.assert_close(measured.written_frozen, by_loop[removal.first, removal.second])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bilinear_the_path_changes_by_what_a_pair_or_a_square_writes(architecture):
    """No gate, so that held and free are the same, and measured is predicted; by `PairEdit` too."""
    model, sae = tiny_model(torch.float64), pair_sae(architecture, head="bilinear")
    tokens = some_tokens()[0]
    run = run_prompt(model, sae, tokens)
    weights = PathWeights.of(sae)
    pairs = TokenPairs.of(run.reads.of(torch.tensor([POSITION])).read, selves=True)
    vectors = written(pairs, run.reads.gates[[POSITION]], weights)[0]
    ends = list(zip(pairs.first[0].tolist(), pairs.second[0].tolist(), strict=True))
    assert len(ends) == 6  # of three features
    chosen = [Removal(position=POSITION, first=i, second=j, target=TARGET) for i, j in ends]
    for removal, vector, measured in zip(chosen, vectors, remove_pairs(model, sae, run, chosen), strict=True):
        torch.testing.assert_close(measured.written_frozen, vector)
        torch.testing.assert_close(measured.written_free, vector)
        assert measured.free == pytest.approx(measured.frozen)
        assert measured.flipped == 0
        off = PairEdit(pair=(removal.second, removal.first), mode="scale", value=0.0, where=(POSITION,))
        with Splice(sae=sae, edits=[off]).on(model):
            logits = model(tokens[None])[0, POSITION]
        assert float(TARGET.of(run.logits[POSITION] - logits)) == pytest.approx(measured.free)
    found = attribute_token(model, sae, run, POSITION, TARGET, top=6)
    assert found.sum_error < 1e-12
    assert (found.pairs_firing, found.gates_open, [one.name for one in found.biases]) == (3, 1.0, ["b_2"])
    assert found.all_squares is not None
    squares = torch.stack([vector for (i, j), vector in zip(ends, vectors, strict=True) if i == j]).sum(0)
    assert found.all_squares.norm == pytest.approx(float(squares.norm()))
    assert max(pair.prediction_error for pair in found.pairs) < 1e-10
    assert "squares (i x i)" in found.words()


def test_gates_that_are_free_flip_as_in_a_forward_pass_of_its_own():
    """The oracle: z less the pair's part through W_1, ReLU and W_2."""
    model, sae = tiny_model(torch.float64), pair_sae()
    run, weights = run_prompt(model, sae, some_tokens()[0]), PathWeights.of(sae)
    chosen, _, pairs = removals(run)
    values = run.reads.read.values[POSITION][:, None] * weights.V[run.reads.read.indices[POSITION]]
    pooled = 0.5 * (values.sum(0).square() - values.square().sum(0))
    flipped = 0.0
    for n, measured in enumerate(remove_pairs(model, sae, run, chosen)):
        part = pairs.product[0, n] * weights.V[chosen[n].first] * weights.V[chosen[n].second]
        hidden = (pooled - part) @ weights.W_1 + weights.b_1
        without = hidden.relu() @ weights.W_2 + weights.b_2
        torch.testing.assert_close(measured.written_free, run.reads.interaction[POSITION] - without)
        assert measured.flipped == ((hidden > 0) != run.reads.gates[POSITION]).double().mean().item()
        flipped += measured.flipped
    assert flipped > 0  # else this shows nothing about free gates


def test_direct_effects_are_measured_ones_in_a_linear_model():
    """Nothing after the hook point but the unembedding: direct = gradient = frozen."""
    model, sae = linear_model().double(), pair_sae()
    run = run_prompt(model, sae, some_tokens()[0])
    chosen, gates, _ = removals(run)
    reads, weights = run.reads.of(torch.tensor([POSITION])), PathWeights.of(sae)
    direction = DirectPath(model, sae).directions([TARGET], None, reads.interaction)
    direct = along(reads.read, gates, weights, direction)[0]
    gradient = along(reads.read, gates, weights, gradients(model, sae, run.tokens, [(POSITION, TARGET)]))[0]
    frozen = [measured.frozen for measured in remove_pairs(model, sae, run, chosen)]
    assert direct.tolist()[: len(frozen)] == pytest.approx(frozen)
    assert gradient.tolist()[: len(frozen)] == pytest.approx(frozen)
    assert max(map(abs, frozen)) > 1e-3


def test_direct_effects_are_measured_ones_with_the_final_scale_held():
    """The SAE after the last block of a model with a final LayerNorm, whose scale a hook holds."""
    model, sae = tiny_model(torch.float64), pair_sae(hook_name=LAST)
    run = run_prompt(model, sae, some_tokens()[0])
    chosen, gates, pairs = removals(run)
    vectors = written(pairs, gates, PathWeights.of(sae))[0]
    direct = TARGET.of(DirectPath(model, sae).logits(vectors, run.scale[[POSITION]]))
    with model.hooks(fwd_hooks=[(SCALE, lambda value, hook: run.scale.expand_as(value))]):
        held = [measured.frozen for measured in remove_pairs(model, sae, run, chosen)]
    free = [measured.frozen for measured in remove_pairs(model, sae, run, chosen)]
    assert direct.tolist() == pytest.approx(held)
    assert held != pytest.approx(free, rel=1e-3)  # the scale moves by itself


def test_gradients_are_small_differences_through_the_whole_model():
    """Central differences of 1e-5 in float64 are good to about 1e-9."""
    model, sae = tiny_model(torch.float64), pair_sae()
    tokens, nudge = some_tokens()[0], torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = [(POSITION, TARGET), (3, Target.logit(1, D_VOCAB, "")), (POSITION, Target.logit(1, D_VOCAB, ""))]
    found = gradients(model, sae, tokens, targets, batch_rows=2)
    for (position, target), gradient in zip(targets, found, strict=True):

        @torch.no_grad()
        def value(step: float, position=position, target=target) -> float:
            def add(inter, hook):
                inter[:, position] += step * nudge
                return inter

            with splice(model, sae) as spliced, spliced.hooks({"hook_nfm_interaction": add}):
                return float(target.of(model(tokens[None])[0, position]))

        assert float(gradient @ nudge) == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_what_is_written_grows_with_the_input_where_the_sae_normalises_it(normalize):
    model = linear_model().double()
    sae = pair_sae(normalize_activations=normalize)
    run = run_prompt(model, sae, some_tokens()[0])
    g = gradients(model, sae, run.tokens, [(POSITION, TARGET)])
    d = DirectPath(model, sae).directions([TARGET], None, g)
    torch.testing.assert_close(d * run.unit[POSITION], g)
    assert run.unit[POSITION].item() != pytest.approx(1, rel=0.01)


def test_there_is_no_direct_path_from_within_a_head():
    with pytest.raises(ValueError, match=r"\bdirect path\b.*'blocks\.0\.attn\.hook_z'"):
        DirectPath(tiny_model(torch.float64), pair_sae(hook_name="blocks.0.attn.hook_z"))


def prompt_for_both(model, sae) -> tuple[torch.Tensor, int]:
    """A prompt and a position where both planted features fire."""
    for tokens in some_tokens(20):
        run = run_prompt(model, sae, tokens)
        features = [set(i[v > 0].tolist()) for i, v in zip(*run.reads.read, strict=True)]
        places = [place for place, found in enumerate(features) if {2, 5} <= found and place > 0]
        if places:
            return tokens, places[0]
    raise AssertionError("no token with both features")


def model_with_a_dimension_for(token: int):
    """The last dimension of the stream moves the logit of one token and of no other."""
    model = linear_model().double()
    model.W_U[-1] = 0
    model.W_U[:, token] = 0
    model.W_U[-1, token] = 2
    return model


def test_a_planted_pair_comes_first():
    token = 11
    model = model_with_a_dimension_for(token)
    sae = planted_pair_sae(model, token)
    tokens, position = prompt_for_both(model, sae)
    run, target = run_prompt(model, sae, tokens), Target.logit(token, D_VOCAB, "its logit", against=3)
    found = attribute_token(model, sae, run, position, target, top=3)
    pair, *others = found.pairs
    assert (pair.first, pair.second) == (2, 5)
    assert [other.written.norm for other in others] == [0.0, 0.0]
    assert pair.written.promotes[0] == f"t{token}"
    # one unit of its logit for each unit of f_2 f_5
    assert pair.frozen == pytest.approx(pair.product) == pytest.approx(pair.written.direct) == pytest.approx(pair.free)


def test_a_clamp_of_the_planted_pair_moves_exactly_its_logit():
    token = 11
    model = model_with_a_dimension_for(token)
    sae = planted_pair_sae(model, token)
    tokens, position = prompt_for_both(model, sae)
    product = (
        attribute_token(
            model, sae, run_prompt(model, sae, tokens), position, Target.logit(token, D_VOCAB, "its logit"), top=1
        )
        .pairs[0]
        .product
    )
    with Splice(sae=sae).on(model):
        before = model(tokens[None])
    clamp = PairEdit(pair=(2, 5), mode="scale", value=4.0, where=(position,))
    with Splice(sae=sae, edits=[clamp]).on(model):
        after = model(tokens[None])
    assert after[0, position, token].item() == pytest.approx(before[0, position, token].item() + 3 * product)
    others = torch.ones_like(before, dtype=torch.bool)
    others[0, position, token] = False
    # x in the other dimensions is the same, and the last one's weights are 0
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-12)


def test_without_the_planted_pair_nothing_is_found():
    model = model_with_a_dimension_for(11)
    tokens, position = prompt_for_both(model, planted_pair_sae(model, 11))
    sae = planted_pair_sae(model, 11, planted=False)
    run = run_prompt(model, sae, tokens)
    found = attribute_token(model, sae, run, position, TARGET, top=3)
    for pair in found.pairs:
        assert (pair.written.norm, pair.flipped) == (0, 0)
        # logits of float64 from batches of other sizes
        assert (pair.frozen, pair.free) == pytest.approx((0, 0), abs=1e-10)
    assert found.all_pairs.norm == 0
    assert found.sum_error == pytest.approx(0, abs=1e-10)
    assert norms(TokenPairs.of(run.reads.read), run.reads.gates, PathWeights.of(sae)).max() == 0


def test_special_tokens_are_refused():
    model, sae = tiny_model(torch.float64), pair_sae(hook_name=HOOK)
    run = run_prompt(model, sae, some_tokens()[0][:4])
    with pytest.raises(ValueError, match=r"\btoken 0 of 4\b.*\b1, 2, 3\b"):
        attribute_token(model, sae, run, 0, TARGET)
