"""Pictures for the tiny models that are shown some."""

import torch

from sublimate.diffusion.conditions import Condition


def pictures_for(model, count):
    """Images in [0, 1] and a rectangle to paint in each, or small images; nothing for other models."""
    generator = torch.Generator().manual_seed(0)
    if model.backbone.shown == "masks":
        masks = torch.zeros(count, 1, 16, 16)
        masks[:, :, 4:12, 7:] = 1
        return {"images": torch.rand((count, 3, 16, 16), generator=generator), "masks": masks}
    return {"low_res": torch.rand((count, 3, 8, 8), generator=generator)} if model.backbone.shown else {}


def shown_to(model, count, draw=None):
    """The condition of such pictures; `draw(shape)` gives the noise on small images, else a fixed generator."""
    pictures = pictures_for(model, count)
    if model.backbone.shown == "low_res":
        generator = torch.Generator().manual_seed(1)
        pictures["noise"] = draw((3, 8, 8)) if draw else torch.randn((count, 3, 8, 8), generator=generator)
    return model.show(**pictures) if pictures else Condition()


def stock_arguments(model, count):
    """The same pictures as arguments of the stock pipeline's call."""
    names = {"images": "image", "masks": "mask_image", "low_res": "image"}
    return {names[name]: value for name, value in pictures_for(model, count).items()}
