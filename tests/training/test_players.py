"""Players over shared storage must behave as independent networks do."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from sublimate.training import checkpoints
from sublimate.training.objectives.flash import FlashConfig
from sublimate.training.players import Player, PlayerConfig, make_player, shared_copy


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 2, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)


def predict(module, x):
    sample, t, text = x
    return module(sample, t, encoder_hidden_states=text).sample


def lora_players(unet, *, shared: bool, checkpointing: bool):
    """Three LoRA players with distinct non-zero adapters, over one base or each over its own copy."""
    players = []
    for i in range(3):
        player = make_player(unet if shared else copy.deepcopy(unet), PlayerConfig(kind="lora", rank=2))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in player.trainable().values():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        player.set_trainable(True)
        player.module.train()
        if checkpointing:
            player.module.enable_gradient_checkpointing()
        players.append(player)
    return players


def gradients(players):
    """The student's forward comes first and its backward last: the order that breaks adapter switching."""
    x = inputs()
    student, critic, other = (predict(p.module, x) for p in players)
    loss = (student - critic.detach()).square().mean() + (critic * other).mean()
    loss.backward()
    return [{k: p.grad.clone() for k, p in player.trainable().items()} for player in players]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_base_gives_the_gradients_of_full_copies(unet, checkpointing):
    shared = gradients(lora_players(unet, shared=True, checkpointing=checkpointing))
    separate = gradients(lora_players(unet, shared=False, checkpointing=False))
    for a, b in zip(shared, separate, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)
            assert a[name].abs().max() > 0


@pytest.mark.slow
def test_players_share_the_base_and_own_their_adapters(unet):
    players = lora_players(unet, shared=True, checkpointing=False)
    base = {p.data_ptr() for p in unet.parameters()}
    for player in players:
        trained = {p.data_ptr() for p in player.trainable().values()}
        everything = {p.data_ptr() for p in player.module.parameters()}
        assert everything - trained == base
        assert not trained & base
    assert not set.intersection(*({p.data_ptr() for p in q.trainable().values()} for q in players))


@pytest.mark.slow
def test_the_base_keeps_its_structure_and_bits(unet):
    before = copy.deepcopy(unet.state_dict())
    player = make_player(unet, PlayerConfig(kind="lora", rank=2, learning_rate=0.1))
    player.set_trainable(True)
    optimizer = player.optimizer()
    predict(player.module, inputs()).square().mean().backward()
    optimizer.step()
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(unet.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None for p in unet.parameters())


def test_flags_of_a_shared_copy_stay_its_own(unet):
    tree = shared_copy(unet)
    tree.enable_gradient_checkpointing()
    assert tree.is_gradient_checkpointing and not unet.is_gradient_checkpointing
    assert all(a is b for a, b in zip(tree.parameters(), unet.parameters(), strict=True))


def test_a_partial_player_shares_what_it_does_not_train(unet):
    names = {n for n, _ in unet.named_parameters() if "attn2.to_k" in n}
    player = make_player(unet, PlayerConfig(), names=names)
    for (name, own), base in zip(player.module.named_parameters(), unet.parameters(), strict=True):
        assert (own is not base) == (name in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_trains_is_float32_whatever_the_base_is(unet, dtype):
    half = copy.deepcopy(unet).to(dtype)
    names = {n for n, _ in unet.named_parameters() if "attn2.to_k" in n}
    for made in (
        make_player(half, PlayerConfig()),
        make_player(half, PlayerConfig(), names=names),
        make_player(half, PlayerConfig(kind="lora", rank=2)),
    ):
        assert {p.dtype for p in made.trainable().values()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {dtype}
    with pytest.raises(ValueError, match=r"conv_in\.weight would train in .*, which rounds small steps away"):
        Player(half, PlayerConfig(), frozenset({"conv_in.weight"}))


def test_bad_selections_are_refused(unet):
    with pytest.raises(ValueError, match="no parameters named"):
        make_player(unet, PlayerConfig(), names={"nowhere.weight"})
    with pytest.raises(ValueError, match="No parameter"):
        make_player(unet, PlayerConfig(), names=())
    with pytest.raises(ValueError, match="target_modules"):
        make_player(unet, PlayerConfig(kind="lora"), names={"conv_in.weight"})
    with pytest.raises(ValueError, match="nowhere"):
        make_player(unet, PlayerConfig(kind="lora", target_modules=("nowhere",)))


def test_an_optimiser_of_one_kernel_resumes_as_if_it_had_gone_on():
    def stepped(parameter, optimizer):
        parameter.grad = parameter.detach().sin()
        optimizer.step()

    whole, halves = (torch.nn.Parameter(torch.linspace(1, 2, 5)) for _ in range(2))
    optimizer, first = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in (whole, halves))
    for _ in range(3):
        stepped(whole, optimizer)
    stepped(halves, first)
    second = torch.optim.AdamW([halves], lr=0.1, fused=True)
    checkpoints.load_optimizer_tensors(second, checkpoints.optimizer_tensors(first))
    for _ in range(2):
        stepped(halves, second)
    assert torch.equal(halves, whole)


@pytest.mark.parametrize("option", [{"rank": 8}, {"lora_alpha": 4}, {"target_modules": ("to_q",)}])
def test_a_players_options_of_a_lora_ask_for_one(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is a LoRA's: set kind to lora, or leave it out"):
        PlayerConfig(**option)
    assert PlayerConfig(kind="lora", **option).artefact == "lora"
    assert FlashConfig(student=option).student.artefact == "lora"  # its default
    # A recipe's LoRA is switched off by a word.
    assert FlashConfig(student={"kind": "full", **option}).student.artefact == "weights"
