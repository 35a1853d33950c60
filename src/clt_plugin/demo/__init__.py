"""The small language model that the package carries, trained on licences and documentation, and its transcoders.

How they were made, and how good they are, is said in ``assets/README.md``; ``examples/build_demo.py`` makes them again.
"""

from clt_plugin.demo.bundled import (
    MIT_PROMPT,
    NAME,
    load_bridge,
    load_clt,
    load_corpus,
    load_model,
    load_nnsight,
    load_plt,
    load_tokenizer,
)

__all__ = [
    "MIT_PROMPT",
    "NAME",
    "load_bridge",
    "load_clt",
    "load_corpus",
    "load_model",
    "load_nnsight",
    "load_plt",
    "load_tokenizer",
]
