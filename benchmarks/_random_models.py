"""Random models that go by the names of real ones: their families' shapes, at sizes of one's choice.

They are saved as a Hub cache holds them, with a tokenizer of one token a word, so that tools that know models by name
alone load them without a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

# Bars for a megabyte, and doubts about rotary positions of contexts this short, are noise.
logging.disable_progress_bar()
logging.set_verbosity_error()

LLAMA, GEMMA_2, GEMMA_3, QWEN_3, GPT_2 = (
    "meta-llama/Llama-3.2-1B",
    "google/gemma-2-2b",
    "google/gemma-3-1b-pt",
    "Qwen/Qwen3-0.6B",
    "gpt2",
)
# As the models that go by these names have it; TransformerLens's table says the same.
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_config(name: str, n_layers: int, d_model: int, n_heads: int, vocabulary: int, context: int) -> Any:
    """Return the config of a small model that goes by a name.

    Args:
        name: One of those above.
        n_layers: How many layers.
        d_model: Width of the residual stream; the MLPs are four times as wide.
        n_heads: How many query heads; there are half as many of keys and values where the family shares them.
        vocabulary: How many tokens; 0 is BOS, 1 is EOS.
        context: The longest prompt.
    """
    special: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    special |= {"tie_word_embeddings": name not in (LLAMA, QWEN_3)}
    if name == GPT_2:
        own: dict[str, Any] = {
            "n_embd": d_model,
            "n_layer": n_layers,
            "n_head": n_heads,
            "n_positions": context,
            "n_ctx": context,
        }
        return transformers.GPT2Config(**special, **own)
    decoder = special | {
        "hidden_size": d_model,
        "intermediate_size": 4 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads // 2,
        "head_dim": d_model // n_heads,
        "max_position_embeddings": context,
    }
    if name == LLAMA:
        return transformers.LlamaConfig(**decoder, rope_parameters=_LLAMA_ROPE, rms_norm_eps=1e-5)
    if name == QWEN_3:
        return transformers.Qwen3Config(**decoder)
    gemma = decoder | {"query_pre_attn_scalar": d_model // n_heads}
    return transformers.Gemma2Config(**gemma) if name == GEMMA_2 else transformers.Gemma3TextConfig(**gemma)


def make_model(name: str, **sizes: int) -> Any:
    """Make such a model with random weights, its norms' gains and its biases random too."""
    model = transformers.AutoModelForCausalLM.from_config(make_config(name, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # At 1 and 0 gains and biases would hide what goes wrong with them.
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.config.name_or_path = name
    return model.requires_grad_(False)


def save_model(model: Any, folder: Path) -> None:
    """Save a model and a tokenizer, in files that transformers 4 and 5 read."""
    model.save_pretrained(folder)
    path, rope = folder / "config.json", getattr(model.config, "rope_parameters", None) or {}
    config = json.loads(path.read_text())
    if "rope_type" in rope and rope["rope_type"] != "default":
        config |= {"rope_theta": rope["rope_theta"]}
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    path.write_text(json.dumps(config))
    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
