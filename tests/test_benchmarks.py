"""The benchmarks still run on the code that they measure."""

import torch

from benchmarks import attack_speed, leaderboard, picture, size, training_speed  # noqa: F401


def test_a_step_of_the_notebook_can_be_timed():
    for parameters in (training_speed.STEP, training_speed.TRANSFER | {"gan_weight": 1.0}):
        call = training_speed.fine_tuning(parameters, 32, 4, "float32", torch.device("cpu"))
        assert training_speed.seconds_of(call, torch.device("cpu"), least=0) > 0
