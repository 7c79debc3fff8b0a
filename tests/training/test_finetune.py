import pytest

from mpoe.training.finetune import mean_loss


def test_mean_loss_weighs_by_steps():
    history = [
        {"loss": 2.0, "step": 20},
        {"eval_loss": 9.0, "step": 20},
        {"loss": 1.0, "step": 40},
        {"loss": 0.5, "step": 50},
        {"train_loss": 0.1, "step": 50},
    ]
    assert mean_loss(history) == pytest.approx((20 * 2.0 + 20 * 1.0 + 10 * 0.5) / 50)
    assert mean_loss([]) is None
