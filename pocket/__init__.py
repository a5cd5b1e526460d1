"""The embedded base model: a small Stable Diffusion trained from scratch on pictures that its own renderer draws."""
