"""Small feature networks and fixtures for the tests of the scores. Import the fixtures that a module uses by name."""

import pytest
import torch
import torch.nn.functional as F

from evaluations.features import Extractor, Inception, load_extractor

CPU = torch.device("cpu")


def channels_first(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def random_inception_state():
    """Inception's state dict with random weights whose signal survives 94 units."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in Inception().network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        if key.endswith("conv.weight"):
            noise *= (2 / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            noise = 1 + 0.2 * noise.clamp(-3, 3)
        elif value.is_floating_point():
            noise *= 0.2
        state[key] = noise
    return state


@pytest.fixture(scope="session")
def random_state():
    return random_inception_state()


@pytest.fixture(scope="session")
def weights_file(random_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_state, path)
    return path


@pytest.fixture(scope="session")
def inception(weights_file):
    """Inception with random weights: 0.15 s an image on one core."""
    return load_extractor("inception", "cpu", weights_file)


class Small(torch.nn.Module):
    """Six pooled and four spatial features: full covariances need few images, and their algebra no time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(48, 10)

    def forward(self, images):
        rows = self.body(F.adaptive_avg_pool2d(images.float() / 16, 4).flatten(1))       # (B, 10)
        return rows[:, :6], rows[:, 6:]


@pytest.fixture
def small():
    """A small network that counts as Inception."""
    network = Small().requires_grad_(False)
    classifier = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) / 2
    return Extractor(network, CPU, "inception", "0", True, classifier)
