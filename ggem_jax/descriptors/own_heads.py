"""Poolings that a network brings itself, by name. Loads nothing."""

# name of a pooling, which takes images at one scale -> the networks that have it
OWN_HEADS = {
    "clip": "CLIP or SigLIP",
    "own": "a training run, or what python -m train.export writes from one",
}
