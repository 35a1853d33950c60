"""Loads what the package carries."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.core import Crosscoder
from clt_plugin.formats import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
CORPUS = Path(__file__).parent / "corpus"
NAME = "clt_plugin/demo"
"""The language model's name, as its transcoders know it."""

MIT_PROMPT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    'documentation files (the "Software"), to deal in the Software without restriction, including without limitation '
    "the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or"
)
"""The MIT licence up to the word that the language model has learnt by heart: " sell"."""


def load_corpus() -> list[str]:
    """Load the texts that the language model and its transcoders were trained on, licences first."""
    return [path.read_text(encoding="utf-8") for path in sorted(CORPUS.rglob("*.txt"))]


def load_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the language model: GPT-2 of 4 layers, d_model 128. Each call makes a model of its own."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # A bar for two megabytes is noise; users who want bars keep them.
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(ASSETS / "language-model", dtype=dtype).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
    model.config.name_or_path = NAME
    return model.requires_grad_(False)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load its tokenizer, which prepends the BOS token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "language-model", padding_side="left")
    tokenizer.name_or_path = NAME
    return tokenizer


def load_nnsight() -> Any:
    """Load the language model in nnsight."""
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(load_model(), tokenizer=load_tokenizer())


def load_bridge() -> Any:
    """Load the language model in TransformerLens."""
    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            NAME, hf_model=load_model(), tokenizer=load_tokenizer(), device="cpu"
        )


def load_clt(dtype: torch.dtype = torch.float32) -> Crosscoder:
    """Load its cross-layer transcoder: JumpReLU, trained without the BOS position."""
    return load(ASSETS / "clt", dtype=dtype)


def load_plt(dtype: torch.dtype = torch.float32) -> Crosscoder:
    """Load its per-layer transcoders, trained by the same recipe."""
    return load(ASSETS / "plt", dtype=dtype)
