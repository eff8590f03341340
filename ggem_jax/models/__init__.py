"""Flax (linen) models: image -> tokens -> descriptor -> logits."""
