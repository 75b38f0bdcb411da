"""Build the tiny chat model that the tests and benchmarks serve: Llama-shaped, seeded, from nothing.

    .vllm/venv/bin/python benchmarks/vllm_cpu/make_model.py OUT_DIR [--verify]

0.44 M parameters, under 1 MB, 4096 tokens of context, no model hub. Its text is noise, yet every part of the server
is real: token counts are exact, greedy answers are reproducible, printable and run to max_tokens. Two builds are
byte-identical; `--verify` proves it by building a second one beside the first.

Needs torch, transformers and tokenizers, which the vLLM environment has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

SEED = 0
VOCABULARY = 512
CONTEXT = 4096
WIDTH = 128
LAYERS = 2
HEADS = 4
RECIPE = "recipe.sha256"  # this file's own digest, left in the model folder: server.py rebuilds when it changes

ROLES = ("system", "user", "assistant", "tool")
BOS, EOS, PAD, TURN_END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIAL = [BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES), TURN_END]

TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] or '') + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# What the byte-pair vocabulary is learned from: the kind of text that simulations send.
TEXTS = (
    "You are agent 12 of 200 in a small town. It is step 7. Answer with one short action and a reason.",
    "Observation: two neighbours are near, energy is low, wealth is 40, the inbox holds one message.",
    '{"agent": 12, "step": 7, "action": "trade", "target": [4, 9], "reason": "food is cheaper there"}',
    "Memory: yesterday you promised to meet at the market. Plan the day, then say what you do next.",
    "Give a number from 0 to 100. Answer yes or no. Summarise the conversation in one sentence.",
)


def recipe_digest() -> str:
    """SHA-256 of this file: the model depends on nothing else but the pinned packages."""
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()


def folder_digest(folder: pathlib.Path) -> str:
    """SHA-256 over the names and contents of the files in *folder*."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with the chat template; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(out: pathlib.Path) -> int:
    """Write tokenizer and weights to *out*; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,  # wide enough that greedy choices are clear-cut and batching does not flip them
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    # A zero row in the output layer is a logit of 0, which never wins against the best of several hundred others:
    # greedy answers hold no end-of-text, no other special token and no unprintable byte.
    special = set(tokenizer.all_special_ids) | set(tokenizer.convert_tokens_to_ids(SPECIAL))
    silent = [i for i in range(len(tokenizer)) if i in special or not is_plain(tokenizer.decode([i]))]
    with torch.no_grad():
        model.lm_head.weight[silent] = 0.0
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return sum(p.numel() for p in model.parameters())


def is_plain(text: str) -> bool:
    """Printable ASCII only."""
    return text.isascii() and text.isprintable()


def build(out: pathlib.Path) -> str:
    """Build beside *out*, then put the finished folder in its place; returns its digest."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        parameters = make_model(scratch)
        (scratch / RECIPE).write_text(recipe_digest() + "\n")
        digest = folder_digest(scratch)
        size = sum(f.stat().st_size for f in scratch.iterdir())
        if out.exists():
            shutil.rmtree(out)
        scratch.chmod(0o755)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{out}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.2f} MB, sha256 {digest}")
    return digest


def main() -> int:
    """Build the model, and a second one to compare with `--verify`."""
    parser = argparse.ArgumentParser(description="Build the tiny chat model for the local vLLM server.")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--verify", action="store_true", help="build twice and compare every byte")
    args = parser.parse_args()
    out = args.out.resolve()
    if out.exists() and not (out / "config.json").exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} exists and holds something else than a model")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    digest = build(out)
    if args.verify:
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            if build(pathlib.Path(scratch) / "again") != digest:
                print("the second build differs from the first", file=sys.stderr)
                return 1
        print("the second build is byte-identical")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
