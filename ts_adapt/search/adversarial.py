"""The loss that another network learns: D tells the student's images from real ones, the student learns to be mistaken.

    L_b = distance_b + weight softplus(D(y_b) - D(x_b))                  the student's; x_b its image, y_b a real one
    L_D = mean_b softplus(D(x_b) - D(y_b)) + gamma n / 2 mean_b (|dD(x_b)/dx_b|^2 + |dD(y_b)/dy_b|^2)

The relativistic pairing loss with the zero-centred penalties R1, on real images, and R2, on the student's (Huang et al.
2024, R3GAN), beside the distance as in GAS (arXiv 2510.17699), whose y_b are the teacher's; here they are real. n is
the number of values of an image: the penalty is of the slope in |x| / sqrt(n), so that one gamma serves all sizes.
Only D is differentiated twice. Pairs are drawn anew at each of D's steps, from the seed, the step's number and the
samples' own: neither which process holds which samples, nor whether a training was killed, changes anything. After each
step of the student's D makes TURNS, on the same images.

D sees images, as in GAS, not features: a learner hides what a fixed network does not see (`distribution`), that
network could not judge, and not every model has one. R1 and R2 are what keeps D from living on what is small. It sees
means of pixels where a side is longer than LARGEST, knows no prompts, and is one for all numbers of steps.

What of a learning is kept. D at one time cannot be compared with D at another, so its loss validates nothing; the
paired distance alone would choose what D has changed least; a distance in features would be learned by, and its network
could not judge. So the last moving average is kept, of those that are nearer to the teacher, by the other losses on the
validation samples, than where learning began: the static grid, or the best start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ts_adapt.distributed import add_gradients, total_of
from ts_adapt.errors import TsAdaptError
from ts_adapt.sampling import generator_for
from ts_adapt.search.objective import Objective

LARGEST = 128
"""Pixels of a side that D sees, at most."""
WIDTH, WIDEST, SMALLEST_SIDE = 32, 128, 4
"""Channels at first and at most, and the side where the convolutions end."""
GAMMA = 1e-3
RATE, BETAS = 1e-3, (0.0, 0.99)
"""Of D's Adam."""
TURNS = 4
"""Steps of D behind each of the student's."""
STREAM = 5
"""Of the draws of pairs."""


def seen(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` as D sees them: float32, means over squares of pixels where a side is above LARGEST."""
    factor = -(-max(images.shape[2:]) // LARGEST)
    images = images.float()
    return images if factor == 1 else F.avg_pool2d(images, factor, ceil_mode=True)


def check_pictures(shape: Sequence[int]) -> None:
    """TsAdaptError for samples of a shape that is not (C, H, W)."""
    if len(shape) != 3:
        raise TsAdaptError(
            f"a discriminator knows pictures (C, H, W), and the samples are {tuple(shape)}; set adversarial to 0"
        )


class Discriminator(nn.Module):
    """D: images `(B, *shape)`, as they are `seen`, -> `(B,)`, which is 0 at first, and then large where they look real.

    Raises TsAdaptError as `check_pictures` does.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        check_pictures(shape)
        channels, *sides = seen(torch.zeros(1, *shape)).shape[1:]
        width, layers = WIDTH, [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.LeakyReLU(0.2)]
        while max(sides) > SMALLEST_SIDE:
            wider, sides = min(2 * width, WIDEST), [-(-side // 2) for side in sides]
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.LeakyReLU(0.2)]
            width = wider
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.score = nn.Linear(width * sides[0] * sides[1], 1, bias=False)  # it would cancel in every pair
        nn.init.zeros_(self.score.weight)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.features(x))[:, 0]
        return scores


def losses_of(discriminator: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """L_D `(B,)`, whose mean it is, of the student's images x and real ones y, `(B, ...)` each."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    of_x, of_y = discriminator(x), discriminator(y)
    slopes = torch.autograd.grad(of_x.sum() + of_y.sum(), (x, y), create_graph=True)
    steep = sum(slope.square().flatten(1).sum(1) for slope in slopes)
    return F.softplus(of_x - of_y) + GAMMA * x[0].numel() / 2 * steep


class Adversary:
    """D under way: the `network`, its `optimizer`, the real `images` `(m, C, H, W)` as they are `seen`.

    Network and optimizer are all that changes, and `level`, the mean of L_D before its last step: ln 2 where D tells
    nothing apart, 0 where it tells everything. Raises TsAdaptError without images, and as `Discriminator` does.
    """

    def __init__(self, images: Tensor | None, seed: int) -> None:
        if images is None:
            raise TsAdaptError("a discriminator learns from real images, and none were given; give some")
        self.images, self.seed = images, seed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            network = Discriminator(images.shape[1:])
        self.network = network.to(images.device).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=RATE, betas=BETAS)
        self.level = math.log(2)
        self._met: list[tuple[Tensor, Tensor]] = []

    def loss(self, index: Tensor, images: Tensor) -> Tensor:
        """softplus(D(y) - D(x)) `(B,)` of the student's `images` of the samples `index` `(B,)`, which D learns from
        next; 0 where no gradient is asked for."""
        if not images.requires_grad:
            return torch.zeros(len(images), device=images.device)
        x = seen(images)
        finite = x.detach().flatten(1).isfinite().all(1)
        self._met.append((index[finite.to(index.device)], x.detach()[finite]))
        return F.softplus(self.network(self._real(index)) - self.network(x))

    def learn(self, together: bool = False) -> None:
        """D's steps on the images met since its last, by this process alone or by all `together`; none where there are
        none."""
        met, self._met = [part for part in self._met if len(part[0])], []
        count = torch.tensor(sum(len(index) for index, _ in met), device=self.images.device)
        count = total_of(count) if together else count
        if not count:
            return
        self.network.requires_grad_(True)
        for _ in range(TURNS):
            self.optimizer.zero_grad()
            found = torch.zeros((), device=self.images.device)
            for index, x in met:
                part = losses_of(self.network, x, self._real(index)).sum() / count
                part.backward()
                found += part.detach()
            if together:
                add_gradients(self.network.parameters())
            self.optimizer.step()
        self.level = float(total_of(found) if together else found)
        self.network.requires_grad_(False)

    def _real(self, index: Tensor) -> Tensor:
        """The real image of each sample, at D's present step."""
        kept = self.optimizer.state.get(next(self.network.parameters()))
        generator = generator_for(self.seed, int(kept["step"]) if kept else 0, stream=STREAM)
        order = torch.randperm(len(self.images), generator=generator)
        return self.images[order[index.cpu() % len(order)].to(self.images.device)]


@dataclass(frozen=True)
class Beside:
    """What is asked beside the distance: `weight` times the loss of `adversary`, and what was asked `before`."""

    adversary: Adversary
    weight: float
    before: Callable[[Tensor], Callable[[Tensor], Tensor]] | None

    def __call__(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        others = None if self.before is None else self.before(index)

        def loss(images: Tensor) -> Tensor:
            found = self.weight * self.adversary.loss(index, images)
            return found if others is None else found + others(images).to(found)

        return loss


def opposed(objective: Objective, adversary: Adversary, weight: float) -> Objective:
    """`objective` with `weight` times the loss of `adversary` beside its distance, where it is learned from."""
    return replace(objective, beside=Beside(adversary, weight, objective.beside))


def learn(objective: Objective, together: bool = False) -> None:
    """Let the discriminator of `objective`, where it has one, learn; as `Adversary.learn`."""
    if isinstance(objective.beside, Beside):
        objective.beside.adversary.learn(together)
