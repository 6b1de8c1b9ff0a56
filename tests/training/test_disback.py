"""DisBack: the path that is recorded, the way back along it, and the special case without one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import TrigFlow
from sublimate.pipelines.edit_attachment import strip
from sublimate.training.data import Batch
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.objective import Turn
from sublimate.training.objectives.disback import DisBack, DisBackConfig
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig
from sublimate.training.randomness import SampleRandom
from sublimate.training.trainer import Trainer, TrainerConfig

STUDENT = Turn("student", ("student",))
LORA = {"kind": "lora", "rank": 2, "target_modules": ("0", "2"), "learning_rate": 0.05}


class Nothing:
    """A source of a data-free, unconditional objective."""

    provides = frozenset()

    def batch(self, random):
        return Batch(Condition(), random)


def make(cls=DisBack, config=DisBackConfig, attached=None, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2))
    if attached is not None:
        network[0].register_forward_hook(attached)
    schedule, parametrization = TrigFlow(sigma_data=1.0), Parametrization("v_prediction")
    denoiser = Denoiser(network, lambda n, x, t, c, f: (n(x), {}), schedule, parametrization)
    model = SimpleNamespace(
        denoiser=denoiser, latent_shape=(2,), null_condition=Condition, any_condition=Condition, feature_taps=tuple
    )
    defaults = {"guidance_scale": 1.0, "critic": LORA, "critic_updates": 1, "student": {"learning_rate": 0.05}}
    return cls(model, config(**{**defaults, **options}))


def train(objective, folder, steps, **options):
    defaults = {"max_train_steps": steps, "train_batch_size": 8, "output_dir": folder}
    trainer = Trainer(objective, Nothing(), TrainerConfig(**{**defaults, **options}), progress=False)
    trainer.run()
    return objective


def student_gradient(objective, step):
    for name, player in objective.players().items():
        player.set_trainable(name == "student")
    batch = Batch(Condition(), SampleRandom(3, step, "student", range(16)))
    with torch.no_grad():
        batch = objective.prepare(STUDENT, batch, step)
    loss = objective.loss(STUDENT, batch, step).total
    return batch, torch.autograd.grad(loss, list(objective.players()["student"].trainable().values()))


def disturb(objective):
    """Moves the critic off the teacher, where every gradient would be zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in objective.players()["critic"].trainable().values():
            parameter.add_(0.3 * torch.randn_like(parameter))


def test_a_path_of_the_teacher_alone_is_variational_score_distillation_bit_for_bit():
    plain = make(FDistill, FDistillConfig, divergence="reverse_kl", gan_weight=0.0)
    back = make(degradation_steps=0)
    disturb(plain)
    disturb(back)
    expected, found = student_gradient(plain, 0)[1], student_gradient(back, 0)[1]
    assert all(float(g.abs().max()) > 0 for g in found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_stage_one_trains_the_critic_alone_and_records_it(tmp_path):
    objective = make(degradation_steps=6, record_every=2)
    before = {k: p.clone() for k, p in objective.players()["student"].trainable().items()}
    train(objective, tmp_path, 6)
    assert len(objective.path) == 3
    critic = objective.players()["critic"].trainable()
    assert all(torch.equal(objective.path[-1][k], p) for k, p in critic.items())
    assert any(not torch.equal(objective.path[0][k], objective.path[1][k]) for k in critic)
    student = objective.players()["student"].trainable()
    assert all(torch.equal(before[k], p) for k, p in student.items())


def test_the_target_walks_back_to_the_teacher_and_stays():
    config = DisBackConfig(degradation_steps=30, record_every=10, backtrack_every=4)
    assert [config.target(30 + i) for i in (0, 3, 4, 7, 8, 100)] == [2, 2, 1, 1, 0, 0]
    assert [config.passes(step) for step in (0, 29)] == [4, 4]
    assert config.passes(30) == 5 * 4 + 3 + 1 + 2


def test_each_target_is_its_own_node(tmp_path):
    objective = train(make(degradation_steps=3, record_every=1), tmp_path, 3)
    for node in (1, 2, 3, 1):
        held = objective._target(node).state_dict()
        assert all(torch.equal(held[k], v) for k, v in objective.path[node - 1].items())
    assert objective._target(0) is objective.teacher


def test_what_is_attached_to_the_teacher_and_taken_out_of_the_critic_is_in_no_node(tmp_path):
    def shift(module, inputs, output):
        return output + 1

    shift.attachment_kind = "shifted"
    objective = make(attached=shift, degradation_steps=1, record_every=1)
    for player in objective.players().values():
        strip(player.module)  # as a distillation does
    train(objective, tmp_path, 1)
    x = torch.randn(4, 2)
    with torch.no_grad():
        node, critic = objective._target(1)(x, 1.0).x0, objective.critic(x, 1.0).x0
        assert torch.equal(node, critic) and not torch.equal(objective.teacher(x, 1.0).x0, critic)


def test_a_recorded_node_is_the_target(tmp_path):
    objective = train(make(degradation_steps=4, record_every=1, backtrack_every=1), tmp_path, 4)
    node = objective.path[objective.config.target(4) - 1]
    batch, found = student_gradient(objective, 4)

    critic = objective.players()["critic"].trainable()
    now = {k: p.detach().clone() for k, p in critic.items()}
    with torch.no_grad():
        x0 = objective.generate(batch["z"], batch.condition)
        x_t = objective.noised(x0, batch)
        q = objective.critic(x_t, batch["t"]).x0
        for k, p in critic.items():
            p.copy_(node[k])
        p_x0 = objective.critic(x_t, batch["t"]).x0
        for k, p in critic.items():
            p.copy_(now[k])
    direction = (q - p_x0) / (x0 - p_x0).abs().mean(1, keepdim=True)
    loss = (direction * objective.generate(batch["z"], batch.condition)).mean()
    expected = torch.autograd.grad(loss, list(objective.players()["student"].trainable().values()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_path_leads_to_the_students_score(tmp_path):
    """Nodes denoise the untrained student's samples better the later they were recorded."""
    slow = {**LORA, "learning_rate": 0.002}
    objective = train(make(degradation_steps=120, record_every=40, critic=slow), tmp_path, 120, train_batch_size=64)
    batch = objective.draw(Batch(Condition(), SampleRandom(5, 0, "x", range(512))))
    with torch.no_grad():
        x0 = objective.generate(batch["z"], batch.condition)
        losses = []
        for node in range(4):
            prediction = objective._target(node)(objective.noised(x0, batch), batch["t"])
            losses.append(float((prediction.x0 - x0).square().mean()))
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.6 * losses[0]


def test_a_run_resumes_in_the_middle_of_the_way_back(tmp_path):
    options = {"degradation_steps": 2, "record_every": 1, "backtrack_every": 2}
    straight = train(make(**options), tmp_path / "a", 6)
    train(make(**options), tmp_path / "b", 3, checkpointing_steps=3)
    resumed = train(make(**options), tmp_path / "b", 6)
    for name, player in straight.players().items():
        for key, value in player.trainable().items():
            assert torch.equal(value, resumed.players()[name].trainable()[key]), (name, key)


def test_a_path_of_other_adapters_is_refused():
    objective = make(degradation_steps=2, record_every=1, backtrack_every=1)
    objective.load_state({"0/network.0.weight": torch.zeros(2), "1/network.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="node 1 of the path does not fit"):
        objective._target(1)


def test_a_critic_that_is_no_lora_is_refused():
    with pytest.raises(ValueError, match=r"critic\.kind=lora"):
        make(critic={"kind": "full"})


def test_phases_are_where_passes_and_targets_change():
    config = DisBackConfig(degradation_steps=500, record_every=100, backtrack_every=1000)
    assert config.phases() == (0, 500, 4500)
    assert [config.target(step) for step in (500, 4499, 4500)] == [4, 1, 0]
    assert DisBackConfig(degradation_steps=0).phases() == (0,)


def test_a_run_that_ends_before_the_last_phase_says_so(tmp_path):
    config = DistillConfig(method="disback", model=str(tmp_path / "nowhere"))
    said = "enters its last phase at step 4,500, and trainer.max_train_steps is 1,000"
    with pytest.warns(UserWarning, match=said), pytest.raises(ValueError, match="nowhere"):
        distill(config)
