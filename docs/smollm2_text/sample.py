"""Sample the packaged text of `--model smollm2` from the model itself: its answers to prompts of many kinds.

    python docs/smollm2_text/sample.py --output FOLDER

A document is one answer, to a form of text and a topic that no other document has both of; the prompt is not part of the text.
The answers are a function of the seed, the batch size, the version of torch and the machine's arithmetic.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

FORMS = (
    "Write a short story about {}.",
    "Explain {} to a curious child.",
    "Write a newspaper report about {}.",
    "Write a letter to an old friend about {}.",
    "Write a page of an encyclopaedia about {}.",
    "Write a dialogue between two neighbours about {}.",
    "Write a review of a book about {}.",
    "Write a speech for a town meeting about {}.",
    "Tell me about the history of {}.",
    "Give practical advice about {}.",
    "Write a diary entry about {}.",
    "Write an essay for and against {}.",
    "Describe {} to somebody who has never seen it.",
    "Write a travel guide that mentions {}.",
    "Tell a funny anecdote about {}.",
    "What do scientists know about {}?",
)
TOPICS = """
a lighthouse, the tides, bread, railways, a flood, beekeeping, the moon, a village school, a long winter, football, a
hospital, elections, the price of food, volcanoes, a family dinner, music lessons, forests, a lost dog, computers, an
old bridge, the stock market, whales, a wedding, gardening, ancient Rome, a court case, bicycles, sleep, a theatre,
coffee, mountains, vaccines, a haunted house, clocks, electricity, a strike at a factory, birds, a public library,
money, friendship, painting, the weather, a thief, cooking for many guests, rivers, chess, a journey by ship, the
human heart
"""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How much to sample, how, and where it goes."""

    model: Path
    """The Hugging Face folder that `sae-nfm models fetch smollm2` leaves."""
    output: Path
    """Folder for train.parquet and validation.parquet; answers.jsonl in it is gone on with after an interruption."""
    n_train: int = 200
    """Documents of the train split."""
    n_validation: int = 40
    """Documents of the validation split."""
    seed: int = 0
    """Of the order of the prompts; batch i is sampled with seed + i."""
    temperature: float = 0.8
    """Of the softmax; nothing else is cut off."""
    longest: int = 384
    """Tokens after which an answer is cut."""
    batch_size: int = 60
    """Answers sampled at once."""
    dtype: str = "bfloat16"
    """Precision in which the model is run."""


@torch.no_grad()
def main(config: SampleConfig) -> None:
    """Sample what is missing, then write both splits."""
    tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype).eval()
    prompts = [form.format(topic) for form, topic in product(FORMS, " ".join(TOPICS.split()).split(", "))]
    order = np.random.default_rng(config.seed).permutation(len(prompts))[: config.n_train + config.n_validation]
    answers = config.output / "answers.jsonl"
    config.output.mkdir(parents=True, exist_ok=True)
    answers.touch()
    documents = [json.loads(line) for line in answers.read_text().splitlines()]
    for start in tqdm(range(len(documents), len(order), config.batch_size), unit="batch"):
        asked = [prompts[i] for i in order[start : start + config.batch_size]]
        chats = [[{"role": "user", "content": prompt}] for prompt in asked]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        given = tokenizer(texts, return_tensors="pt", padding=True)
        torch.manual_seed(config.seed + start // config.batch_size)
        options = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "max_new_tokens": config.longest}
        rows = model.generate(**given, **options, eos_token_id=2, pad_token_id=2)[:, given.input_ids.shape[1] :]
        new = [
            {"prompt": prompt, "text": tokenizer.decode(row, skip_special_tokens=True).strip()}
            for prompt, row in zip(asked, rows, strict=True)
        ]
        with answers.open("a") as file:
            file.writelines(json.dumps(document) + "\n" for document in new)
        documents += new
    for split, part in (("train", documents[: config.n_train]), ("validation", documents[config.n_train :])):
        path = config.output / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, compression="zstd", compression_level=19)
        print(f"{len(part)} documents, {path.stat().st_size:,} bytes  {path}")


if __name__ == "__main__":
    main(tyro.cli(SampleConfig))
