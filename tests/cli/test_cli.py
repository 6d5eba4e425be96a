"""Flags that mean what SAELens's own command line means by them, and mistakes in them."""

import re
from dataclasses import fields

import pytest
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_nfm.cli.parser import Option, respelt
from sae_nfm.cli.train import HIDDEN, parse
from sae_nfm.evaluation.saelens_evals import EvaluateConfig
from sae_nfm.training.run import EMBEDDED, EMBEDDED_SAE, train_arguments
from sae_nfm_cli import main

TRIED = ("joint_nfm", "sequential_nfm", "matryoshka_batchtopk", "gated")
"""With our fields, standing on another SAE, with a field that has no default, and without k."""
ALL = [
    pytest.param(name, marks=[] if name in TRIED else pytest.mark.slow) for name in sorted(SAE_TRAINING_CLASS_REGISTRY)
]
OURS = {"record_every", "held_out", "evaluate_every", "warm_start", "primary", "adapter", "json", "debug"} | {
    "activations",
    "shuffle_rows",
}


def printed_help(capsys, *argv: str) -> str:
    assert main([*argv, "--help"]) == 0
    return capsys.readouterr().out


def saelens_flags(capsys, architecture: str) -> set[str]:
    """Flags that SAELens's own help names for an architecture."""
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", architecture, "--help"])
    usage, _, _ = capsys.readouterr().out.partition("options:")
    return {flag.lstrip("-") for flag in re.findall(r"\[(--?[\w.]+)", usage)} - {"h"}


@pytest.mark.parametrize("architecture", ALL)
def test_train_has_exactly_the_flags_of_saelens(architecture, capsys):
    text = printed_help(capsys, "train", "--architecture", architecture)
    _, _, options = text.partition("model and hook point options:")
    lines = re.findall(r"^  (-.*?)(?:  |$)", options, re.MULTILINE)
    shown = {re.findall(r"--(?!no_)([\w.]+)", line)[-1] for line in lines}
    theirs = {{"sae": "architecture"}.get(flag, flag) for flag in saelens_flags(capsys, architecture)}
    assert shown == theirs - set(HIDDEN) | OURS


def test_help_of_train_has_no_noise(capsys):
    text = printed_help(capsys, "train")
    _, _, wandb = text.partition("Weights & Biases options:")
    assert "--log_to_wandb " in wandb
    assert "(default: False; SAELens's: True)" in " ".join(wandb.split())
    for noise in (
        "Config(",
        "<__TEMP__>",
        "unless this window is larger",
        "--nostreaming",
        "Inherited from",
        "(None,)",
    ):
        assert noise not in text


def test_help_of_evaluate_describes_every_option(capsys):
    text = printed_help(capsys, "evaluate")
    for field in fields(EvaluateConfig):
        assert field.name in ("sae", "sae_id") or re.search(rf"--{field.name.replace('_', '-')}[ ,\n]", text)
    words = " ".join(text.split())
    assert "SAE Folder of a saved SAE, or a released one as release:sae_id or release sae_id." in words
    assert "zeroes the hook point everywhere, at special tokens too" in words


@pytest.mark.parametrize("architecture", ALL)
def test_flags_given_mean_what_they_mean_to_saelens(architecture):
    """Where our defaults differ, the flag is given: then both parsers make the same configuration."""
    names = {field.name for field in fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])}
    given = {name: value for name, value in EMBEDDED.items() if name != "exclude_special_tokens"}
    given |= {name: value for name, value in EMBEDDED_SAE.items() if name in names}
    given |= {"model_from_pretrained_kwargs": '{"fold_ln": true}', "exclude_special_tokens": True, "log_to_wandb": True}
    given |= {"architecture": architecture, "model_name": "gpt2", "wandb_id": "x", "d_in": 7, "adam_beta1": 0.8}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    flags += ["--seqpos_slice", "1", "-3", "--sequence_separator_token", "none", "--nostreaming"]
    flags += ["--sae.dtype", "bfloat16"]
    if architecture == "sequential_nfm":
        flags += ["--normalize_activations", "none"]  # the base normalises
    if "matryoshka_widths" in names:
        flags += ["--matryoshka_widths", "5", "2048"]
    ours, theirs = parse(flags), _parse_cfg_args(flags)
    assert ours.cfg.to_dict() == theirs.to_dict()
    assert ours.cfg.sae.d_in == 7  # so that the flags were read at all
    assert {"d_in", "adam_beta1", "streaming"} <= ours.given


def test_values_that_saelens_cannot_read_are_read():
    flags = ["--seqpos-slice", "1", "None", "--exclude-special-tokens", "[0, 5]", "--output_path", "None"]
    cfg = parse([*flags, "--checkpoint_path=None", "--hook_head_index", "None"]).cfg
    assert (cfg.seqpos_slice, cfg.exclude_special_tokens) == ((1, None), [0, 5])
    assert (cfg.output_path, cfg.checkpoint_path, cfg.hook_head_index) == (None, None, None)


def test_defaults_on_another_model_are_saelens_s_but_for_wandb():
    ours, theirs = (
        parse(["--model_name", "gpt2", "--wandb_id", "x"]).cfg,
        _parse_cfg_args(["--architecture", "joint_nfm", "--model_name", "gpt2", "--wandb_id", "x"]),
    )
    assert ours.logger.log_to_wandb is False
    ours.logger.log_to_wandb = True
    assert (theirs.n_batches_in_buffer, ours.n_batches_in_buffer) == (20, 128)  # 20 x 128 tokens are less than a batch
    theirs.n_batches_in_buffer = ours.n_batches_in_buffer
    assert ours.to_dict() == theirs.to_dict()


def test_matryoshka_widths_unless_given():
    flags = ["--architecture", "matryoshka_batchtopk", "--d_sae", "48"]
    assert parse(flags).cfg.sae.matryoshka_widths == [6, 12, 24, 48]
    assert parse([*flags, "--matryoshka_widths", "3", "48"]).cfg.sae.matryoshka_widths == [3, 48]


def test_a_run_from_typed_values_is_the_run_of_its_command_line():
    given = {"architecture": "topk", "k": 4, "lr": "1e-3", "seqpos_slice": [1, None], "sae.dtype": "float32"}
    argv = [
        "--architecture",
        "topk",
        "--k",
        "4",
        "--lr",
        "1e-3",
        "--seqpos_slice",
        "1",
        "None",
        "--sae.dtype",
        "float32",
    ]
    parsed, made = parse([*argv, "--wandb_id", "x"]), train_arguments(given | {"wandb_id": "x"}, argv=argv)
    assert made.cfg.to_dict() == parsed.cfg.to_dict()
    with pytest.raises(ValueError, match="no option kk"):
        train_arguments({"kk": 4}, argv=[])
    with pytest.raises(ValueError, match="k is 'many'"):
        train_arguments({"k": "many"}, argv=[])


OPTIONS = [
    Option(name="sae", type=str, positional=True),
    Option(name="hook", type=str),
    Option(name="save", type=str | None),
    Option(name="d_sae", type=int),
    Option(name="k", type=int),
    Option(name="pairs", type=bool),
    Option(name="prepend_bos", type=bool | None),
]


@pytest.mark.parametrize(
    ("argv", "new", "told"),
    [
        ("--hook a_b --d-sae 4 x", "--hook a_b --d-sae 4 x", ()),
        (
            "--hook-name a_b --d_sae=-4",
            "--hook a_b --d-sae=-4",
            ("--hook-name is now --hook", "--d_sae is now --d-sae"),
        ),
        ("--hook_name=a-b -5", "--hook=a-b -5", ("--hook_name is now --hook",)),
        ("--output x", "--save x", ("--output is now --save",)),
        ("--save none", "--save None", ()),
        ("--pairs true", "--pairs", ("--pairs true is now --pairs",)),
        ("--pairs False", "--no-pairs", ("--pairs False is now --no-pairs",)),
        ("--nopairs", "--no-pairs", ("--nopairs is now --no-pairs",)),
        ("--prepend-bos", "--prepend-bos True", ()),
        ("--no-prepend-bos --pairs x", "--prepend-bos False --pairs x", ()),
        ("y --sae x", "x y", ()),
        ("--other_one -- --hook-name", "--other_one -- --hook-name", ()),
    ],
)
def test_old_spellings_work_and_are_told_of(argv, new, told, capsys):
    args, _ = respelt(argv.split(), OPTIONS, underscores=False)
    assert args == new.split()
    assert capsys.readouterr().err == "".join(
        f"sae-nfm: {line}; the old spelling works until version 0.3\n" for line in told
    )


def test_names_of_saelens_are_no_old_spelling(capsys):
    args, given = respelt(["--d-sae", "4", "--hook_name", "x", "--pairs", "false"], OPTIONS, underscores=True)
    assert args == ["--d_sae", "4", "--hook", "x", "--no_pairs"]
    assert given == {"d_sae", "hook", "pairs"}
    assert capsys.readouterr().err == ""


def test_options_mean_the_same_in_train():
    common = parse(["--model", "gpt2", "--hook", "h", "--dataset", "d", "--output", "o", "--held-out", "t"])
    cfg, record = common.cfg, common.record
    assert (cfg.model_name, cfg.hook_name, cfg.dataset_path, cfg.output_path) == ("gpt2", "h", "d", "o")
    assert record.held_out == "t"
    assert common.given == {"model_name", "hook_name", "dataset_path", "output_path", "held_out"}


def told_of_a_mistake(capsys, *argv: str) -> str:
    """The one line on stderr."""
    assert main(argv) == 2
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith("sae-nfm: ")
    assert told.count("\n") == 1
    assert told.endswith("\n")
    return told


def test_push_says_what_is_wrong_with_its_source(capsys):
    assert "'nowhere'" in told_of_a_mistake(capsys, "push", "nowhere", "user/repository")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train", "--foo", "1"], "--foo 1; .*`sae-nfm train --help`"),
        (["train", "--lr", "x"], "--lr: .*'x'.*`sae-nfm train --help`"),
        (["train", "--architecture", "tok"], f"'tok'.*{', '.join(SAE_TRAINING_CLASS_REGISTRY)}"),
        (["train", "--k", "99", "--d_sae", "9"], r"\bk\b.*\bd_sae\b.*\b9\b.*\b99\b"),
        (["train", "--record_every", "0"], r"\brecord_every\b.*\b0\b"),
        (["evaluate"], r"\bSAE\b.*`sae-nfm evaluate --help`"),
        (["demo", "--k", "0"], r"\bk\b.*\b0\b"),
        (["demo", "--foo"], "--foo; .*`sae-nfm demo --help`"),
        (["demo", "--devise", "cpu"], "--devise cpu; did you mean --device.*`sae-nfm demo --help`"),
        (["explore", "a", "b"], "unexpected argument b; .*`sae-nfm explore --help`"),
        (["train", "--exclude_special_tokens", "some"], "--exclude_special_tokens: 'some'.*`sae-nfm train --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(argv, told, capsys):
    assert re.search(told, told_of_a_mistake(capsys, *argv))
