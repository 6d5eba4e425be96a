"""Every command where there is no room for its files: status 2, the path that was given, the cause; before anything is computed
where not even a small file fits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

CHILD = """
import contextlib, io, json, resource, signal, sys
from sae_nfm_cli import main

limit, commands = int(sys.argv[1]), json.loads(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
told = {}
for name, argv in commands.items():
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = main(argv)
    told[name] = [status, err.getvalue().strip().splitlines()[-1:]]
print(json.dumps(told))
"""
SIZES = "--context-size 32 --nfm-dim 4 --batch-size 128 --d-sae 12 --k 4"
TRAIN = (
    "train --context_size 32 --d_sae 12 --k 4 --training_tokens 1024 --train_batch_size_tokens 128 --n_batches_in_buffer 4 "
    "--store_batch_size_prompts 4 --n_batches_for_norm_estimate 2 --nfm_dim 4 --lr_warm_up_steps 0 --lr_decay_steps 0"
)
EVALUATE = "--batch-size-prompts 4 --n-eval-reconstruction-batches 1 --n-eval-sparsity-variance-batches 1"
COMMANDS = {
    "train": f"{TRAIN} --checkpoint_path None --output_path",
    "demo": f"demo {SIZES} --training-tokens 1024 --held-out-tokens 256 --output",
    "compare": f"compare {SIZES} --arms joint_nfm topk --seeds 0 --learning-rates 5e-3 --training-tokens 512 "
    "--held-out-tokens 192 --sweep-tokens 256 --sweep-held-out-tokens 64 --output",
    "explore": "explore {sae} --n-tokens 2560 --contexts 3 --pairs 20 --output",
    "convert": "convert {sae}",
    "report": "report . --save",
}
SMALL = {
    "evaluate": f"evaluate {{sae}} {EVALUATE} --save",
    "attribute": "attribute not --save",
    "speed": "speed --arms topk --d-in 8 --d-sae 16 --k 2 --batch 8 --repeats 1 --save",
    "factorial": "factorial --output",
    "secondary": "secondary --output",
    "reproduce": "reproduce --output",
}
"""Commands whose files are small, or which take long: there is no room for the first of them."""


def told(limit: int, commands: dict[str, str], folder: Path) -> dict[str, tuple[int, str, str]]:
    """Status, last line on stderr and output of each command, all in one process."""
    sae = folder / "sae"
    metadata = SAEMetadata(model_name="sae-nfm-demo", hook_name="blocks.2.hook_resid_post", context_size=32)
    TopKSAE(TopKSAEConfig(d_in=256, d_sae=16, k=4, metadata=metadata)).save_model(sae)
    outputs = {name: str(folder / "out" / f"{name}.json") for name in commands}
    argv = {name: [*line.format(sae=sae).split(), outputs[name]] for name, line in commands.items()}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(limit), json.dumps(argv)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (status, "".join(line), outputs[name]) for name, (status, line) in found.items()}


def assert_told(found: dict[str, tuple[int, str, str]]) -> None:
    for name, (status, line, output) in found.items():
        assert status == 2, (name, line)
        assert line.startswith(
            (f"sae-nfm: '{output}' cannot be written: ", f"sae-nfm: '{output}/explorer.json.gz' cannot be")
        ), (name, line)
        assert "partial" not in line, (name, line)
        assert "file too large; " in line, (name, line)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "commands"), [(9_000, COMMANDS), (3_000, COMMANDS | SMALL)], ids=["late", "early"])
def test_no_room(limit, commands, tmp_path):
    assert_told(told(limit, commands, tmp_path))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()] if limit < 4096 else []
    assert written == []
