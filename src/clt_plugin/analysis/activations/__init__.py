"""What a crosscoder does on text: ablation, alignment, gradients, and the feature browser's data."""
