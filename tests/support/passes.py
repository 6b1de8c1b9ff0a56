"""Counts the samples that go through an objective's networks."""

from __future__ import annotations

import contextlib

import torch

from sublimate.diffusion.denoisers import Denoiser


@contextlib.contextmanager
def counted(trainer, model):
    """Samples through every network: forward 1; backward 2 if weights train, 1 if inputs alone need gradients."""
    passes = []

    def trains(network):
        return any(p.requires_grad for p in network.parameters())

    def start(network, inputs, keywords):  # a pass may end with its features: then there is no output
        x_in = inputs[0] if inputs else keywords["hidden_states"]
        passes.append(len(x_in))
        if x_in.requires_grad and not trains(network):
            x_in.register_hook(lambda gradient: passes.append(len(gradient)))

    def finish(network, _inputs, output):
        if trains(network) and torch.is_grad_enabled():
            output.sample.register_hook(lambda gradient: passes.append(2 * len(gradient)))

    held = getattr(trainer.objective, "target", None)  # a tree that only gives targets
    trees = [model.denoiser, held, *(player.module for player in trainer.players.values())]
    networks = {id(d.network): d.network for d in trees if isinstance(d, Denoiser)}
    hooks = [network.register_forward_pre_hook(start, with_kwargs=True) for network in networks.values()]
    hooks += [network.register_forward_hook(finish) for network in networks.values()]
    yield passes
    for hook in hooks:
        hook.remove()
