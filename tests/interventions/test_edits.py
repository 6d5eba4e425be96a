"""Edits of an SAE that runs by itself: each mode by hand, what keeps its bits, what adds up to what, and errors."""

import pytest
import torch
from builders import ARCHITECTURES, D_MODEL, D_SAE, inference_sae, random_activations, random_sae, training_config
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from sae_nfm.interventions.edits import Edit, PairEdit, ReadEdit, TokensInTurn, hook_functions
from sae_nfm.interventions.intervene import Splice
from sae_nfm.models.splicing import Attached, keeping, reconstruction

FEATURES = "hook_sae_acts_post"
PATHS = ("direct", "linear", "square", "interaction")
EXACT = {"atol": 1e-12, "rtol": 0}  # float64, values of size 1 to 10
POINTS = (FEATURES, "hook_sae_recons", "hook_nfm_linear", "hook_nfm_square", "hook_nfm_pooled", "hook_nfm_hidden_pre")


def new_sae(architecture="joint_nfm", **overrides):
    return inference_sae(training_config(architecture, dtype="float64", **overrides)).requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    return new_sae()


@pytest.fixture(scope="module")
def x():
    """Two rows of twelve tokens."""
    return random_activations().double().reshape(2, 12, D_MODEL)


def hand_made(top_k=None):
    """Features are the positive inputs; V, W_1, W_2 small whole numbers, so that everything can be worked out by hand."""
    cfg = training_config(
        "joint_nfm",
        d_in=3,
        d_sae=3,
        k=3,
        nfm_dim=2,
        nfm_top_k=top_k,
        square_scale=2.0,
        rescale_acts_by_decoder_norm=False,
    )
    sae, eye = inference_sae(cfg).requires_grad_(False), torch.eye(3)
    weights = dict.fromkeys(("b_enc", "b_dec", "b_lin", "b_1", "b_2"), 0.0) | {"W_enc": eye, "W_dec": eye}
    weights |= {"W_lin": 10 * eye, "U": 100 * eye, "W_1": torch.eye(2)}
    weights |= {"V": torch.tensor([[1.0, 2], [3, 1], [1, 1]]), "W_2": torch.tensor([[1.0, 0, 0], [0, 1, 0]])}
    for name, value in weights.items():
        getattr(sae, name).copy_(torch.as_tensor(value).expand_as(getattr(sae, name)))
    return sae


def at_points(sae, x, edits, **hooks):
    """What passes every hook point under edits."""
    seen = {}
    functions = hook_functions(sae, edits, TokensInTurn())
    names = [name for name in POINTS if name in sae.hook_dict]
    with Attached(owner=sae, prefix="").hooks(functions):
        reconstruction(sae, x, {name: keeping(seen, name) for name in names})
    return {name: value.to_dense() for name, value in seen.items()}


def output(sae, x, *edits):
    return Splice(sae=sae, edits=edits).reconstruct(x)


@pytest.mark.parametrize(
    ("mode", "value", "features"),
    [("clamp", 4.0, [2.0, 4, 4]), ("scale", -2.0, [2.0, -6, 0]), ("add", 0.5, [2.0, 3.5, 0.5])],
)
def test_each_mode_by_hand(mode, value, features):
    """f = (2, 3, 0), entries 1 and 2 edited; z = sum over pairs f_i f_j v_i*v_j with v = (1, 2), (3, 1), (1, 1)."""
    seen = at_points(
        hand_made(), torch.tensor([[[2.0, 3, -1]]]), [Edit(at=FEATURES, index=(1, 2), mode=mode, value=value)]
    )
    f = torch.tensor(features)
    z = (
        f[0] * f[1] * torch.tensor([3.0, 2])
        + f[0] * f[2] * torch.tensor([1.0, 2])
        + f[1] * f[2] * torch.tensor([3.0, 1])
    )
    assert seen[FEATURES].flatten().tolist() == features
    assert seen["hook_nfm_linear"].flatten().tolist() == (10 * f).tolist()
    assert seen["hook_nfm_square"].flatten().tolist() == (50 * f * f).tolist()
    torch.testing.assert_close(seen["hook_nfm_pooled"].flatten(), z)


def test_a_vector_has_a_number_for_each_entry():
    x, vector = torch.tensor([[[2.0, 3, -1]]]), torch.tensor([7.0, 5])
    several = [Edit(at=FEATURES, index=(2, 0), mode="clamp", value=vector)]
    assert at_points(hand_made(), x, several)[FEATURES].tolist() == [[[5, 3, 7]]]
    everything = [Edit(at=FEATURES, mode="add", value=torch.tensor([1.0, 0, 2]))]
    assert at_points(hand_made(), x, everything)[FEATURES].tolist() == [[[3, 3, 2]]]


@pytest.mark.parametrize(
    ("mode", "value", "added"), [("scale", 0.0, -6), ("scale", 3.0, 12), ("clamp", 1.0, -5), ("add", 2.0, 2)]
)
def test_a_pair_by_hand(mode, value, added):
    """c = f_0 f_1 = 6, v_0*v_1 = (3, 2): the pooled vector changes by (new c - 6) (3, 2), and nothing before it."""
    sae, x = hand_made(), torch.tensor([[[2.0, 3, 1]]])
    before = at_points(sae, x, [])
    after = at_points(sae, x, [PairEdit(pair=(1, 0), mode=mode, value=value)])
    change = (after["hook_nfm_pooled"] - before["hook_nfm_pooled"]).flatten()
    torch.testing.assert_close(change, added * torch.tensor([3.0, 2]))
    assert all(torch.equal(after[name], before[name]) for name in (FEATURES, "hook_nfm_linear", "hook_nfm_square"))


def test_a_pair_outside_the_strongest_is_not_there():
    """f = (2, 3, 1), the path reads the two strongest: pair (0, 2) has c = 0, which scales to 0 and can be clamped."""
    sae, x = hand_made(top_k=2), torch.tensor([[[2.0, 3, 1]]])
    plain = output(sae, x)
    assert torch.equal(output(sae, x, PairEdit(pair=(0, 2), mode="scale", value=9.0)), plain)
    change = output(sae, x, PairEdit(pair=(0, 2), mode="clamp", value=5.0)) - plain
    assert change.flatten().tolist() == [5, 10, 0]  # 5 v_0*v_2 = 5 (1, 2) through W_1 and W_2 of ones


def test_a_pair_reads_what_other_edits_leave():
    """Feature 0 doubled: c = 12; with feature 0 read thrice as strongly by the path, given before the pair: 36."""
    sae, x = hand_made(), torch.tensor([[[2.0, 3, 0]]])
    off = PairEdit(pair=(0, 1), mode="scale", value=0.0)
    double = Edit(at=FEATURES, index=(0,), mode="scale", value=2.0)
    thrice = ReadEdit(path="interaction", index=(0,), mode="scale", value=3.0)
    for edits in ([off, double], [double, off], [double, thrice, off]):
        assert at_points(sae, x, edits)["hook_nfm_pooled"].tolist() == [[[0, 0]]]
    # the pair goes first: 12 (3, 2) are taken away, then the path reads 24 (3, 2) more
    assert at_points(sae, x, [double, off, thrice])["hook_nfm_pooled"].tolist() == [[[72, 48]]]


def test_edits_act_in_the_order_given():
    x = torch.tensor([[[2.0, 3, -1]]])
    add, double = (Edit(at=FEATURES, index=(0,), mode=mode, value=2.0) for mode in ("add", "scale"))
    assert at_points(hand_made(), x, [add, double])[FEATURES].tolist() == [[[8, 3, 0]]]
    assert at_points(hand_made(), x, [double, add])[FEATURES].tolist() == [[[6, 3, 0]]]


def test_one_path_by_hand():
    """f = (2, 3, 0), feature 1 clamped to 1 as one path reads it; feature 2 lifted from 0 beside the two that are read."""
    sae, x = hand_made(top_k=2), torch.tensor([[[2.0, 3, 1]]])
    before = at_points(sae, x, [])
    expected = {
        "direct": ("hook_sae_recons", [0, -2.0, 0]),
        "linear": ("hook_nfm_linear", [0, -20.0, 0]),
        "square": ("hook_nfm_square", [0, -400.0, 0]),
        "interaction": ("hook_nfm_pooled", [-12, -8.0]),  # f_0 (f'_1 - f_1) v_0*v_1 = -4 (3, 2)
    }
    for path, (point, change) in expected.items():
        after = at_points(sae, x, [ReadEdit(path=path, index=(1,), mode="clamp", value=1.0)])
        torch.testing.assert_close((after[point] - before[point]).flatten(), torch.tensor(change))
        unchanged = set(POINTS) - {point, "hook_sae_recons", "hook_nfm_hidden_pre"}
        assert all(torch.equal(after[name], before[name]) for name in unchanged)
    lifted = at_points(sae, x, [ReadEdit(path="linear", index=(2,), mode="clamp", value=4.0)])
    assert lifted["hook_nfm_linear"].tolist() == [[[20, 30, 40]]]
    scaled = at_points(sae, x, [ReadEdit(path="linear", index=(2,), mode="scale", value=4.0)])
    assert scaled["hook_nfm_linear"].tolist() == [[[20, 30, 0]]]


@pytest.mark.parametrize("settings", [{"rescale_acts_by_decoder_norm": True}, {"normalize_activations": "layer_norm"}])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_path_by_itself_adds_up_to_the_edit_of_the_features(x, architecture, top_k, settings):
    """The feature is made stronger where it is the strongest already, which leaves the choice of the three as it is."""
    sae = new_sae(architecture, nfm_top_k=top_k, **settings)
    acts = sae.encode(x)
    mask = acts.argmax(-1) == acts[0, 0].argmax()
    change = {"index": (int(acts[0, 0].argmax()),), "mode": "scale", "value": 1.5, "where": mask}
    edited = output(sae, x, Edit(at=FEATURES, **change))
    by_path = output(sae, x, *(ReadEdit(path=path, **change) for path in PATHS))
    torch.testing.assert_close(by_path, edited, **EXACT)
    assert (edited - output(sae, x)).abs().max() > 0.1


def test_an_edit_that_changes_the_choice_is_another():
    """f = (2, 3, 1) with two read: without feature 1 the paths would read feature 2 in its place, as one path does not."""
    sae, x = hand_made(top_k=2), torch.tensor([[[2.0, 3, 1]]])
    off = {"index": (1,), "mode": "scale", "value": 0.0}
    assert at_points(sae, x, [Edit(at=FEATURES, **off)])["hook_nfm_linear"].tolist() == [[[20, 0, 10]]]
    assert at_points(sae, x, [ReadEdit(path="linear", **off)])["hook_nfm_linear"].tolist() == [[[20, 0, 0]]]


@pytest.mark.parametrize(("mode", "value"), [("scale", 0.9), ("add", 0.5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predicted_is_measured_for_a_pair(x, architecture, mode, value):
    """Gates held: exactly the change of c times ((v_i * v_j) W_1 D) W_2. Free: what the flipped gates add to it."""
    sae = new_sae(architecture)
    acts = sae.encode(x).flatten(0, 1)
    strongest = acts.topk(3, dim=-1)
    read = torch.zeros_like(acts).scatter(-1, strongest.indices, strongest.values)
    hidden = at_points(sae, x, [])["hook_nfm_hidden_pre"].flatten(0, 1)
    unflipped, flipped = 0, 0
    for token, (i, j) in enumerate(strongest.indices[:, :2].tolist()):
        c = read[token, i] * read[token, j]
        change = (value * c - c if mode == "scale" else value) * (sae.V[i] * sae.V[j]) @ sae.W_1
        before, after = hidden[token], hidden[token] + change
        held, free = (change * (before > 0)) @ sae.W_2, (after.relu() - before.relu()) @ sae.W_2
        edit = PairEdit(pair=(i, j), mode=mode, value=value)
        measured = (output(sae, x, edit) - output(sae, x)).flatten(0, 1)[token]
        torch.testing.assert_close(measured, free, **EXACT)
        if torch.equal(before > 0, after > 0):
            torch.testing.assert_close(measured, held, **EXACT)
            unflipped += int(held.norm() > 1e-3)
        else:
            flipped += int((measured - held).norm() > 1e-6)
    assert min(unflipped, flipped) > 0


@pytest.mark.parametrize(("mode", "value"), [("scale", 1.0), ("add", 0.0)])
def test_identity_changes_no_bit(sae, x, mode, value):
    plain, arguments = output(sae, x), {"mode": mode, "value": value}
    edits = [Edit(at=point, **arguments) for point in POINTS]
    edits += [PairEdit(pair=(3, 5), **arguments), *(ReadEdit(path=path, **arguments) for path in PATHS)]
    for edit in edits:
        assert torch.equal(output(sae, x, edit), plain)
    assert torch.equal(output(sae, x, *edits), plain)


def test_what_is_not_chosen_keeps_its_bits(sae, x):
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3] = mask[1, -2] = True
    plain = at_points(sae, x, [])
    for where in (mask, (3, -2)):
        chosen = mask if where is mask else mask.any(0).expand(2, 12)
        arguments = {"mode": "add", "value": 1.5, "where": where}
        for edit in (
            *(Edit(at=point, index=(1,), **arguments) for point in POINTS),
            *(ReadEdit(path=path, index=(1,), **arguments) for path in PATHS),
            PairEdit(pair=(1, 2), **arguments),
        ):
            found = at_points(sae, x, [edit])
            assert all(torch.equal(found[name][~chosen], plain[name][~chosen]) for name in POINTS)
            change = (found[edit.hook_point] - plain[edit.hook_point]).abs().amax(-1)
            assert (change[chosen] > 1e-3).all()
    entries = at_points(sae, x, [Edit(at=FEATURES, index=(1, 7), mode="add", value=1.5)])[FEATURES]
    others = [entry for entry in range(D_SAE) if entry not in (1, 7)]
    assert torch.equal(entries[..., others], plain[FEATURES][..., others])


def test_all_positions_or_a_mask_of_all_are_all_tokens(sae, x):
    for kind in (
        lambda where: Edit(at=FEATURES, index=(1, 2), mode="clamp", value=2.0, where=where),
        lambda where: PairEdit(pair=(1, 2), mode="clamp", value=2.0, where=where),
        lambda where: ReadEdit(path="linear", index=(1, 2), mode="clamp", value=2.0, where=where),
    ):
        everywhere = output(sae, x, kind(None))
        assert torch.equal(output(sae, x, kind(torch.ones(2, 12, dtype=torch.bool))), everywhere)
        assert torch.equal(output(sae, x, kind(tuple(range(-12, 0)))), everywhere)
        assert not torch.equal(output(sae, x, kind((0,))), everywhere)


def test_sparse_activations_are_edited(x):
    """COO features, as SAELens's TopK makes them: the same as dense ones."""
    dense, sparse = (
        random_sae(training_config("joint_nfm", rescale_acts_by_decoder_norm=False)).eval() for _ in range(2)
    )
    dense.activation_fn.use_sparse_activations, sparse.activation_fn.use_sparse_activations = False, True
    x = x.float()
    assert sparse.encode(x).is_sparse
    edits = [
        Edit(at=FEATURES, index=(1, 2), mode="clamp", value=2.0),
        PairEdit(pair=(1, 2), mode="scale", value=0.0),
        ReadEdit(path="linear", index=(1,), mode="add", value=1.0),
    ]
    torch.testing.assert_close(output(sparse, x, *edits), output(dense, x, *edits))
    assert (output(sparse, x, *edits) - output(sparse, x)).abs().max() > 0.1


def test_gradients_reach_the_features(sae, x):
    """Feature 1 clamped: what it was has no influence any more; that of the others is that of the path without it."""
    x = x.clone().requires_grad_()
    output(sae, x, Edit(at=FEATURES, mode="clamp", value=1.0)).sum().backward()
    assert not x.grad.any()
    x.grad = None
    output(sae, x, Edit(at=FEATURES, index=(1,), mode="add", value=1.0)).sum().backward()
    assert x.grad.any()


def test_the_capacity_control_and_saelens_own_architectures(x):
    mlp = new_sae(head="mlp")
    change = {"index": (1,), "mode": "add", "value": 2.0}
    edit = ReadEdit(path="interaction", **change)
    pooled = at_points(mlp, x, [edit])["hook_nfm_pooled"] - at_points(mlp, x, [])["hook_nfm_pooled"]
    torch.testing.assert_close(pooled, (2 * mlp.V[1]).expand_as(pooled), **EXACT)
    topk = SAE.from_dict(
        {"architecture": "topk", "d_in": D_MODEL, "d_sae": D_SAE, "k": 4, "rescale_acts_by_decoder_norm": True}
        | {"dtype": "float64", "metadata": SAEMetadata(hook_name="blocks.0.hook_resid_post").to_dict()}
    ).requires_grad_(False)
    torch.nn.init.normal_(topk.W_dec, generator=torch.Generator().manual_seed(0))
    by_path = output(topk, x, ReadEdit(path="direct", **change))
    torch.testing.assert_close(by_path, output(topk, x, Edit(at=FEATURES, **change)), **EXACT)
    torch.testing.assert_close(
        by_path - output(topk, x), (2 * topk.W_dec[1] / topk.W_dec[1].norm()).expand_as(x), **EXACT
    )


def test_identity_tells_edits_apart():
    mask = torch.ones(2, 3, dtype=torch.bool)
    change = {"mode": "clamp", "value": 2.0}
    edits = [
        Edit(at=FEATURES, **change),
        Edit(at="hook_nfm_pooled", **change),
        Edit(at=FEATURES, mode="scale", value=2.0),
        Edit(at=FEATURES, mode="clamp", value=2.5),
        Edit(at=FEATURES, index=(1, 2), **change),
        Edit(at=FEATURES, index=(1, 2), mode="clamp", value=torch.tensor([1.0, 2])),
        Edit(at=FEATURES, index=(2, 1), mode="clamp", value=torch.tensor([1.0, 2])),
        Edit(at=FEATURES, index=(1, 2), mode="clamp", value=torch.tensor([2.0, 1])),
        Edit(at=FEATURES, where=(1,), **change),
        Edit(at=FEATURES, where=(-1,), **change),
        Edit(at=FEATURES, where=mask, **change),
        Edit(at=FEATURES, where=~mask, **change),
        PairEdit(pair=(1, 2), **change),
        PairEdit(pair=(1, 3), **change),
        ReadEdit(path="linear", **change),
        ReadEdit(path="direct", **change),
        ReadEdit(path="linear", index=(1,), **change),
    ]
    assert len({edit.identity for edit in edits}) == len(edits)
    assert edits[0].identity == "clamp 2.0 at hook_sae_acts_post, all entries, all tokens"
    assert PairEdit(pair=(2, 1), **change).identity == edits[12].identity == "clamp 2.0 pair [1, 2], all tokens"
    assert Edit(at=FEATURES, where=mask.clone(), **change).identity == edits[10].identity
