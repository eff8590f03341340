"""Losses of image-text learning (`contrastive`) and of descriptor learning (`metric_learning`)."""
