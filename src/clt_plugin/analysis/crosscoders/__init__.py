"""What latents share over layers and models: norms, rotation, exclusive latents, latent scaling."""
