"""DiT."""

from __future__ import annotations

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from checkpoints.parts import autoencoder

CLASSES = 1000
"""As many as the stock pipeline supposes: it takes this number for no class."""
NAMES = (
    "cat, Felis catus",
    "dog, a dog",
    "seven",
    "red, in red",
    "red cat, a red cat",
    "gogh",
    "van gogh, the style of van gogh, a painting in the style of van gogh",
    "a painting, painting",
    "crane, bird",
    "crane, machine",
)
"""What the first classes are called; the others have their numbers alone."""


def tiny_dit() -> DiTPipeline:
    """DiT: classes, noise prediction with a learned variance, 4x8x8 latents, 16x16 images."""
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=CLASSES,
    )
    for block in transformer.transformer_blocks:
        # Tables as small as trained ones, or the time would not matter beside the class.
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.3)
    names = {i: NAMES[i] if i < len(NAMES) else f"thing {i}" for i in range(CLASSES)}
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=scheduler, id2label=names)
    # The stock pipeline does not keep them for saving.
    pipeline.register_to_config(id2label=names)
    return pipeline
