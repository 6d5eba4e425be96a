"""A sequential NFM without its base: a small folder that names the base, whose weights are verified when it is loaded.

save_adapter(sae, "runs/adapter", base="gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical")
sae = SAE.load_from_disk("runs/adapter")                       # finds the base by that name
sae = load_adapter("runs/adapter", base="where/it/is/now")
"""

import json
from pathlib import Path
from typing import Any, cast

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from safetensors.torch import save_file

from sae_nfm.architectures import (
    SequentialNFM,
    SequentialNFMSAE,
    SequentialNFMTrainingSAE,
    as_base,
    check_base,
    load_base,
)
from sae_nfm.common import check_output, publishing
from sae_nfm.loading import check_folder, refuse_not_finite, sha256_of, write_note


def save_adapter(sae: SequentialNFM, path: str | Path, *, base: str | None = None) -> Path:
    """Save the NFM of a sequential SAE without its base; an SAE that is in the folder `path` stays there under another name.

    `base`: folder or release:sae_id under which the base is found; the one it was made from unless given.

    Raises:
        ValueError: when the base has no such name, or what is found there has other weights; nothing is written.
    """
    check_output(path, "path", only_sae=True)
    with publishing(path, "adapter") as made:
        write_adapter(sae, made.folder, base)
    return Path(path)


def write_adapter(sae: SequentialNFM, folder: Path, base: str | None = None) -> None:
    """Write the files of `save_adapter` to a folder that is there; what else it holds stays. Raises as `save_adapter`."""
    source = base or sae.cfg.base
    if not source:
        raise ValueError("the base was given as an object, which an adapter cannot name; give base, or save all of it")
    found = load_base(source, sae.cfg.base_norm_scaling_factor, sae.cfg.dtype)
    sha256 = sha256_of(sae.base.state_dict())
    check_base(found.state_dict(), sha256, source)
    state_dict: dict[str, Any] = dict(sae.state_dict())
    refuse_not_finite(state_dict, "the SAE to save")
    config = sae.cfg.to_dict()
    if isinstance(sae, SequentialNFMTrainingSAE):
        sae.process_state_dict_for_saving_inference(state_dict)
        config = sae.cfg.get_inference_sae_cfg_dict()
    config |= {"base": source, "base_sha256": sha256}
    nfm = {name: tensor for name, tensor in state_dict.items() if not name.startswith("base.")}
    save_file(nfm, folder / SAE_WEIGHTS_FILENAME)
    (folder / SAE_CFG_FILENAME).write_text(json.dumps(config))
    write_note(folder)


def load_adapter(path: str | Path, base: str | SAE[Any], *, device: str = "cpu") -> SequentialNFMSAE:
    """Load an adapter whose base (folder, release:sae_id, or the SAE itself) is elsewhere than its config says.

    Raises:
        FileNotFoundError, ValueError: when either is missing, or the base has other weights.
    """
    check_folder(path)

    def read(path: Any, device: str = "cpu", cfg_overrides: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        config, state_dict = sae_lens_disk_loader(path, device, cfg_overrides)
        if isinstance(base, str):
            return config | {"base": base}, state_dict
        tensors = as_base(base, config["base_norm_scaling_factor"]).to(device).state_dict()
        return config, state_dict | {f"base.{name}": tensor for name, tensor in tensors.items()}

    return cast(SequentialNFMSAE, SAE.load_from_disk(path, device=device, converter=read))
