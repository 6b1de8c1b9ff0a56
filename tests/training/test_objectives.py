"""One property matrix over all objectives, on tiny checkpoints of real classes of every family."""

import contextlib
import copy

import pytest
import torch

from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.data import ModelSource
from sublimate.training.distill import OBJECTIVES
from sublimate.training.objective import Objective
from sublimate.training.trainer import Trainer, TrainerConfig

# One family in the quick suite, the rest in the full one.
FAMILIES = (
    "tiny_sd_v",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("tiny_sd", "tiny_unconditional", "tiny_sd3")),
)
LORA = {"kind": "lora", "rank": 2}

# name: (method, options). A new objective adds its rows here.
CASES = {
    "f_distill": ("f_distill", {"critic_updates": 1, "gan_weight": 0.1, "discriminator_width": 8}),
    "f_distill-lora": (
        "f_distill",
        {"critic_updates": 1, "gan_weight": 0.1, "discriminator_width": 8, "student": LORA, "critic": LORA},
    ),
    "f_distill-data-free": ("f_distill", {"critic_updates": 2, "divergence": "reverse_kl", "gan_weight": 0.0}),
    "denoising": ("denoising", {}),
    "denoising-lora": ("denoising", {"student": LORA}),
}


def test_every_objective_has_a_row():
    assert {method for method, _ in CASES.values()} == set(registry.available(OBJECTIVES))


@pytest.fixture(params=FAMILIES)
def model(request):
    return open_model(str(request.getfixturevalue(request.param)))


def make(model, case):
    method, options = CASES[case]
    cls = registry.load(OBJECTIVES, method, Objective)
    if "guidance_scale" in cls.Config.model_fields:
        options = {**options, "guidance_scale": 2.0 if model.null_condition() else 1.0}
    torch.manual_seed(0)
    return cls(model, cls.Config(**options))


def make_trainer(model, case, folder, **options):
    objective = make(model, case)
    prompts = ["red cat", "a dog", "cat"] if model.null_condition() else []
    latents = torch.randn((3, *model.latent_shape), generator=torch.Generator().manual_seed(1))
    source = ModelSource(model, prompts, latents if "images" in objective.needs else None)
    defaults = {"max_train_steps": 2, "train_batch_size": 2, "ema_decay": 0.5}
    return Trainer(objective, source, TrainerConfig(output_dir=folder, **defaults | options), progress=False)


def weights(trainer):
    live = {f"{n}.{k}": p.detach().clone() for n, q in trainer.players.items() for k, p in q.trainable().items()}
    averages = {f"average.{n}.{k}": v.clone() for n, a in trainer.averages.items() for k, v in a.values.items()}
    return {**live, **averages, **{f"state.{k}": v for k, v in trainer.objective.state().items()}}


@pytest.mark.parametrize("case", CASES)
class TestObjective:
    def test_a_turn_moves_its_players_and_nothing_else(self, model, case, tmp_path):
        teacher = copy.deepcopy(model.denoiser.state_dict())
        trainer = make_trainer(model, case, tmp_path)
        for turn in trainer.objective.turns(0):
            before = {n: copy.deepcopy(p.module.state_dict()) for n, p in trainer.players.items()}
            trainer._take(turn)
            for name, player in trainer.players.items():
                moved = any(not torch.equal(v, before[name][k]) for k, v in player.module.state_dict().items())
                assert moved == (name in turn.trains), (turn, name)
        assert all(torch.equal(v, teacher[k]) for k, v in model.denoiser.state_dict().items())

    def test_a_resumed_run_equals_the_uninterrupted_one(self, model, case, tmp_path):
        straight = make_trainer(model, case, tmp_path / "a")
        straight.run()
        make_trainer(model, case, tmp_path / "b", max_train_steps=1, checkpointing_steps=1).run()
        resumed = make_trainer(model, case, tmp_path / "b")
        resumed.run()
        assert resumed.step == 2
        for name, value in weights(straight).items():
            assert torch.equal(value, weights(resumed)[name]), name

    def test_accumulation_changes_nothing_but_rounding(self, model, case, tmp_path):
        # One step: Adam turns the rounding of a near-zero gradient into a full step, so gradients are compared.
        whole = make_trainer(model, case, tmp_path / "a", train_batch_size=4)
        parts = make_trainer(model, case, tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=4)
        for turn in whole.objective.turns(0):
            for a, b in zip(gradients(whole, turn), gradients(parts, turn), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5 * float(a.abs().max()) + 1e-9)

    def test_gradient_checkpointing_changes_nothing(self, model, case, tmp_path):
        plain = make_trainer(model, case, tmp_path / "a")
        saving = make_trainer(model, case, tmp_path / "b", gradient_checkpointing=True)
        for turn in plain.objective.turns(0):
            for a, b in zip(gradients(plain, turn), gradients(saving, turn), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()) + 1e-10)

    def test_a_step_makes_the_passes_that_its_options_name_and_no_other(self, model, case, tmp_path):
        trainer = make_trainer(model, case, tmp_path, train_batch_size=4)
        with counted(trainer, model) as passes:
            for turn in trainer.objective.turns(0):
                trainer._take(turn)
        assert sum(passes) == 4 * trainer.objective.config.passes(0)


@contextlib.contextmanager
def counted(trainer, model):
    """Samples through every network: forward 1; backward 2 if weights train, 1 if inputs alone need gradients."""
    passes = []

    def count(network, inputs, keywords, output):
        x_in = inputs[0] if inputs else keywords["hidden_states"]
        passes.append(len(x_in))
        if any(p.requires_grad for p in network.parameters()) and torch.is_grad_enabled():
            output.sample.register_hook(lambda gradient: passes.append(2 * len(gradient)))
        elif x_in.requires_grad:  # not the output: the loss may read features alone
            x_in.register_hook(lambda gradient: passes.append(len(gradient)))

    trees = [model.denoiser, *(player.module for player in trainer.players.values())]
    networks = {id(d.network): d.network for d in trees if isinstance(d, Denoiser)}
    hooks = [network.register_forward_hook(count, with_kwargs=True) for network in networks.values()]
    yield passes
    for hook in hooks:
        hook.remove()


def gradients(trainer, turn):
    """The gradients the turn's optimisers would see."""
    found = []

    def note(*_):
        found.extend(p.grad.detach().clone() for n in turn.trains for p in trainer.players[n].trainable().values())

    steps = {name: trainer.optimizers[name].step for name in turn.trains}
    for name in turn.trains:
        trainer.optimizers[name].step = lambda: None
    trainer.optimizers[turn.trains[0]].step = note
    trainer.config = trainer.config.model_copy(update={"max_grad_norm": 1e9})
    try:
        trainer._take(turn)
    finally:
        for name, step in steps.items():
            trainer.optimizers[name].step = step
    return found
