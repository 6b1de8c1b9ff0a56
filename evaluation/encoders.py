"""Features to compare sets of images by: any Hugging Face image encoder's, and CLIP's, which reads texts too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sublimate.pipelines.locations import first_line
from sublimate.pipelines.preprocessing import Preprocessing


class ImageEncoder(nn.Module):
    """A network that sees images, such as DINOv2, whose features people's judgement follows best (arXiv 2306.04675).

    Args:
        model: a `transformers` vision model, moved to eval mode and frozen.
        preprocessing: from images in [0, 1] to its pixel values.
        pooled: take the network's own summary of an image; else its last hidden state, averaged over positions.
    """

    def __init__(self, model: PreTrainedModel, preprocessing: Preprocessing, *, pooled: bool = True) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.preprocessing, self.pooled = preprocessing, pooled
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """(B, D) of images (B, 3, H, W) in [0, 1]."""
        seen = self.model(pixel_values=self.preprocessing(images))
        if self.pooled and getattr(seen, "pooler_output", None) is not None:
            return seen.pooler_output.flatten(1)
        hidden = seen.last_hidden_state
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)


class ImageTextEncoder(nn.Module):
    """CLIP, or SigLIP: its image embeddings are the features, and tell how well an image fits a text.

    Args:
        model: a `transformers` model with image and text embeddings, moved to eval mode and frozen.
        tokenizer: its tokenizer.
        preprocessing: from images in [0, 1] to its pixel values.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.preprocessing, self.cut = tokenizer, preprocessing, False
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings of unit length, (B, D), of images (B, 3, H, W) in [0, 1]."""
        return directions(self.model.get_image_features(pixel_values=self.preprocessing(images)))

    @torch.no_grad()
    def similarity(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine of each image's embedding (B, D) with that of its text, (B,).

        Texts that are longer than the network reads are cut, and `cut` is then true. CLIPScore (Hessel et al. 2021,
        arXiv 2104.08718) is 2.5 of it where it is positive.
        """
        limit = self.model.config.text_config.max_position_embeddings
        self.cut |= any(len(ids) > limit for ids in self.tokenizer(list(texts))["input_ids"])
        told = text_directions(self.model, self.tokenizer, texts)
        return (features * told.to(features)).sum(dim=1)


Encoder = ImageEncoder | ImageTextEncoder


def open_encoder(source: str, *, revision: str | None = None, device: str | torch.device = "cpu") -> Encoder:
    """Opens an image encoder, frozen and in float32.

    Args:
        source: folder or hub id of a vision model or of a model of images and texts.
        revision: of a hub id.
        device: where it computes.

    Raises:
        ValueError: when there is none, or the checkpoint lacks weights of it.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        processor = AutoImageProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is no image encoder with an image processor: {first_line(error)}") from error
    preprocessing = Preprocessing.of(processor)
    model, found = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if others := [name for name in missing if not name.startswith("pooler.")]:
        raise ValueError(f"{source} lacks weights of its encoder, {others[0]} among them: choose another.")
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        return ImageTextEncoder(model, tokenizer, preprocessing).to(device)
    # A classifier's checkpoint may have been made without the pooler, whose weights are then random.
    return ImageEncoder(model, preprocessing, pooled=not missing).to(device)


@torch.no_grad()
def text_directions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Embeddings (texts, D) of unit length, of as much of each text as a model of images and texts reads."""
    limit = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "padding_side": "right", "max_length": limit, "truncation": True}
    tokens = tokenizer(list(texts), return_tensors="pt", **options)
    if model.config.model_type.startswith("siglip"):  # it was trained to read its padding
        tokens.pop("attention_mask", None)
    return directions(model.get_text_features(**tokens.to(next(model.parameters()).device)))


def directions(output: Any) -> Tensor:
    """A model's embeddings as vectors of unit length."""
    embedding: Tensor = output.pooler_output
    return embedding / embedding.norm(dim=-1, keepdim=True)
