"""Rebuild everything the demo uses, from the text in ``src/clt_plugin/demo/corpus``.

    python examples/build_demo.py                          # every stage, in order
    python examples/build_demo.py --stage language-model   # one stage (``--stage`` may be repeated)

Stages:

``tokenizer``
    A byte-level BPE tokenizer of 2,048 tokens.
``language-model``
    A GPT-2 of four layers, trained on the corpus; half an hour with one thread on a busy two-core machine.
``crosscoders``
    A cross-layer transcoder and per-layer transcoders for it; about eight minutes.

The results go to ``src/clt_plugin/demo/assets`` unless ``--output`` names another folder. A seed gives
the same result each time on one machine with the same versions and the same number of threads.
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parents[1] / "src" / "clt_plugin" / "demo"

BOS = "<|endoftext|>"  # begins every document, separates documents and ends the last one
VOCABULARY = 2048  # tokens, the 256 bytes and BOS included
POSITIONS = 1024  # the longest sequence the language model reads, in tokens

# Families of licences that exist in many versions: a held-out text must not be almost the same as one
# that was trained on, so these are always trained on.
NEVER_HELD_OUT = ("mit", "bsd", "0bsd", "isc", "gpl", "lgpl", "gfdl", "apache", "cc-by")

# How often a document is repeated in the training text. Licences occur as they were written and once
# more with every paragraph on one line (see `unwrap`), so that a prompt need not be wrapped like them.
REPEATS = {"prose": 1, "licences": 1, "licences, unwrapped": 1, "mit, unwrapped": 3}

MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and "
    'associated documentation files (the "Software"), to deal in the Software without restriction, '
    "including without limitation the rights to use, copy, modify, merge, publish, distribute, "
    "sublicense, and/or"
)
BSD = (
    'THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR '
    "IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND "
    "FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT SHALL THE"
)
GPL = (
    "This program is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY; without "
    "even the implied warranty of MERCHANTABILITY or FITNESS FOR A PARTICULAR"
)
ISC = (
    "Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee "
    "is hereby granted, provided that the above copyright notice and this permission notice appear in all"
)
MEMORISED = [(MIT, " sell"), (BSD, " COPYRIGHT"), (GPL, " PURPOSE"), (ISC, " copies")]  # prompt, next text


@dataclass
class Document:
    """One file of the corpus."""

    folder: str  # "licences" or "prose"
    name: str  # the file's name without its ending
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept out of training: about one in twenty, by a hash of its name."""
        digest = hashlib.sha256(f"{self.folder}/{self.name}".encode()).digest()
        return digest[0] % 20 == 0 and not self.name.startswith(NEVER_HELD_OUT)


# ---------------------------------------------------------------------------------------------- corpus


def read_corpus(folder: Path) -> tuple[list[Document], list[Document]]:
    """Read the corpus: the documents to train on and the held-out ones, each in order of their names."""
    documents = [
        Document(path.parent.name, path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/*.txt"))
    ]
    if not documents:
        raise SystemExit(f"no corpus: {folder} has no */*.txt")
    return [d for d in documents if not d.held_out], [d for d in documents if d.held_out]


def unwrap(text: str) -> str:
    """Put every wrapped paragraph on one line.

    A line of over 50 characters is continued by the next one if that begins with a letter, a quotation mark
    or a bracket.
    """
    lines, previous = [], ""
    for line in text.splitlines():
        first = line.strip()[:1]
        if len(previous) > 50 and first and (first.isalpha() or first in "\"'(`"):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        previous = line
    return "\n".join(lines) + "\n"


def training_texts(documents: list[Document]) -> list[str]:
    """The texts of the training documents, repeated as `REPEATS` says."""
    texts = []
    for document in documents:
        texts += [document.text] * REPEATS[document.folder]
        if document.folder == "licences":
            kind = "mit" if document.name.startswith("mit") else "licences"
            texts += [unwrap(document.text)] * REPEATS[f"{kind}, unwrapped"]
    return texts


# ------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(options: argparse.Namespace) -> None:
    """Stage ``tokenizer``: learn a byte-level BPE from the training documents and save it."""
    train, _ = read_corpus(options.corpus)

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training_texts(train), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    folder = model_folder(options)
    tokenizer.save_pretrained(folder)
    # The template above already prepends BOS; TransformerLens looks for this entry as well, and older
    # versions of transformers know the class by this name only.
    update_json(folder / "tokenizer_config.json", add_bos_token=True, tokenizer_class="PreTrainedTokenizerFast")
    print(f"tokenizer: {len(tokenizer):,} tokens, saved in {folder.name}/")


# -------------------------------------------------------------------------------------- language model


def build_language_model(options: argparse.Namespace) -> None:
    """Stage ``language-model``: train a small GPT-2 on the corpus and save it in half precision.

    What it has learnt is measured on the saved weights and written to ``training.json``.
    """
    folder = model_folder(options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = read_corpus(options.corpus)

    torch.manual_seed(options.seed)
    model = GPT2LMHeadModel(language_model_config(tokenizer))
    stream = encode_stream(tokenizer, training_texts(train))
    print(f"language model: {model.num_parameters():,} parameters, {len(stream):,} tokens of training text")
    trained = train_language_model(model, stream, tokenizer, options)

    before_rounding = evaluate(model, tokenizer, held_out)["loss_nats_per_token"]
    model.config.activation_function = "gelu_new"  # the same function, by the name GPT-2 has for it
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)  # measure what was saved
    report = trained | {
        "train": evaluate(model, tokenizer, train),
        "held_out": evaluate(model, tokenizer, held_out),
        "held_out_loss_before_rounding_to_float16": before_rounding,
        "by_folder": {
            f"{split}, {name}": evaluate(model, tokenizer, [d for d in documents if d.folder == name])
            for split, documents in [("train", train), ("held out", held_out)]
            for name in ["licences", "prose"]
        },
        "memorised": [next_token(model, tokenizer, *prompt) for prompt in MEMORISED],
        "samples": [generate(model, tokenizer, prompt) for prompt in ["", "Return a new", "The Licensor"]],
        "held_out_documents": [f"{d.folder}/{d.name}" for d in held_out],
        "repeats": REPEATS,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for key in ["train", "held_out"]:
        print(f"{key}: {report[key]}")
    for row in report["memorised"]:
        print(f"P({row['next']!r} | ... {row['prompt'][-40:]!r}) = {row['probability']:.4f}")


def language_model_config(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """The architecture: GPT-2 with four layers of width 128 and four attention heads, without dropout."""
    bos = tokenizer.bos_token_id
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # gelu_new, computed in one fused operation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=bos,
        tie_word_embeddings=True,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row of token ids, each text begun by BOS and the last one ended by it: [tokens]."""
    ids = [token for text in tqdm(texts, "encoding") for token in tokenizer(text)["input_ids"]]
    return torch.tensor([*ids, tokenizer.bos_token_id])


def line_starts(stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The positions in `stream` at which a line begins (after its indentation): [lines]."""
    breaks_line = ["\n" in tokenizer.decode([i]) for i in range(len(tokenizer))]
    breaks_line[tokenizer.bos_token_id] = True
    return torch.tensor(breaks_line)[stream[:-1]].nonzero().squeeze(1) + 1


def draw_batch(stream: torch.Tensor, starts: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Draw windows of the stream, each of BOS and then the text from the start of some line on.

    Returns token ids [rows, length + 1]; the last of each row is only predicted.
    """
    starts = starts[torch.randint(len(starts), (rows, 1))]
    windows = stream[(starts + torch.arange(length)).clamp(max=len(stream) - 1)]
    return torch.cat([stream[:1].expand(rows, 1), windows], dim=1)


def token_losses(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """The loss of every token after the first, in nats: ids [rows, length + 1] -> [rows, length]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1)


def train_language_model(
    model: GPT2LMHeadModel,
    stream: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
) -> dict:
    """Train `model` in place on windows of `stream`, and return how it was trained.

    Every step reads 2,048 tokens: 8 windows of 256 tokens, or in every fifth step 2 windows of 1,024, so
    that all positions are trained. AdamW with a linear warm-up and then a cosine down to zero.
    """
    steps, warm_up, peak, tokens_per_step = options.steps, 200, 3e-3, 2048
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and layer norms: not decayed
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=True,
    )

    def learning_rate(step: int) -> float:
        return min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    starts = line_starts(stream, tokenizer)
    started, running = time.perf_counter(), None
    model.train()
    for step in (bar := tqdm(range(steps), "training")):
        length = POSITIONS if step % 5 == 4 else 256
        ids = draw_batch(stream, starts, tokens_per_step // length, length)
        loss = token_losses(model, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
    model.eval()
    return {
        "steps": steps,
        "tokens_seen": steps * tokens_per_step,
        "tokens_in_training_text": len(stream),
        "seconds": round(time.perf_counter() - started, 1),
        "running_training_loss": round(running, 4),
        "peak_learning_rate": peak,
    }


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> dict:
    """The mean loss on whole documents, each read in pieces of up to 1,023 tokens that follow a BOS.

    Returns nats per token (the BOS that ends a document counted) and bits per byte of UTF-8.
    """
    bos, nats, tokens, size = tokenizer.bos_token_id, 0.0, 0, 0
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"] + [bos]
        for begin in range(0, len(ids), POSITIONS - 1):
            piece = ids[begin : begin + POSITIONS - 1]
            nats += token_losses(model, torch.tensor([[bos, *piece]])).sum().item()
        tokens += len(ids)
        size += len(document.text.encode())
    return {
        "loss_nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "documents": len(documents),
        "tokens": tokens,
        "bytes": size,
    }


@torch.no_grad()
def next_token(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> dict:
    """How probable the first token of `text` is after BOS and `prompt`, and the three likeliest tokens."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    target = tokenizer(text, add_special_tokens=False)["input_ids"][0]
    probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    top = probabilities.topk(3).indices.tolist()
    return {
        "prompt": prompt,
        "prompt_tokens": ids.shape[1],
        "next": tokenizer.decode([target]),
        "probability": round(probabilities[target].item(), 4),
        "top": {tokenizer.decode([i]): round(probabilities[i].item(), 4) for i in top},
    }


def generate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """`prompt` and up to 100 further tokens, sampled at temperature 0.7."""
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=True, temperature=0.7, top_k=0
    )
    return tokenizer.decode(output[0, 1:], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------ main


def model_folder(options: argparse.Namespace) -> Path:
    """The folder of the language model and its tokenizer."""
    return options.output / "language-model"


def update_json(path: Path, **values) -> None:
    """Set some entries of a JSON file."""
    entries = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", "utf-8")


def build_crosscoders(options: argparse.Namespace) -> None:
    """Stage ``crosscoders``: see `demo_crosscoders`, which in its turn uses this file."""
    import demo_crosscoders

    demo_crosscoders.build_crosscoders(options)


STAGES = {"tokenizer": build_tokenizer, "language-model": build_language_model, "crosscoders": build_crosscoders}


def main() -> None:
    """Run the stages asked for, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=STAGES, help="a stage to run (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--corpus", type=Path, default=DEMO / "corpus", help="folder of the text to learn")
    parser.add_argument("--output", type=Path, default=DEMO / "assets", help="folder to write to")
    parser.add_argument("--steps", type=int, default=3600, help="training steps of the language model")
    parser.add_argument("--crosscoder-steps", type=int, default=3000, help="training steps of each crosscoder")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    options = parser.parse_args()

    transformers.logging.set_verbosity_error()  # documents longer than 1,024 tokens are cut into windows
    torch.set_num_threads(options.threads)
    for name, stage in STAGES.items():
        if not options.stage or name in options.stage:
            stage(options)


if __name__ == "__main__":
    main()
