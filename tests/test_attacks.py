"""PGD finds a known optimum, keeps its budget, averages over draws, and refuses what would falsify a number."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from atoplib.attacks import (
    PGDSettings,
    ascend,
    check_attack,
    check_budget,
    fgsm,
    input_gradient,
    pgd,
    project,
    random_start,
    require_eval_mode,
    steepest_step,
)
from atoplib.attacks.eot import cross_entropy
from atoplib.attacks.norms import perturbation_size
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings

SHAPE = (6, 3, 4, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(shape=SHAPE, low=0.0, high=1.0):
    return torch.rand(shape, generator=seeded(5)) * (high - low) + low


class TwoClasses(nn.Module):
    """A linear model of two classes: the loss of an image grows with its margin against ``weight``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SHAPE[1:], generator=seeded(1)))

    def forward(self, images):
        score = (images * self.weight).flatten(1).sum(dim=1)
        return torch.stack([-score, score], dim=1) * 0.1


class RandomScale(TwoClasses):
    """The same with a random positive factor for each image and call, so that every draw has the same best attack."""

    def __init__(self):
        super().__init__()
        self.generator = seeded(2)

    def forward(self, images):
        return super().forward(images) * (0.1 + torch.rand(len(images), 1, generator=self.generator))


def best_attack(model, images, labels, eps, norm):
    """The closed form: along the sign of the weights, or along the weights (with no pixel near 0 or 1)."""
    direction = model.weight.detach() * (1 - 2 * labels.view(-1, 1, 1, 1))
    if norm == "linf":
        return (images + eps * direction.sign()).clamp(0, 1)
    return images + eps * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


LABELS = torch.tensor([0, 1, 0, 0, 1, 1])
LINF, L2 = PGDSettings(eps=0.1, norm="linf"), PGDSettings(eps=0.5, norm="l2")


@pytest.mark.parametrize("model_class", [TwoClasses, RandomScale])
@pytest.mark.parametrize("eot_samples", [1, 4], ids="eot{}".format)
@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("steps", [1, 2, 20], ids="{}steps".format)
@pytest.mark.parametrize("base", [LINF, L2], ids=["linf", "l2"])
def test_on_a_linear_model_the_attack_finds_the_known_optimum(base, steps, start, eot_samples, model_class):
    settings = replace(base, steps=steps, start=start, eot_samples=eot_samples)
    # linf: the box [0, 1] cuts the ball off; l2: it does not, for no clipped optimum is known
    images = images_of() if base.norm == "linf" else images_of(low=0.4, high=0.6)
    model = model_class().eval()
    found = pgd(model, images, LABELS, settings, generator=seeded(3))
    best = best_attack(model, images, LABELS, settings.eps, settings.norm)
    if start == "clean" or (base.norm == "linf" and steps > 1):
        torch.testing.assert_close(found, best, atol=1e-5, rtol=0)
        return
    # from a random point one step cannot reach the optimum everywhere, and l2 only nears it
    plain = TwoClasses().eval()
    gained, possible = (cross_entropy(plain(x), LABELS) - cross_entropy(plain(images), LABELS) for x in (found, best))
    share = (gained / possible).min().item()
    assert (0.95 if steps == 20 else 0.3) < share < 1 + 1e-4


@pytest.mark.parametrize("model_class", [TwoClasses, RandomScale])
def test_fgsm_is_one_linf_step_of_size_eps_from_the_image(model_class):
    model, images = model_class().eval(), images_of()
    found = fgsm(model, images, LABELS, 8 / 255, eot_samples=2)
    torch.testing.assert_close(found, best_attack(model, images, LABELS, 8 / 255, "linf"))


def smooth_model(classes=5):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(32, classes)).eval()


MANY = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("base", [LINF, L2, PGDSettings(eps=1.0), PGDSettings(eps=30.0, norm="l2")], ids=str)
def test_the_loss_rises_and_every_iterate_keeps_the_budget(base, start):
    model, images = smooth_model(), images_of()
    seen = []

    def callback(step, steps, adversarial, loss):
        check_budget(adversarial, images, base.eps, base.norm)
        assert loss.shape == (6,) and steps == 10
        seen.append((step, loss.mean().item()))

    found = pgd(model, images, MANY, replace(base, steps=10, start=start), generator=seeded(), callback=callback)
    assert [step for step, _ in seen] == list(range(1, 11))
    assert seen[-1][1] > seen[0][1]
    assert (cross_entropy(model(found), MANY) > cross_entropy(model(images), MANY)).all()
    assert perturbation_size(found - images, base.norm).max() > 0.5 * min(base.eps, 0.5)
    assert not found.requires_grad


def test_the_attack_changes_neither_images_nor_model():
    model, images = smooth_model(), images_of()
    kept, state = images.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    pgd(model, images, MANY, LINF)
    assert torch.equal(images, kept)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_attack_works_inside_no_grad():
    model, images = smooth_model(), images_of()
    expected = pgd(model, images, MANY, LINF, generator=seeded())
    with torch.no_grad():
        assert torch.equal(pgd(model, images, MANY, LINF, generator=seeded()), expected)


@pytest.mark.parametrize("base", [LINF, L2], ids=["linf", "l2"])
def test_a_generator_fixes_the_random_start_and_spares_the_global_one(base):
    model, images = smooth_model(), images_of()
    before = torch.get_rng_state()
    first, again, other = (pgd(model, images, MANY, replace(base, steps=2), generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_loss_that_is_raised_can_be_chosen():
    model, images = TwoClasses().eval(), images_of()

    def toward_class_1(logits, _labels):
        return logits[:, 1] - logits[:, 0]

    found = pgd(model, images, LABELS, replace(LINF, steps=1, start="clean"), loss=toward_class_1)
    torch.testing.assert_close(found, best_attack(model, images, torch.zeros_like(LABELS), LINF.eps, "linf"))


def test_the_iterates_that_a_callback_keeps_do_not_change_afterwards():
    kept = []
    settings = replace(LINF, steps=3, start="clean")
    pgd(smooth_model(), images_of(), MANY, settings, callback=lambda _s, _n, adversarial, _l: kept.append(adversarial))
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


def path_of(model, images, labels, settings):
    """The whole path of an attack that never stops early: the images before the first step and after each."""
    path = [images]
    pgd(model, images, labels, settings, callback=lambda _s, _n, adversarial, _l: path.append(adversarial.clone()))
    return torch.stack(path)


STEPWISE = PGDSettings(eps=0.08, steps=8, alpha=0.02, start="clean")


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_image_stops_once_it_was_wrong_in_so_many_steps_in_a_row_and_no_other_does(stop_after):
    model, images = smooth_model(), images_of((12, 3, 4, 4))
    labels = model(images).argmax(dim=1)
    labels[3] = (labels[3] + 1) % 5  # wrong from the start
    path = path_of(model, images, labels, STEPWISE)
    wrong = torch.stack([model(x).argmax(dim=1) != labels for x in path])
    ends = []
    for image in range(12):
        in_a_row = 0
        for step in range(STEPWISE.steps):
            in_a_row = in_a_row + 1 if wrong[step, image] else 0
            if in_a_row == stop_after:
                break
        ends.append(step + 1)
    assert ends[3] == stop_after and len(set(ends)) > 2 and STEPWISE.steps in ends
    seen = []
    model.register_forward_pre_hook(lambda _model, given: seen.append(len(given[0])))
    found = pgd(model, images, labels, replace(STEPWISE, stop_after=stop_after))
    torch.testing.assert_close(found, torch.stack([path[end, image] for image, end in enumerate(ends)]))
    assert sum(seen) - 1 == sum(ends), "an image that had stopped was computed again"
    assert (model(found).argmax(dim=1) != labels)[[end < STEPWISE.steps for end in ends]].all()


class Scripted(TwoClasses):
    """Of the draws of one image of class 0, so many are right at each step."""

    def __init__(self, right_draws):
        super().__init__()
        self.right_draws = iter([0, *right_draws])  # the first call is the check before the attack

    def forward(self, images):
        right = next(self.right_draws)
        favoured = torch.tensor([[10.0, 0.0]] * right + [[0.0, 10.0]] * (len(images) - right))
        return super().forward(images) + favoured


@pytest.mark.parametrize(
    "right_draws, steps",
    [([0] * 6, 2), ([1] * 6, 6), ([4] * 6, 6), ([0, 3, 0, 4, 0, 0], 6), ([4, 0, 1, 0, 0, 0], 5)],
    ids=str,
)
def test_every_draw_must_be_wrong_twice_in_a_row_where_stop_after_is_2(right_draws, steps):
    settings = PGDSettings(eps=0.1, steps=6, eot_samples=4, stop_after=2)
    seen = []
    pgd(
        Scripted(right_draws).eval(),
        images_of((1, 3, 4, 4)),
        torch.tensor([0]),
        settings,
        callback=lambda step, *_: seen.append(step),
    )
    assert seen == list(range(1, steps + 1))


@pytest.mark.parametrize("max_batch", [1, 4, 7, 512])
@pytest.mark.parametrize("eot_samples", [1, 3])
def test_parts_of_a_batch_give_the_attack_of_the_whole(max_batch, eot_samples):
    model, images = smooth_model(), images_of()
    sizes = []
    model.register_forward_pre_hook(lambda _model, given: sizes.append(len(given[0])))
    settings = replace(L2, steps=3, start="clean", eot_samples=eot_samples)
    whole = pgd(model, images, MANY, settings)
    sizes.clear()
    parts = pgd(model, images, MANY, settings, max_batch=max_batch)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert max(sizes) <= max_batch
    assert sum(sizes) - 1 == 3 * 6 * eot_samples, "one check, then steps x images x draws"


class PlannedNoise(nn.Module):
    """A smooth model whose noise is planned: image number i of all that it ever sees gets noise[i]."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.count, self.body = noise, 0, smooth_model()

    def forward(self, images):
        noise = self.noise[self.count : self.count + len(images)]
        self.count += len(images)
        return self.body(images + noise)


@pytest.mark.parametrize("max_batch", [1, 5, 512])
def test_the_eot_gradient_is_the_mean_of_the_gradients_of_separate_draws(max_batch):
    images, noise = images_of(), torch.randn(4 * 6, *SHAPE[1:]) * 0.3
    model = PlannedNoise(noise).eval()
    found = input_gradient(model, images, MANY, eot_samples=4, max_batch=max_batch)
    assert model.count == 4 * 6
    gradients, losses, right = [], [], []
    for draw in noise.unflatten(0, (4, 6)):
        copies = images.clone().requires_grad_()
        logits = model.body(copies + draw)
        values = F.cross_entropy(logits, MANY, reduction="none")
        gradients.append(torch.autograd.grad(values.sum(), copies)[0])
        losses.append(values.detach())
        right.append((logits.argmax(dim=1) == MANY).float())
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.01)
    torch.testing.assert_close(found.gradient, torch.stack(gradients).mean(dim=0))
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(dim=0))
    torch.testing.assert_close(found.right, torch.stack(right).mean(dim=0))


def test_more_eot_draws_of_a_pipeline_bring_the_gradient_nearer_to_its_mean():
    purifier = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh())
    pipeline = AToPPipeline(TransformSettings("rt2", noise_std=0.2, grid_size=4), purifier, smooth_model()).eval()
    images = images_of()
    mean = input_gradient(pipeline, images, MANY, eot_samples=2000).gradient

    def distance(draws):
        return (input_gradient(pipeline, images, MANY, eot_samples=draws).gradient - mean).norm().item()

    one, sixteen = sum(distance(1) for _ in range(8)) / 8, sum(distance(16) for _ in range(8)) / 8
    assert sixteen == pytest.approx(one / 4, rel=0.25)  # 1 / sqrt(draws): each copy has dice of its own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loss_of_another_precision_can_be_raised(dtype):
    model, images = smooth_model(), images_of()
    found = input_gradient(model, images, MANY, loss=lambda logits, _: logits[:, 0].to(dtype), eot_samples=2)
    expected = input_gradient(model, images, MANY, loss=lambda logits, _: logits[:, 0])
    assert found.loss.dtype == found.gradient.dtype == torch.float32
    torch.testing.assert_close(found.gradient, expected.gradient)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-12, 1.0, 1e12, 1e25])
def test_a_step_has_norm_1_however_small_or_large_the_gradient(norm, scale):
    gradient = torch.randn(SHAPE, generator=seeded()) * scale
    step = steepest_step(gradient, norm)
    torch.testing.assert_close(perturbation_size(step, norm), torch.ones(6), rtol=1e-4, atol=0)
    along = (step * (gradient / scale)).flatten(1).sum(dim=1)
    best = (gradient / scale).flatten(1).norm(p=1 if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(along, best, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_gives_a_zero_step_to_that_image_alone(norm):
    gradient = torch.ones(2, 3, 4, 4)
    gradient[0] = 0
    step = steepest_step(gradient, norm)
    assert (step[0] == 0).all() and (step[1] > 0).all()


def test_the_size_of_a_perturbation_is_its_norm():
    perturbation = torch.zeros(2, 3, 4, 4)
    perturbation[0, 0, 0, 0], perturbation[0, 2, 3, 3], perturbation[1, 1, 1, 1] = 3.0, -4.0, -0.5
    assert perturbation_size(perturbation, "linf").tolist() == [4.0, 0.5]
    assert perturbation_size(perturbation, "l2").tolist() == [5.0, 0.5]


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.3)])
def test_a_projection_leaves_what_is_inside_and_moves_what_is_outside_to_the_nearest_point(norm, eps):
    origin = images_of(low=0.3, high=0.7)
    inside = origin + 0.9 * eps * steepest_step(torch.randn(SHAPE, generator=seeded()), norm)
    torch.testing.assert_close(project(inside, origin, eps, norm), inside)
    outside = origin + torch.randn(SHAPE, generator=seeded()) * 0.1
    assert (perturbation_size(outside - origin, norm) > eps).all()
    projected = project(outside, origin, eps, norm)
    torch.testing.assert_close(perturbation_size(projected - origin, norm), torch.full((6,), eps))
    torch.testing.assert_close(project(projected, origin, eps, norm), projected)
    # the nearest point of a convex set: whatever else lies inside is at an obtuse angle
    angle = ((outside - projected) * (inside - projected)).flatten(1).sum(dim=1)
    assert (angle <= 1e-6).all()


@pytest.mark.parametrize("norm, eps", [("linf", 0.3), ("l2", 2.0)])
def test_a_projection_at_the_border_of_the_box_stays_in_box_and_ball(norm, eps):
    origin = images_of().round()  # black and white pixels only
    check_budget(project(origin + torch.randn(SHAPE), origin, eps, norm), origin, eps, norm)


@pytest.mark.parametrize("size, eps", [(32, 0.05), (32, 0.5), (32, 5.0), (256, 0.05), (256, 0.5), (256, 5.0), (256, 40.0)])
def test_rounding_does_not_break_the_l2_budget_of_large_images(size, eps):
    origin = torch.full((2, 3, size, size), 0.5)
    origin += torch.rand(origin.shape, generator=seeded()) * 0.1
    projected = project(origin + torch.randn(origin.shape, generator=seeded(1)), origin, eps, "l2")
    check_budget(projected, origin, eps, "l2")
    assert perturbation_size(projected - origin, "l2").max() > 0.9 * eps


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 0.2)])
def test_a_random_start_is_uniform_in_the_ball(norm, eps):
    images = torch.full((4000, 3, 1, 1), 0.5)
    noise = random_start(images, eps, norm, seeded()) - images
    sizes = perturbation_size(noise, norm) / eps
    assert sizes.max() <= 1 + 1e-5
    assert noise.mean(dim=0).abs().max() < 0.01
    # uniform in three dimensions: the share within radius r is r^3, in the ball as in the cube
    for radius in (0.25, 0.5, 0.75, 0.9):
        assert (sizes < radius).float().mean() == pytest.approx(radius**3, abs=0.025)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_keeps_to_the_box(norm):
    images = images_of().round()
    check_budget(random_start(images, 0.3, norm, seeded()), images, 0.3, norm)


@pytest.mark.parametrize("function", [steepest_step, perturbation_size])
def test_an_unknown_norm_is_refused_with_the_allowed_ones(function):
    with pytest.raises(ValueError, match="unknown norm 'l1'; allowed: linf, l2"):
        function(images_of(), "l1")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x[0, 0, 0, 0].fill_(float("nan")), "not finite"),
        (lambda x: x[0, 0, 0, 0].fill_(-0.01), "left \\[0, 1\\]"),
        (lambda x: x[0, 0, 0, 0].fill_(1.01), "left \\[0, 1\\]"),
        (lambda x: x[3, 1, 2, 2].add_(0.102), "left its budget"),
    ],
    ids=["nan", "below", "above", "eps"],
)
def test_a_result_outside_box_or_budget_never_passes(spoil, message):
    images = images_of(low=0.4, high=0.6)
    adversarial = images + 0.1
    check_budget(adversarial, images, 0.1, "linf")
    spoil(adversarial)
    with pytest.raises(AssertionError, match=message):
        check_budget(adversarial, images, 0.1, "linf")


def test_an_l2_result_beyond_its_budget_never_passes():
    images = images_of(low=0.4, high=0.6)
    adversarial = images + 0.501 * steepest_step(torch.ones(SHAPE), "l2")
    with pytest.raises(AssertionError, match="l2 norm 0.50"):
        check_budget(adversarial, images, 0.5, "l2")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": -0.1}, "eps must be above 0"),
        ({"eps": float("nan")}, "eps must be above 0"),
        ({"eps": float("inf"), "norm": "l2"}, "eps must be above 0"),
        ({"eps": 8.0}, r"at most 1 \(images lie in \[0, 1\]\), got 8.0; 8/255\?"),
        ({"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
        ({"steps": 0}, "steps and eot_samples must be at least 1, got 0 and 1"),
        ({"steps": -1}, "steps and eot_samples must be at least 1"),
        ({"eot_samples": 0}, "steps and eot_samples must be at least 1, got 20 and 0"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": float("nan")}, "alpha must be above 0"),
        ({"stop_after": -1}, r"stop_after must be 0 \(never\) or more, got -1"),
        ({"start": "zero"}, "unknown start 'zero'; allowed: random, clean"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PGDSettings(**{"eps": 0.1} | wrong)


def test_the_step_size_has_a_default_and_l2_may_exceed_1():
    for steps, share in {1: 1, 2: 1.25, 5: 1 / 2, 7: 2.5 / 7, 8: 1 / 3, 200: 1 / 3}.items():
        assert PGDSettings(eps=0.4, steps=steps).step_size == pytest.approx(0.4 * share)
    assert PGDSettings(eps=0.4, steps=10, alpha=0.007).step_size == 0.007
    assert PGDSettings(eps=5.0, norm="l2").eps == 5.0
    assert PGDSettings(eps=1.0).eps == 1.0


def with_inner(part):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), part), nn.Flatten(), nn.Linear(16, 6)).eval()


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
@pytest.mark.parametrize("part", [nn.BatchNorm2d(4), nn.Dropout(0.5)], ids=["batchnorm", "dropout"])
def test_a_model_with_a_part_in_train_mode_is_refused_and_left_as_it_was(attack, part):
    model = with_inner(part)
    part.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1\.1 is in train mode; call model\.eval\(\)"):
        if attack == "pgd":
            pgd(model, images_of(), MANY, LINF)
        else:
            fgsm(model, images_of(), MANY, 0.1)
    assert part.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    part.eval()
    assert pgd(model, images_of(), MANY, LINF).shape == SHAPE


def test_a_fresh_pipeline_must_be_put_into_eval_mode_first():
    pipeline = AToPPipeline(TransformSettings("rt1", grid_size=2), nn.Conv2d(5, 3, 1), smooth_model())
    with pytest.raises(ValueError, match="the model itself is in train mode"):
        require_eval_mode(pipeline)
    require_eval_mode(pipeline.eval())


@pytest.mark.parametrize("value", [-0.001, 1.001, 255.0, float("nan"), float("inf"), -float("inf")])
def test_images_outside_0_to_1_are_refused(value):
    images = images_of()
    images[4, 2, 1, 3] = value
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\] without NaN"):
        pgd(smooth_model(), images, MANY, LINF)


@pytest.mark.parametrize("label", [-1, 5, 100])
def test_labels_without_a_logit_are_refused(label):
    labels = MANY.clone()
    labels[3] = label
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4 for this model"):
        pgd(smooth_model(), images_of(), labels, LINF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool], ids=str)
def test_labels_of_another_type_than_int64_are_refused(dtype, without_shape_checks):
    with pytest.raises(ValueError, match=f"labels must be int64, got {dtype}"):
        pgd(smooth_model(), images_of(), MANY.to(dtype), LINF)


def test_other_bad_batches_are_refused(without_shape_checks):
    with pytest.raises(ValueError, match="6 images, but 5 labels"):
        check_attack(smooth_model(), images_of(), MANY[:5])
    with pytest.raises(ValueError, match="no images to attack"):
        check_attack(smooth_model(), images_of()[:0], MANY[:0])


class Broken(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits.expand(len(images), *self.logits.shape[1:])


def test_a_model_without_usable_logits_is_refused():
    with pytest.raises(ValueError, match="logits that are not finite"):
        check_attack(Broken(torch.tensor([[0.0, float("nan")]])).eval(), images_of(), LABELS)
    with pytest.raises(ValueError, match=r"logits of shape \(batch, classes\), got \(1, 2, 4, 4\)"):
        check_attack(Broken(torch.zeros(1, 2, 4, 4)).eval(), images_of(), LABELS)


def test_the_bare_loop_takes_any_callable_and_agrees_with_the_checked_attack():
    model, images = smooth_model(), images_of()
    checked = pgd(model, images, MANY, LINF, generator=seeded())
    assert torch.equal(ascend(lambda x: model(x), images, MANY, LINF, generator=seeded()), checked)
