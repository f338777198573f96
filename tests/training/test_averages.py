import os
import signal
from dataclasses import replace

import pytest
import torch

from diffusekrona.training import TrainingInterrupted
from tests.training.runs import QUICK, SMALL, adapted, copies, train


def test_an_interrupted_run_leaves_the_averages_as_a_finished_one_does(tmp_path):
    pipe, factors = adapted(**SMALL)
    each = []

    def stop_at_three(done):
        each.append(copies(factors))
        if done.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as stopped:
        train(pipe, factors, replace(QUICK, max_train_steps=9, ema_decay=0.9), stop_at_three, folder=tmp_path)
    assert stopped.value.step == 3
    for name, found in factors.items():
        average = each[0][name].double()
        for step, now in enumerate(each[1:], 1):
            keep = min(0.9, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * now[name]
        torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-7)
        if "krona_B" in name:
            assert not torch.equal(found, each[-1][name])
