"""Descriptors of images: networks, poolings, scales and whitening."""
