"""Tiny random models of every supported family, with randomised norms and biases, and a tokenizer for them."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY, D_MODEL, N_LAYERS = 61, 16, 3
_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_DECODER = {
    **_COMMON,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_NEOX = {
    **_COMMON,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA = {**_DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8}


def _gemma3_multimodal() -> transformers.PretrainedConfig:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    text = transformers.Gemma3TextConfig(**_GEMMA).to_dict()
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **_COMMON)


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**_DECODER),
    "mistral": lambda: transformers.MistralConfig(**_DECODER, sliding_window=4),
    "olmo": lambda: transformers.OlmoConfig(**_DECODER),
    "olmo2": lambda: transformers.Olmo2Config(**_DECODER),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA),
    "gemma3_multimodal": _gemma3_multimodal,
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_NEOX),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
}
"""A small config of every family."""

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gemma3_multimodal": "Gemma3ForConditionalGeneration",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_neox_sequential": "GPTNeoXForCausalLM",
}
FAMILIES = tuple(CONFIGS)


@cache
def _model(family: str) -> torch.nn.Module:
    cls = ARCHITECTURES[family]
    config = CONFIGS[family]()
    config.architectures = [cls]
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        model = getattr(transformers, cls)(config).eval()
        for name, parameter in model.named_parameters():
            # Norms and biases that are left at 1 and 0 hide what goes wrong with them.
            spread = 0.3 if parameter.ndim == 1 or "norm" in name else 0.15
            parameter.data.add_(spread * torch.randn_like(parameter))
    model.config.name_or_path = f"tiny/{family}"
    return model.requires_grad_(False)


def make_model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Make a tiny model of a family: a fresh copy, equal each time."""
    return copy.deepcopy(_model(family)).to(dtype)


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a word, w2 to w60, which prepends a BOS token."""
    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        padding_side="left",
        name_or_path="tiny/tokenizer",
        add_bos_token=True,
    )


def nnsight_model(family_or_model: str | torch.nn.Module):
    """Wrap a model in nnsight."""
    from nnsight.modeling.transformers import TransformersModel

    model = make_model(family_or_model) if isinstance(family_or_model, str) else family_or_model
    return TransformersModel(model, tokenizer=make_tokenizer())


def bridge_model(family_or_model: str | torch.nn.Module):
    """Wrap a model in a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers

    # For a multimodal model it would pip-install torchvision, and with it another torch, into the environment.
    helpers._ensure_torchvision = lambda: False
    model = make_model(family_or_model) if isinstance(family_or_model, str) else family_or_model
    name = model.config.name_or_path
    return TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=make_tokenizer(), device="cpu")
