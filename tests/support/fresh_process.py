"""What a process sees that has imported nothing yet. One process for all such tests: importing torch and SAELens takes seconds.

    python fresh_process.py FOLDER

writes FOLDER/seen.json. Its parts come in this order: without `import sae_nfm`, then what follows from that import.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FRESH = "fresh-process"
"""The folder's name among those that the whole run shares."""
ARCHITECTURES = ("joint_nfm", "sequential_nfm")
COMMAND_LINE = """--architecture joint_nfm --d_in 16 --d_sae 32 --k 4 --model_class_name AutoModelForCausalLM
    --hook_name transformer.h.0 --context_size 16 --training_tokens 512 --train_batch_size_tokens 64 --lr 1e-2
    --n_batches_in_buffer 8 --store_batch_size_prompts 8 --log_to_wandb False"""
"""Of SAELens's training, without its paths."""
EARLY: dict[str, Any] = {}
"""What was imported from SAELens before sae_nfm was."""


def the_import_alone(folder: Path) -> dict[str, Any]:
    """In a copy of the process, so that it is the first import here and in the part after: three times, warnings as errors."""
    import sae_lens  # noqa: F401

    child = os.fork()
    if not child:
        try:
            found = _imported_three_times(folder / "joint_nfm")
        except BaseException:
            found = {"failed": traceback.format_exc()}
        (folder / "imported.json").write_text(json.dumps(found))
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads((folder / "imported.json").read_text())


def _imported_three_times(saved: Path) -> dict[str, Any]:
    import importlib
    import warnings

    from sae_lens import SAE, registry

    warnings.simplefilter("error")
    before, added = set(sys.modules), set()
    for _ in range(3):
        for name in set(sys.modules) - before:
            del sys.modules[name]
        sae_nfm = importlib.import_module("sae_nfm")
        added |= {name.split(".")[0] for name in set(sys.modules) - before}
    importlib.reload(sae_nfm)
    current = (
        registry.get_sae_class("joint_nfm") == (sae_nfm.JointNFMSAE, sae_nfm.JointNFMSAEConfig)
        and registry.get_sae_training_class("joint_nfm")
        == (sae_nfm.JointNFMTrainingSAE, sae_nfm.JointNFMTrainingSAEConfig)
        and SAE.get_sae_config_class_for_architecture("joint_nfm") is sae_nfm.JointNFMSAEConfig
    )
    loaded = SAE.load_from_disk(saved)
    return {"added": sorted(added), "current": current, "type": type(loaded) is sae_nfm.JointNFMSAE}


def without_the_import(folder: Path) -> dict[str, Any]:
    """What SAELens alone says of each saved SAE."""
    from sae_lens import SAE
    from sae_lens.evals import all_loadable_saes
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    EARLY.update(loadable=all_loadable_saes, directory=get_pretrained_saes_directory)
    said: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        try:
            said[architecture] = type(SAE.load_from_disk(folder / architecture)).__name__
        except Exception:
            said[architecture] = traceback.format_exc()
    return said | {"imported": [name for name in sys.modules if name.startswith("sae_nfm")]}


def as_the_note_says(folder: Path) -> dict[str, Any]:
    """The Python of each folder's note as it stands there, but for the folder; the first is what imports sae_nfm."""
    import torch

    x = torch.tensor(json.loads((folder / "x.json").read_text()))
    found: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        note = (folder / architecture / "README.md").read_text()
        advice = note[note.index("import sae_nfm") :].replace('"this folder"', repr(str(folder / architecture)))
        names: dict[str, Any] = {}
        exec("\n".join(line.strip() for line in advice.splitlines()), names)
        sae = names["sae"]
        found[architecture] = {"type": type(sae).__name__, "acts": sae.encode(x).tolist(), "out": sae(x).tolist()}
    return found | {"releases read by then": EARLY["directory"].cache_info().currsize}


def directory_of_releases(folder: Path) -> dict[str, Any]:
    """SAELens's releases, for one who imported its functions before sae_nfm and, read anew, for one who does so now."""
    loadable = [sae_id for release, sae_id, _, _ in EARLY["loadable"]() if release == "sae-nfm-demo"]
    early = list(EARLY["directory"]())
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as late

    late.cache_clear()
    return {"loadable": loadable, "early": early, "late": list(late())}


def an_old_name(folder: Path) -> list[Any]:
    """File and line of each warning where user.py imports a module by its name in 0.1.0, on its second line."""
    code = compile("import sae_nfm\nfrom sae_nfm.baselines import training_arms", "user.py", "exec")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", FutureWarning)
        exec(code, {})
    return [(one.filename, one.lineno, str(one.message)) for one in warned if one.category is FutureWarning]


def through_the_hub(folder: Path) -> dict[str, bool]:
    """By HF_ENDPOINT and HF_TOKEN, as a user has it: which ways give the weights that were saved."""
    import torch
    from sae_lens import SAE
    from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

    from sae_nfm.hub.push_pull import PullConfig, PushConfig, pull, push

    saved = folder / "joint_nfm"
    push(PushConfig(source=saved, repo_id="user/pushed", sae_id="mine"))
    upload_saes_to_huggingface({"mine": saved}, "user/uploaded", show_progress=False)
    pulled = pull(PullConfig(repo_id="user/pushed", output=folder / "pulled"))
    saes = {
        "pulled": SAE.load_from_disk(pulled.folder / "mine"),
        "pushed": SAE.from_pretrained("user/pushed", "mine"),
        "SAELens's own uploader": SAE.from_pretrained("user/uploaded", "mine"),
    }
    expected = SAE.load_from_disk(saved).state_dict()
    return {
        name: sae.state_dict().keys() == expected.keys()
        and all(torch.equal(tensor, expected[key]) for key, tensor in sae.state_dict().items())
        for name, sae in saes.items()
    }


def trained_by_saelens_command_line(folder: Path) -> list[str]:
    """FOLDER/trained, by SAELens's own command line, for which nothing was done but to import sae_nfm."""
    from sae_lens.llm_sae_training_runner import _run_cli

    flags = {"--dataset_path": folder / "corpus", "--model_name": folder / "model", "--output_path": folder / "trained"}
    _run_cli([*COMMAND_LINE.split(), *(str(word) for flag in flags.items() for word in flag)])
    return [path.name for path in (folder / "trained").iterdir()]


PARTS: tuple[Callable[[Path], Any], ...] = (
    the_import_alone,
    without_the_import,
    as_the_note_says,
    directory_of_releases,
    an_old_name,
    through_the_hub,
    trained_by_saelens_command_line,
)


def make(folder: Path) -> None:
    """Save an SAE of each architecture, start the process and keep what it saw."""
    from builders import inference_sae, random_activations, random_sae, saved_base, training_config
    from hub_server import TOKEN, HubServer
    from tiny_models import write_checkpoint

    from sae_nfm.architectures.sequential_config import SequentialNFMTrainingSAEConfig

    folder.mkdir(parents=True)
    inference_sae(training_config("joint_nfm")).save_model(folder / "joint_nfm")
    (folder / "joint_nfm" / "runner_cfg.json").write_text(json.dumps({"training_tokens": 12_345, "lr": 0.002}))
    shutil.copytree(saved_base(d_in=16, d_sae=32, k=4), folder / "base")
    sequential = SequentialNFMTrainingSAEConfig(base=str(folder / "base"), nfm_dim=8, use_square_path=True)
    random_sae(sequential).save_inference_model(folder / "sequential_nfm")
    shutil.rmtree(folder / "base")  # a saved SAE has its base with it
    write_checkpoint(folder / "model", "gpt2")
    (folder / "corpus").mkdir()
    texts = [" ".join(f"t{1 + (7 * i + j * j) % 49}" for j in range(5 + i % 40)) for i in range(100)]
    (folder / "corpus" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "x.json").write_text(json.dumps(random_activations().tolist()))
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, __file__, str(folder)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def seen(once: Callable[[str, Callable[[Path], object]], Path], part: Callable[[Path], Any]) -> Any:
    """What a part returned, of the one process of the whole run; where that part failed, an error with its traceback."""
    found = json.loads((once(FRESH, make) / "seen.json").read_text())[part.__name__]
    assert "failed" not in found, found["failed"]
    return found


def main(folder: Path) -> None:
    found = {}
    for part in PARTS:
        try:
            found[part.__name__] = part(folder)
        except Exception:
            found[part.__name__] = {"failed": traceback.format_exc()}
    (folder / "seen.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
