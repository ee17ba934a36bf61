"""The three networks (CLIP, VAE, U-Net), where they are found and how they are put together."""
