"""SLUG: its two gradients, the layer it chooses, the sign and length of its step, and what judges it."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sublimate.erasure import concept_pairs
from sublimate.erasure.concept_pairs import ConceptPairs, forget_loss, retain_loss
from sublimate.erasure.contrastive import CLIPPair, TrainedPair, info_nce, pooled, trained_pair
from sublimate.erasure.latent_bank import LatentBank, drawn_bank
from sublimate.erasure.layer_choice import Layer, pareto_front, scored_layers
from sublimate.erasure.methods.slug import SLUG, SLUGConfig
from sublimate.erasure.probes import DetectorJudge, PairJudge
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.step_search import Ray, best_probe, bracketed_search
from sublimate.erasure.text_student import text_encoders
from sublimate.pipelines.model import open_model

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven", "red"])
SMALL = {"images": 2, "sampling_steps": 1, "templates": ("{}", "a {}"), "pair_steps": 5, "max_probes": 4}


@pytest.fixture
def sd(tiny_sd):
    return open_model(tiny_sd)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_info_nce_is_clips_loss_one_pair_at_a_time():
    images, texts = (F.normalize(normal(2, 3, 5, seed=seed), dim=-1) for seed in (0, 1))
    scale, total = torch.tensor(4.0), 0.0
    for r, i in itertools.product(range(2), range(3)):
        for own, others in ((images[r, i], texts[r]), (texts[r, i], images[r])):
            weights = [math.exp(4 * float(own @ other)) for other in others]
            total -= math.log(weights[i] / sum(weights))
    torch.testing.assert_close(info_nce(images, texts, scale), torch.tensor(total / 12))


class Plain(TrainedPair):
    """Latents and states as they are, for counting."""

    def __init__(self):
        super().__init__(4, 3)

    def images(self, latents):
        return latents

    def texts(self, pooled):
        return F.normalize(pooled, dim=-1)


def directions(*sizes):
    return [[F.normalize(normal(n, 3, seed=7 * n + i), dim=-1) for i, n in enumerate(own)] for own in sizes]


def test_the_forget_loss_is_over_pictures_with_their_own_phrases():
    images, states = directions((2, 1), (3,)), [normal(2, 3, seed=3), normal(1, 3, seed=4)]
    errors = [
        1 - F.cosine_similarity(shown, said, dim=0)
        for own, told in zip(images, states, strict=True)
        for pictures, said in zip(own, told, strict=True)
        for shown in pictures
    ]
    assert len(errors) == 6
    torch.testing.assert_close(forget_loss(Plain(), images, states), torch.stack(errors).mean())


def test_the_retain_loss_has_every_pair_of_the_largest_concept_once(monkeypatch):
    images, states = directions((2, 2), (3,)), [normal(2, 3, seed=3), normal(1, 3, seed=4)]
    seen = []
    monkeypatch.setattr(concept_pairs, "info_nce", lambda *given: seen.append(given) or info_nce(*given))
    pair = Plain()
    retain_loss(pair, images, states)
    ((shown, said, scale),) = seen
    assert shown.shape == said.shape == (4, 2, 3) and scale == pair.scale
    assert torch.equal(shown[:, 0], torch.cat(images[0]))
    assert torch.equal(shown[:, 1], images[1][0][[0, 1, 2, 0]])
    torch.testing.assert_close(said[:, 0], F.normalize(states[0], dim=-1)[[0, 0, 1, 1]])


@pytest.mark.slow
def test_a_trained_pair_tells_concepts_apart_and_leaves_the_generator_alone():
    kinds = [normal(1, 4, 8, 8, seed=i) for i in range(3)]
    pictures = [
        [kind + 0.3 * normal(6, 4, 8, 8, seed=9 + 2 * i + j) for j in range(2)] for i, kind in enumerate(kinds)
    ]
    texts, state = [normal(2, 16, seed=20 + i) for i in range(3)], torch.get_rng_state()
    pair = trained_pair(pictures, texts, steps=40, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in pair.parameters())
    new = torch.cat([kind + 0.3 * normal(4, 4, 8, 8, seed=40 + i) for i, kind in enumerate(kinds)])
    right = PairJudge(pair, texts).shows(new, [0] * 4 + [1] * 4 + [2] * 4)
    assert right.float().mean() > 0.8
    wrong = PairJudge(pair, texts).shows(new, [1] * 4 + [2] * 4 + [0] * 4)
    assert wrong.float().mean() < 0.2
    again = trained_pair(pictures, texts, steps=40, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), again.parameters(), strict=True))


def test_layers_are_scored_as_they_move():
    names = [f"text_encoder.encoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    parts = [
        f"{n}.{p}"
        for n in names
        for p in (("q_proj", "k_proj", "v_proj", "out_proj") if "attn" in n else ("fc1", "fc2"))
    ]
    tensors = [
        {
            f"{part}.{kind}": normal(4, 3, seed=30 * seed + i)
            for i, part in enumerate(parts)
            for kind in ("weight", "bias")
        }
        for seed in range(3)
    ]
    for group in tensors:
        group["text_encoder.embeddings.token_embedding.weight"] = normal(5, 3)
    layers = {layer.name: layer for layer in scored_layers(*tensors)}
    assert [n.removeprefix("text_encoder.") for n in layers] == [
        f"{i}.{part}" for i in range(2) for part in ("self_attn.qkv", "self_attn.out_proj", "mlp")
    ] or len(layers) == 6
    mlp = layers["text_encoder.1.mlp"]
    assert set(mlp.weights) == {f"text_encoder.encoder.layers.1.mlp.{p}.weight" for p in ("fc1", "fc2")}
    theta, g_f, g_r = (torch.cat([group[n].flatten() for n in mlp.weights]) for group in tensors)
    assert mlp.importance == pytest.approx(float(g_f.norm() / theta.norm()))
    assert mlp.alignment == pytest.approx(abs(float(g_f @ g_r / g_f.norm() / g_r.norm())), rel=1e-5)
    assert len(layers["text_encoder.0.self_attn.qkv"].weights) == 3


def layer(name, depth, importance, alignment):
    return Layer(name, (depth, 0), (), importance, alignment)


def test_the_front_holds_what_no_other_layer_beats_the_deepest_first():
    layers = [
        layer("important", 0.2, 5.0, 0.9),
        layer("between", 0.6, 3.0, 0.5),
        layer("beaten", 1.0, 2.0, 0.6),
        layer("aligned", 0.4, 1.0, 0.1),
        layer("as important", 0.8, 5.0, 0.95),  # worse in one, equal in the other: not beaten
    ]
    unread = layer("of an encoder that no loss reads", 0.95, 0.0, 0.0)
    expected = ["as important", "between", "aligned", "important"]
    assert [found.name for found in pareto_front([*layers, unread])] == expected


SEARCH = {"max_left": 0.0, "min_kept": 0.9}


@pytest.mark.parametrize("threshold", [0.03, 0.3, 0.7, 2.0, 9.5])
@pytest.mark.parametrize("width", [1.1, 1.5, 3.0])
def test_the_search_finds_the_window_in_a_monotone_world(threshold, width):
    # Erased from `threshold` on, broken from `threshold * width` on.
    best, seen = bracketed_search(
        lambda s: (float(s < threshold), float(s < threshold * width)), 0.1, 10.0, **SEARCH, probes=20
    )
    assert best.missing == 0 and threshold <= best.step < threshold * width
    assert best is seen[-1] and all(probe.missing > 0 for probe in seen[:-1])


def test_the_search_ends_whatever_it_is_told_and_returns_the_best_it_saw():
    answers = torch.rand((200, 11, 2), generator=torch.Generator().manual_seed(0)).round(decimals=1)
    for table in answers.tolist():
        given = iter(table)
        best, seen = bracketed_search(lambda _, given=given: tuple(next(given)), 0.1, 1.0, **SEARCH, probes=11)
        assert len(seen) <= 11 and all(0 < probe.step <= 1.0 for probe in seen)
        missing = [probe.left + max(0.0, 0.9 - probe.kept) for probe in seen]
        assert best.missing == pytest.approx(min(missing)) and best in seen
        for before, after in itertools.pairwise(seen):
            assert after.step < before.step if before.kept < 0.9 else after.step > before.step


def test_a_limit_that_is_too_short_ends_the_search():
    best, seen = bracketed_search(lambda s: (1 - s / 4, 1.0), 0.5, 2.0, **SEARCH, probes=50)
    assert [probe.step for probe in seen] == [0.5, 1.0, 2.0] and best.step == 2.0
    with pytest.raises(ValueError, match="starts within its limit"):
        bracketed_search(lambda s: (0.0, 1.0), 3.0, 2.0, **SEARCH, probes=5)
    assert best_probe(seen) is best


def test_a_ray_goes_there_and_comes_back_bit_by_bit():
    weights = {"a": normal(3), "b": normal(2, seed=1)}
    before = {name: value.clone() for name, value in weights.items()}
    ray = Ray(weights, {"a": torch.full((3,), 2.0), "b": torch.ones(2)}, ["a"])
    assert ray.unit == pytest.approx(float(before["a"].norm()) / math.sqrt(12))
    with ray.moved(0.37):
        torch.testing.assert_close(weights["a"], before["a"] + 0.37 * before["a"].norm() / math.sqrt(3))
        assert torch.equal(weights["b"], before["b"])
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert set(ray.at(1.0)) == {"a"}


@pytest.mark.slow
def test_the_step_raises_the_forget_loss_by_the_gradients_square(sd):
    # theta' - theta is lambda G_f: G_f here by finite differences of the loss that raises it.
    edit = SLUG(**{**SMALL, "max_probes": 1}, first_step=1e-3).fit(sd, CAT)
    outcome, own = edit.provenance["outcome"], sd.parameters()
    delta = {key: value - own[key] for key, value in edit.values.items()}
    concepts = [CAT.erase[0], *CAT.preserve, Concept("dog")]
    eraser = SLUG(**SMALL)
    pictures = drawn_bank(sd, concepts, SMALL["templates"], eraser.config, seed=0)
    pairs = ConceptPairs(sd, concepts, SMALL["templates"], pictures)
    pair = eraser._pair(sd, pairs, [s.detach() for s in pairs.states(sd.encode_prompts)], 0)
    images = pairs.embedded(pair)

    def loss():
        with torch.no_grad():
            return float(forget_loss(pair, images[:1], pairs.states(sd.encode_prompts)[:1]))

    here = loss()
    with edit.applied(sd):
        there = loss()
    square = sum(float(d.double().square().sum()) for d in delta.values()) / outcome["lambda"]
    assert there > here and there - here == pytest.approx(square, rel=0.1)
    norms = [sum(float(v.square().sum()) for v in values) for values in (delta.values(), [own[k] for k in delta])]
    assert outcome["step"] == 1e-3
    assert math.sqrt(norms[0] / norms[1]) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
def test_one_layer_moves_and_the_record_says_which(sd):
    edit = SLUG(**SMALL).fit(sd, CAT)
    outcome = edit.provenance["outcome"]
    component, block, group = outcome["layer"].split(".", 2)
    parts = {
        "mlp": ("fc1", "fc2"),
        "self_attn.out_proj": ("out_proj",),
        "self_attn.qkv": ("q_proj", "k_proj", "v_proj"),
    }
    module = group.partition(".")[0]
    assert edit.values.keys() == {f"{component}/encoder.layers.{block}.{module}.{p}.weight" for p in parts[group]}
    assert outcome["layer"] == outcome["front"][0] and list(outcome["probes"]) == [outcome["layer"]]
    assert [outcome["step"], *outcome["after"]] in outcome["probes"][outcome["layer"]]
    assert len(outcome["probes"][outcome["layer"]]) <= 4 and outcome["judge"] == "pair"
    wide = SLUG(**SMALL, layers="front").fit(sd, CAT).provenance["outcome"]
    assert list(wide["probes"]) == wide["front"] == outcome["front"]


class Colours:
    """Reads the sign of the mean: "cat" above a half, "dog" below; never sure of "red"."""

    groups: ClassVar = {"animal": ("dog", "cat"), "thing": ("seven", "red")}

    def __call__(self, images):
        cat = (images.mean((1, 2, 3)) > 0.5).float()
        none = torch.zeros_like(cat)
        return {
            "animal": torch.stack([1 - cat, cat, none], 1),
            "thing": torch.stack([cat, none, 1 - cat], 1),
        }


@pytest.mark.slow
def test_a_detector_judges_by_the_labels_of_its_groups(sd):
    latents = 3 * normal(8, *sd.latent_shape)
    cats = sd.render(latents).mean((1, 2, 3)) > 0.5
    judge = DetectorJudge(sd, Colours(), [Concept("kitten", synonyms=("cat",)), Concept("dog"), Concept("red")])
    assert torch.equal(judge.shows(latents, [0] * 8), cats)
    assert torch.equal(judge.shows(latents, [1] * 8), ~cats)
    assert not judge.shows(latents, [2] * 8).any()
    assert SLUG(**SMALL).fit(sd, CAT, detector=Colours()).provenance["outcome"]["judge"] == "detector"
    with pytest.raises(ValueError, match="no label for 'photo'"):
        SLUG(**SMALL).fit(sd, Request("photo", preserve=["seven", "red"]), detector=Colours())


def test_a_detector_reads_large_pictures_in_smaller_parts():
    class Large:
        sizes: ClassVar = []

        def render(self, latents):
            self.sizes.append(len(latents))
            return latents[:, :3]

    latents = torch.stack([torch.full((4, 64, 64), level) for level in (0.0, 1.0, 1.0, 0.0, 1.0, 0.0)])
    judge = DetectorJudge(Large(), Colours(), [Concept("cat"), Concept("dog")])
    assert judge.shows(latents, [0, 0, 1, 1, 0, 1]).tolist() == [False, True, False, True, True, True]
    assert Large.sizes == [4, 2]


def test_too_little_to_keep_is_refused(sd):
    with pytest.raises(ValueError, match="two or more concepts"):
        SLUG(**SMALL).fit(sd, Request("cat", preserve=["seven"]))


def test_pooled_states_are_those_of_the_end_token(sd):
    prompts = ["a red cat", "cat"]
    tokenizer, encoder = sd.pipeline.tokenizer, sd.component("text_encoder")
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(pooled(sd, sd.encode_prompts(prompts), prompts), encoder(ids).pooler_output)


def saved_clip(model, folder):
    encoder = model.component("text_encoder")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=encoder.config.to_dict(),
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(config)
    clip.text_model.load_state_dict(encoder.state_dict(), strict=False)
    clip.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return clip.eval()


@pytest.mark.slow
def test_a_clip_checkpoint_brings_both_towers(sd, tmp_path):
    clip = saved_clip(sd, tmp_path / "clip")
    pair, latents = CLIPPair(sd, str(tmp_path / "clip")), normal(2, *sd.latent_shape)
    prompts = ["cat", "a red dog"]
    said = pair.texts(pooled(sd, sd.encode_prompts(prompts), prompts))
    ids = sd.pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    pixels = pair.preprocessing(sd.render(latents))
    with torch.no_grad():
        theirs = clip(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(said, theirs.text_embeds)
    torch.testing.assert_close(pair.images(latents), theirs.image_embeds)
    torch.testing.assert_close(pair.scale * said @ theirs.image_embeds.T, theirs.logits_per_text)
    edit = SLUG(**SMALL, clip=str(tmp_path / "clip")).fit(sd, CAT)
    assert edit.provenance["outcome"]["judge"] == "pair"


def test_another_clip_is_refused(sd, tmp_path):
    with torch.no_grad():
        next(iter(text_encoders(sd).values())).embeddings.token_embedding.weight.add_(1)
    saved_clip(sd, tmp_path / "clip")
    with torch.no_grad():
        next(iter(text_encoders(sd).values())).embeddings.token_embedding.weight.sub_(1)
    with pytest.raises(ValueError, match="leave clip out"):
        CLIPPair(sd, str(tmp_path / "clip"))


def test_pairs_keep_phrases_with_their_rows(sd):
    bank = LatentBank([torch.full((1, *sd.latent_shape), float(i)) for i in range(6)])
    pairs = ConceptPairs(sd, [Concept("cat"), Concept("dog", synonyms=("red",))], ("{}", "a {}"), bank)
    assert pairs.phrases == [["cat", "a cat"], ["dog", "red", "a dog", "a red"]]
    assert [[int(x.mean()) for x in own] for own in pairs.pictures] == [[0, 1], [2, 3, 4, 5]]


def test_the_defaults_are_the_authors():
    config = SLUGConfig()
    assert (config.first_step, config.max_probes, config.max_left, config.max_lost) == (0.1, 11, 0.0, 0.1)
    assert (config.probe_images, config.sampling_steps, config.start_guidance) == (3, 100, 9.0)
