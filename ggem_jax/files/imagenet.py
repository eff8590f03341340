"""ImageNet's channels, as torchvision and timm normalise them: values in [0, 1], in RGB."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
