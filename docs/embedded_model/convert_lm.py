"""Convert a trained model into package data: Hugging Face folder -> the same in half precision.

python docs/embedded_model/convert_lm.py --source FOLDER
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from whole_folder import written_whole

from sae_nfm.demo.model import MODEL_DIR, load_gpt2


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, and where it goes."""

    source: Path
    """Hugging Face folder of a GPT-2-shaped model, such as `train_lm` writes."""
    output: Path = MODEL_DIR
    """Folder for the half-precision model; the packaged one unless told otherwise."""


def convert(config: ConvertConfig) -> None:
    """Round the weights to half precision (the tied embedding stored once) and copy the tokenizer.

    Raises:
        FileNotFoundError: the source lacks its config, its weights or one of the two tokenizer files.
        ValueError: a weight is not finite in half precision.
    """
    model = load_gpt2(config.source).half()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite in half precision; expected weights below 65,504 in magnitude")
    with written_whole(config.output) as folder:
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(config.source / name, folder / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see `--help`."""
    config = tyro.cli(ConvertConfig, args=argv)
    convert(config)
    for file in sorted(config.output.iterdir()):
        print(f"{file.stat().st_size:>10,} bytes  {file}")


if __name__ == "__main__":
    main()
