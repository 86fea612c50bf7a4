"""Train a small GPT-2 here, for want of a trained model with plain MLPs that ships anywhere.

    python -m benchmarks.plain [--folder DIR] [--steps N]

6 layers of 1,024 GELU neurons, a vocabulary of 4,096, on the passages and news of data/: 16 minutes
on two cores with other work beside, down to 5.0 nats a token. For benchmarks.rules.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sparc3.base.files import read_jsonl

END = "<|endoftext|>"
LENGTH, ROWS, RATE = 128, 32, 1e-3


def texts() -> list[str]:
    fields = {"boolq": "passage", "xsum": "document"}
    return [
        str(row[field])
        for name, field in fields.items()
        for row in read_jsonl(Path("data") / f"{name}.jsonl")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("models/plain"))
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(), vocab_size=4096, special_tokens=[END])
    ids = torch.tensor(
        [i for e in bpe.encode_batch(texts()) for i in (bpe.token_to_id(END), *e.ids)]
    )
    print(f"{len(ids):,} tokens")
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows))]
    shape: dict[str, Any] = {"vocab_size": 4096, "n_embd": 256, "n_layer": 6, "n_head": 4}
    shape |= {"n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}
    shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, given.steps, pct_start=0.1)
    for step in range(given.steps):
        at = step * ROWS % (len(rows) - ROWS)
        batch = rows[at : at + ROWS]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        pace.step()
        if step % 50 == 0 or step == given.steps - 1:
            print(f"step {step}: {loss.item():.2f} nats a token", flush=True)
    model.save_pretrained(given.folder)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END
    ).save_pretrained(given.folder)


if __name__ == "__main__":
    main()
