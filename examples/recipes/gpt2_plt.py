"""GPT-2 small: per-layer transcoders under the same settings as the CLT of ``gpt2_clt.py``, all layers trained jointly.

Their losses are summed over layers, so that an uneven L0 over layers would show here too if it came from activations.
"""

from pathlib import Path

from clt_plugin.training import Recipe

alike = Recipe.load(Path(__file__).with_name("gpt2_clt.py"))
model, data = alike.model, alike.data
config = alike.config.but(name="gpt2-plt", wiring="plt")
