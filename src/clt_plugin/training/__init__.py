"""Training: one trainer for every wiring, from what the activations come to how the weights are saved."""
