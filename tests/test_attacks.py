"""PGD finds a known optimum, keeps its ball, averages over samples, and refuses what would falsify a
number."""

import pytest
import torch
from torch import nn

from atoplib.attacks import ATTACKS, RADII, Ball, PassCounter, eot_gradient, fgsm, n_fgsm, pgd, pgd_ensemble
from atoplib.attacks.losses import (
    cross_entropy,
    dlr,
    margin,
    scaled_cross_entropy,
    target_margin,
    targeted_dlr,
)
from atoplib.attacks.pgd import LAST_STEP, step_sizes
from atoplib.contract import adapt
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

SHAPE = (6, 3, 4, 4)
LABELS = torch.tensor([0, 1, 0, 0, 1, 1])
MANY = torch.tensor([0, 1, 2, 3, 4, 0])
BALLS = [("linf", 0.1), ("l2", 0.5), ("l1", 1.5)]


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
    """The same with a random positive factor for each image and call, so that every sample has the same best
    attack."""

    def __init__(self):
        super().__init__()
        self.generator = seeded(2)

    def forward(self, images):
        return super().forward(images) * (0.1 + torch.rand(len(images), 1, generator=self.generator))


def smooth_model(classes=5):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(32, classes)).eval()


def best_attack(model, images, labels, eps, norm):
    """The closed form: along the sign of the weights, or along the weights (with no pixel near 0 or 1)."""
    direction = model.weight.detach() * (1 - 2 * labels.view(-1, 1, 1, 1))
    if norm == "linf":
        return (images + eps * direction.sign()).clamp(0, 1)
    if norm == "l2":
        return images + eps * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    # l1: the pixels of the largest weights go to 0 or 1, one after the other, until eps is spent
    best = images.clone()
    for image, towards in zip(best, direction, strict=True):
        left = eps
        for place in towards.abs().flatten().argsort(descending=True).tolist():
            value, aim = image.view(-1)[place].item(), float(towards.flatten()[place] > 0)
            spent = min(left, abs(aim - value))
            image.view(-1)[place] = value + (spent if aim else -spent)
            left -= spent
    return best


@pytest.mark.parametrize("model_class", [TwoClasses, RandomScale])
@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("steps", [1, 2, 20], ids="{}steps".format)
@pytest.mark.parametrize("norm, eps", BALLS[:2])
def test_on_a_linear_model_it_finds_the_known_optimum(norm, eps, steps, start, model_class):
    # linf: the box [0, 1] cuts the ball off; l2: it does not, for no clipped optimum is known
    images = images_of() if norm == "linf" else images_of(low=0.4, high=0.6)
    model = model_class().eval()
    options = {"eps": eps, "norm": norm, "steps": steps, "start": start, "eot_samples": 4}
    found = pgd(model, images, LABELS, **options, seed=3, shrink=start == "random")  # else as published
    best = best_attack(model, images, LABELS, eps, norm)
    if start == "clean" or (norm == "linf" and steps > 1):
        torch.testing.assert_close(found, best, atol=1e-5, rtol=0)
        return
    # from a random point one step cannot reach the optimum everywhere, and l2 only nears it
    assert (0.95 if steps == 20 else 0.3) < gained_share(images, found, best) < 1 + 1e-4


def gained_share(images, found, best):
    plain = TwoClasses().eval()
    gained, possible = (margin(plain(x), LABELS) - margin(plain(images), LABELS) for x in (found, best))
    return (gained / possible).min().item()


@pytest.mark.parametrize("shrink", [True, False])
def test_in_l1_the_attack_comes_near_the_known_optimum_in_the_cut_ball(shrink):
    images = images_of()
    options = {"eps": 3.0, "norm": "l1", "steps": 100, "cycles": 1, "start": "clean", "shrink": shrink}
    found = pgd(TwoClasses().eval(), images, LABELS, **options)
    assert 0.9 < gained_share(images, found, best_attack(TwoClasses(), images, LABELS, 3.0, "l1")) < 1 + 1e-4


@pytest.mark.parametrize("model_class", [TwoClasses, RandomScale])
def test_fgsm_is_one_linf_step_of_size_eps_from_the_image(model_class):
    model, images = model_class().eval(), images_of()
    found = fgsm(model, images, LABELS, eps=8 / 255, eot_samples=2)
    torch.testing.assert_close(found, best_attack(model, images, LABELS, 8 / 255, "linf"))


def test_n_fgsm_steps_from_noise_and_is_not_projected():
    model, images = smooth_model(), images_of()
    found, again, other = (n_fgsm(model, images, MANY, eps=0.05, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(found, again) and not torch.equal(found, other)
    assert (Ball(images, 0.15, "linf").check(found) - images).abs().max() > 0.1
    assert (cross_entropy(model(found), MANY) > cross_entropy(model(images), MANY)).all()
    for wrong in ({"noise": 0.0}, {"norm": "l2"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            n_fgsm(model, images, MANY, eps=0.05, **wrong)


@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("norm, eps", [*BALLS, ("linf", 1.0), ("l2", 30.0)])
def test_the_loss_rises_and_every_iterate_stays_in_the_ball(norm, eps, start):
    model, images = smooth_model(), images_of()
    seen, ball = [], Ball(images, eps, norm)

    def callback(step, steps, adversarial, loss):
        ball.check(adversarial)
        assert loss.shape == (6,) and steps == 10
        seen.append((step, loss.mean().item(), adversarial))

    found = pgd(model, images, MANY, eps=eps, norm=norm, steps=10, start=start, callback=callback)
    assert [step for step, *_ in seen] == list(range(1, 11))
    assert seen[-1][1] > seen[0][1] and not torch.equal(seen[0][2], seen[1][2])
    assert (cross_entropy(model(found), MANY) > cross_entropy(model(images), MANY)).all()
    assert ball.size(found).max() > 0.5 * min(eps, 0.5)
    assert not found.requires_grad


def test_the_loss_that_is_raised_can_be_a_function():
    model, images = TwoClasses().eval(), images_of()
    found = pgd(
        model, images, LABELS, eps=0.1, steps=1, start="clean",
        loss=lambda logits, _: logits[:, 1] - logits[:, 0],
    )  # fmt: skip
    torch.testing.assert_close(found, best_attack(model, images, torch.zeros_like(LABELS), 0.1, "linf"))


def test_an_attack_can_start_from_images_outside_its_ball():
    model, images = smooth_model(), images_of()
    far = pgd(model, images, MANY, eps=0.2)
    found = pgd(model, images, MANY, eps=0.1, start=far, steps=1, alpha=1e-6)
    torch.testing.assert_close(found, Ball(images, 0.1, "linf").project(far), atol=1e-5, rtol=0)


def test_a_restart_begins_with_parts_of_the_best_point_so_far():
    model, images, path = TwoClasses().eval(), images_of((20, *SHAPE[1:])), []
    labels = model(images).argmax(dim=1)
    start = best_attack(model, images, labels, 1e-3, "linf")
    options = {"steps": 1, "alpha": 1e-9, "restarts": 2, "callback": lambda *at: path.append(at[2])}
    pgd(model, images, labels, eps=1e-3, start=start, recombine=True, **options)
    assert 0.4 < torch.isclose(path[-1], start, rtol=0, atol=1e-6).float().mean() < 0.6


STEPWISE = {"eps": 0.08, "steps": 8, "alpha": 0.02, "start": "clean"}


@pytest.mark.parametrize("early_stop", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_an_image_stops_once_it_was_wrong_in_so_many_steps_in_a_row_and_no_other_does(early_stop, momentum):
    model, images = smooth_model(), images_of((12, 3, 4, 4))
    labels = model(images).argmax(dim=1)
    labels[3] = (labels[3] + 1) % 5  # wrong from the start
    path = [images]
    pgd(model, images, labels, **STEPWISE, momentum=momentum, callback=lambda *at: path.append(at[2]))
    wrong = torch.stack([model(x).argmax(dim=1) != labels for x in path])
    ends = []
    for image in range(12):
        in_a_row = 0
        for step in range(8):
            in_a_row = in_a_row + 1 if wrong[step, image] else 0
            if in_a_row == early_stop:
                break
        ends.append(step + 1)
    assert ends[3] == early_stop and len(set(ends)) > 2 and 8 in ends
    counter = PassCounter(model)
    found = pgd(counter, images, labels, **STEPWISE, momentum=momentum, early_stop=early_stop)
    torch.testing.assert_close(found, torch.stack([path[end][image] for image, end in enumerate(ends)]))
    assert counter.gradient_passes == 1 + sum(ends), "an image that had stopped was computed again"
    assert (model(found).argmax(dim=1) != labels)[[end < 8 for end in ends]].all()


def test_an_image_that_is_misclassified_outside_its_ball_alone_does_not_leave():
    model, images, steps = TwoClasses().eval(), images_of((1, *SHAPE[1:]), low=0.4, high=0.6), []
    label = model(images).argmax(dim=1)
    # 0.75 of the way to the boundary
    eps = 0.75 * (margin(model(images), label).abs() / (0.2 * model.weight.norm())).item()
    options = {"norm": "l2", "steps": 10, "early_stop": 1, "callback": lambda step, *_: steps.append(step)}
    pgd(model, images, label, eps=eps, **options)
    assert steps == list(range(1, 11))
    assert model(best_attack(model, images, label, 2 * eps, "l2")).argmax(dim=1) != label


@pytest.mark.parametrize("norm, schedule", [("l1", {"cycles": 1, "momentum": 0.25}), ("l2", {"cycles": 1})])
def test_the_ensemble_has_a_schedule_of_its_own_where_the_ball_shrinks(norm, schedule):
    model, images = smooth_model(), images_of()
    own = {"eps": 0.1, "norm": norm, "steps": 9, "restarts": 1, "loss": "margin"}
    found = pgd_ensemble(model, images, MANY, **own)
    usual = {"eot_samples": 5, "momentum": 0.75, "cycles": 3, "early_stop": 3, "smoothing": 0.5}
    assert torch.equal(found, pgd(model, images, MANY, **own, **usual | schedule))
    assert not torch.equal(found, pgd(model, images, MANY, **own, **usual))


def test_images_that_ask_for_gradients_and_targets_in_a_list_are_taken(without_shape_checks):
    model, images = smooth_model(), images_of()
    aims = (MANY + 1) % 5
    found = pgd(model, images.clone().requires_grad_(), MANY, eps=0.1, targets=aims.tolist())
    assert torch.equal(found, pgd(model, images, MANY, eps=0.1, targets=aims.int()))
    assert not found.requires_grad
    for wrong in (3, [0.5] * 6, MANY.tolist(), [5] * 6):
        with pytest.raises(ValueError, match="targets must be 6 classes of 0..4, none of them the image's"):
            pgd(model, images, MANY, eps=0.1, targets=wrong)


class Scripted(TwoClasses):
    """Of the samples of one image of class 0, so many are correct at each step."""

    def __init__(self, correct_samples):
        super().__init__()
        self.correct_samples = iter([0, *correct_samples])  # the first call is the check of an adapted model

    def forward(self, images):
        correct = next(self.correct_samples)
        favoured = torch.tensor([[10.0, 0.0]] * correct + [[0.0, 10.0]] * (len(images) - correct))
        return super().forward(images) + favoured


@pytest.mark.parametrize(
    "correct_samples, steps, smoothing",
    [
        ([0] * 6, 2, 0),
        ([1] * 6, 6, 0),
        ([4] * 6, 6, 0),
        ([0, 3, 0, 4, 0, 0], 6, 0),
        ([4, 0, 1, 0, 0, 0], 5, 0),
        ([0] * 6, 6, 0.1),  # a smoothed run judges other points: never
    ],
    ids=str,
)
def test_every_sample_must_be_wrong_twice_in_a_row_where_early_stop_is_2(correct_samples, steps, smoothing):
    seen, model, image = [], adapt(Scripted(correct_samples).eval()), images_of((1, 3, 4, 4))
    options = {"steps": 6, "eot_samples": 4, "early_stop": 2, "callback": lambda *at: seen.append(at[0])}
    pgd(model, image, torch.tensor([0]), eps=0.1, smoothing=smoothing, **options)
    assert seen == list(range(1, steps + 1))


class PlannedNoise(nn.Module):
    """A smooth model whose noise is planned: image number i of all that it ever sees gets noise[i]."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.count, self.body = noise, 0, smooth_model()

    def forward(self, images):
        noise = self.noise[self.count : self.count + len(images)]
        self.count += len(images)
        return self.body(images + noise)


@pytest.mark.parametrize("count, max_batch", [(6, 512), (1, 3)])
@pytest.mark.parametrize("loss", ["ce", "mean_softmax"])
def test_the_eot_gradient_is_that_of_separate_samples(count, max_batch, loss):
    """By autograd through all samples at once: the mean of their cross-entropies, or that of the mean
    probability of scaled logits."""
    images, labels, noise = images_of()[:count], MANY[:count], torch.randn(4 * count, *SHAPE[1:]) * 0.3
    model = PlannedNoise(noise).eval()
    found = eot_gradient(model, images, labels, loss=loss, eot_samples=4, max_batch=max_batch)
    assert model.count == 4 * count
    copies = images.clone().requires_grad_()
    logits = torch.stack([model.body(copies + sample) for sample in noise.unflatten(0, (4, count))])
    scaled = logits if loss == "ce" else 2 * logits / logits.detach().std(dim=2, keepdim=True)
    each = -scaled.log_softmax(dim=2).gather(2, labels.expand(4, -1)[..., None])[..., 0]
    values = each.mean(dim=0) if loss == "ce" else -(-each).exp().mean(dim=0).log()
    torch.testing.assert_close(found.gradient, torch.autograd.grad(values.sum(), copies)[0])
    torch.testing.assert_close(found.loss, values.detach())
    torch.testing.assert_close(found.logits, logits.detach())


def test_more_eot_samples_of_a_pipeline_bring_the_gradient_nearer_to_its_mean():
    purifier = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh())
    pipeline = AToPPipeline(Transform("rt2", noise_std=0.2, grid_size=4), purifier, smooth_model()).eval()
    mean = eot_gradient(pipeline, images_of(), MANY, eot_samples=2000).gradient

    def distance(samples):
        return (eot_gradient(pipeline, images_of(), MANY, eot_samples=samples).gradient - mean).norm().item()

    one, sixteen = sum(distance(1) for _ in range(8)) / 8, sum(distance(16) for _ in range(8)) / 8
    assert sixteen == pytest.approx(one / 4, rel=0.25)  # 1 / sqrt(samples): each copy has a sample of its own


def test_passes_are_counted_in_images_and_the_rest_of_the_model_is_seen_through():
    pipeline = AToPPipeline(Transform("rt1", grid_size=2), nn.Conv2d(5, 3, 1), smooth_model()).eval()
    counter, images = PassCounter(pipeline), images_of()
    expected = pipeline(images)
    counter.reseed(0)
    assert torch.equal(counter(images), expected)
    eot_gradient(counter, images, MANY, eot_samples=5)
    assert (counter.gradient_passes, counter.forward_passes) == (30, 6)
    assert counter.transform.name == "rt1" and not counter.training


def test_the_step_size_has_a_default():
    for steps, share in {1: 1, 2: 1.25, 5: 1 / 2, 7: 2.5 / 7, 8: 1 / 3, 200: 1 / 3}.items():
        assert step_sizes(0.4, steps) == pytest.approx([0.4 * share] * steps)
    assert step_sizes(0.4, 3, 0.007) == [0.007] * 3


def test_a_falling_step_goes_from_its_size_to_a_small_part_of_it_once_a_cycle():
    sizes = step_sizes(0.1, 9, cycles=1)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == pytest.approx((0.1, 0.1 * LAST_STEP))
    assert step_sizes(0.1, 18, cycles=2) == sizes * 2 and step_sizes(0.1, 1, cycles=3) == [0.1]


def test_a_function_as_in_a_training_step_gets_the_whole_batch_and_not_one_pass_more():
    model, images, sizes = smooth_model().train(), images_of(), []

    def step_model(x):
        sizes.append(len(x))
        return model(x)

    found = pgd(step_model, images, MANY, eps=0.1, steps=3, max_batch=2)
    assert sizes == [6, 6, 6] and torch.equal(found, pgd(model.eval(), images, MANY, eps=0.1, steps=3))


def test_losses_have_their_closed_forms():
    logits = torch.tensor([[3.0, 1.0, -1.0, 0.0], [2.0, 5.0, 1.0, 4.0]])
    labels, targets = torch.tensor([0, 0]), torch.tensor([1, 3])
    torch.testing.assert_close(margin(logits, labels), torch.tensor([-2.0, 3.0]))
    torch.testing.assert_close(target_margin(logits, labels, targets), torch.tensor([-2.0, 2.0]))
    torch.testing.assert_close(dlr(logits, labels), torch.tensor([-2 / 3, 3 / 3]))
    torch.testing.assert_close(targeted_dlr(logits, labels, targets), torch.tensor([-2 / 3.5, 2 / 3.5]))
    for loss in (margin, dlr, cross_entropy, scaled_cross_entropy):
        torch.testing.assert_close(loss(logits + 7, labels), loss(logits, labels))
    for loss in (dlr, scaled_cross_entropy):
        torch.testing.assert_close(loss(100 * logits, labels), loss(logits, labels))
    with pytest.raises(ValueError, match="DLR loss needs at least 3 classes, but the model has 2"):
        dlr(logits[:, :2], labels)


def test_every_row_of_the_registry_has_options_with_defaults_and_a_usual_radius():
    for name, row in ATTACKS.items():
        assert row.name == name and row.title and row.description and set(row.norms) <= set(RADII)
        assert not {"model", "eps", "norm", "seed", "targets"} & set(row.options)
    assert (
        ATTACKS["pgd"].options["steps"] == 40
        and ATTACKS["pgd"].targeted
        and set(ATTACKS["torchattacks:Square"].options) == {"queries", "eot_samples"}
    )


def test_smoothing_crosses_the_flat_parts_of_a_loss():
    def model(images):  # flat unless the first pixel is bright
        copies.append(images.unique(dim=0))
        return torch.stack(
            [torch.zeros(len(images)), 10 * (images[:, 0, 0, 0] - 0.6).clamp_min(0) - 1], dim=1
        )

    images, labels, copies = torch.full((20, 3, 4, 4), 0.2), torch.zeros(20, dtype=torch.int64), []
    settings = {"eps": 0.7, "norm": "l2", "cycles": 1, "momentum": 0.75}
    left = [
        int((model(pgd(model, images, labels, smoothing=std, **settings)).argmax(dim=1) == labels).sum())
        for std in (0, 0.5)
    ]
    assert left[0] >= 15 and left[1] <= 1
    pgd(model, images[:1], labels[:1], smoothing=0.5, eot_samples=4, **settings)
    assert len(copies[-1]) == 4  # each sample has noise of its own
    with pytest.raises(ValueError, match="smoothing must lie in 0"):
        pgd(model, images, labels, smoothing=[], **settings)
