"""The demo's model: per-layer transcoders, trained alike with the CLT of ``demo_clt.py``."""

from pathlib import Path

from clt_plugin.training import Recipe

alike = Recipe.load(Path(__file__).with_name("demo_clt.py"))
model, data, evaluate_on = alike.model, alike.data, alike.evaluate_on
config = alike.config.but(name="demo-plt", wiring="plt")
