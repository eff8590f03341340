"""Exploration of accelerator designs: spaces, fronts and sensitivities."""
