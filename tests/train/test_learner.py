"""How a network learns over its epochs: the schedule, the rates, what stays frozen, what is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from train.config import compose
from train.errors import RunError
from train.learner import Learner
from train.model import balanced, build

CONFIG = compose(environ={})


def learner(network: nn.Module, steps: int = 100, **fit: Any) -> Learner:
    config = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, **fit))
    return Learner(network, config, steps)


def test_the_rate_rises_and_falls() -> None:
    shares = [learner(Fixed(), 100, warm_up=0.1).share(step) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9] == shares[10] == 1.0
    assert shares == [*sorted(shares[:10]), *sorted(shares[10:], reverse=True)]
    assert 0 < shares[-1] < 0.001
    assert [learner(Fixed(), steps).share(0) for steps in (1, 2, 3)] == [1.0] * 3, "a very short one moves too"


def test_every_tensor_has_a_rate_relative_to_its_size() -> None:
    network = build("resnet18", 2)
    optimizer = learner(network, rate=0.5).configure_optimizers()["optimizer"]
    rates = {id(group["params"][0]): group["initial_lr"] for group in optimizer.param_groups}
    assert len(rates) == len(list(network.parameters()))
    weight = network.get_parameter("layer1.0.conv1.weight")
    assert rates[id(weight)] == pytest.approx(0.5 * float(weight.detach().square().mean().sqrt()))
    assert rates[id(network.get_parameter("bn1.bias"))] == pytest.approx(0.5 * 0.01), "zeros have no size"


@pytest.mark.parametrize("batch_norm", ["frozen", "learnt"])
def test_frozen_statistics_stay_learnt_ones_move_and_dropout_is_on(batch_norm: str) -> None:
    network = build("mobilenet_v3_small", 2)
    one, key = learner(network, batch_norm=batch_norm), "features.0.1.running_mean"
    one.on_train_epoch_start()
    before = network.state_dict()[key].clone()
    one(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    assert torch.equal(network.state_dict()[key], before) == (batch_norm == "frozen")
    assert all(layer.training for layer in network.modules() if isinstance(layer, nn.Dropout))


class Fixed(nn.Module):
    """Answers class 0 for every picture."""

    def __init__(self, logit: float = 5.0) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)
        self._logits = torch.tensor([logit, 0.0])

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self._logits.repeat(len(pictures), 1) + 0 * self.fc(pictures[:, 0, 0, :1])


def test_hits_and_losses_are_means_over_pictures() -> None:
    one = learner(Fixed())
    for truths in ([0, 0, 1], [0]):
        batch = torch.zeros(len(truths), 3, 2, 2, dtype=torch.uint8), torch.tensor(truths)
        one.validation_step(batch, 0)
    right, wrong = (float(nn.functional.cross_entropy(torch.tensor([[5.0, 0.0]]), torch.tensor([t]))) for t in (0, 1))
    assert one.validation_tally.accuracy == 0.75
    assert one.validation_tally.loss == pytest.approx((3 * right + wrong) / 4)
    one.on_validation_epoch_start()
    assert one.validation_tally.pictures == 0


def test_the_head_penalty_is_in_the_loss_but_not_in_what_is_reported() -> None:
    batch = torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    network = Fixed()
    plain, penalised = learner(network, head_penalty=None), learner(network, head_penalty=4.0)
    apart = penalised.training_step(batch, 0) - plain.training_step(batch, 0)
    assert float(apart.detach()) == pytest.approx(2 * float(network.fc.weight.detach().square().sum()))
    assert penalised.training_tally.loss == plain.training_tally.loss


def test_while_layers_are_frozen_only_the_head_moves_then_everything_does(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("resnet18", 2)
    config = dataclasses.replace(CONFIG, schedule=dataclasses.replace(CONFIG.schedule, frozen=1))
    config = dataclasses.replace(config, fit=dataclasses.replace(config.fit, batch_norm="learnt"))
    one = Learner(network, config, 10)
    one.on_train_epoch_start()
    assert {name for name, tensor in network.named_parameters() if tensor.requires_grad} == {"fc.weight", "fc.bias"}
    assert not network.get_submodule("bn1").training, "statistics of frozen layers stay"
    monkeypatch.setattr(Learner, "current_epoch", 1)
    one.on_train_epoch_start()
    assert all(tensor.requires_grad for tensor in network.parameters())
    assert network.get_submodule("bn1").training


def test_sgd_takes_the_same_step_for_every_tensor_and_a_constant_rate_stays() -> None:
    sgd = dataclasses.replace(CONFIG.optimiser, name="sgd", relative=False, momentum=0.8)
    config = dataclasses.replace(CONFIG, optimiser=sgd, schedule=dataclasses.replace(CONFIG.schedule, shape="constant"))
    one = Learner(build("resnet18", 2), config, 100)
    optimizer = one.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.SGD
    assert {(group["initial_lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.0003, 0.8)}
    assert [one.share(step) for step in (0, 10, 99)] == [0.1, 1.0, 1.0]


def test_a_rare_class_counts_for_more_in_the_loss_but_not_in_what_is_reported() -> None:
    batch = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 0, 1])
    weights = balanced([3, 1])
    assert weights.tolist() == pytest.approx([2 / 3, 2])
    config = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, head_penalty=None))
    plain, weighed = Learner(Fixed(), config, 10), Learner(Fixed(), config, 10, weights)
    right, wrong = (float(nn.functional.cross_entropy(torch.tensor([[5.0, 0.0]]), torch.tensor([t]))) for t in (0, 1))
    assert float(plain.training_step(batch, 0).detach()) == pytest.approx((3 * right + wrong) / 4)
    assert float(weighed.training_step(batch, 0).detach()) == pytest.approx((right + wrong) / 2)
    plain.validation_step(batch, 0)
    weighed.validation_step(batch, 0)
    assert plain.validation_tally == weighed.validation_tally


def test_a_loss_that_is_not_finite_stops_with_a_sentence() -> None:
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([0])
    with pytest.raises(RunError, match=r"the loss is nan in epoch 1; lower fit\.rate, which is 0\.0003"):
        learner(Fixed(float("nan"))).training_step(batch, 0)
