"""The web app: generate, interpolate, train and look inside, on one Stable Diffusion and a folder of adapters."""
