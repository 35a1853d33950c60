"""GPT-2 small: a CLT whose latents write to their own layer and the three after it, else as ``gpt2_clt.py``.

A limited span keeps a latent from hopping over intermediate computations, and takes 0.39 B parameters in place of 0.69.
"""

from pathlib import Path

from clt_plugin.training import Recipe

alike = Recipe.load(Path(__file__).with_name("gpt2_clt.py"))
model, data = alike.model, alike.data
config = alike.config.but(name="gpt2-local-clt", wiring={"name": "local_clt", "span": 4})
