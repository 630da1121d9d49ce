"""What a model costs: parameters, bytes, seconds."""

import time

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.metrics import latency, model_bytes, parameters


def tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    return model


def test_parameters_and_bytes_count_tied_ones_once():
    assert parameters(tied()) == 9 + 6
    assert model_bytes(tied()) == 4 * (9 + 6 + 6) + 8  # running mean and variance, and a 64-bit count of batches


def test_bytes_follow_the_data_type():
    assert model_bytes(nn.Linear(3, 2).to(torch.bfloat16)) == 16
    assert model_bytes(nn.Linear(3, 2).double()) == 64


def test_latency_is_the_median_of_the_timed_calls(monkeypatch):
    durations = iter([9.0, 9.0, 1.0, 5.0, 2.0])
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call(example):
        clock[0] += next(durations)

    assert latency(call, torch.zeros(1), repeats=3, warmup=2) == 2.0


def test_latency_runs_a_model_without_gradients():
    model = nn.Linear(3, 2)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    assert latency(model, torch.zeros(8, 3), repeats=4, warmup=1) > 0
    assert seen == [False] * 5


def test_what_a_model_caches_while_timed_still_serves_in_training():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.angles = nn.Parameter(torch.ones(3)), None

        def forward(self, x):
            if self.angles is None:
                self.angles = torch.arange(3.0).cos()
            return x * self.angles * self.weight

    model = Caching()
    latency(model, torch.ones(3), repeats=1)
    model(torch.ones(3)).sum().backward()
    torch.testing.assert_close(model.weight.grad, torch.arange(3.0).cos())


def test_latency_takes_a_batch_and_a_function_of_it():
    model = nn.Linear(3, 2)
    assert latency(lambda batch: model(batch["features"]), {"features": torch.zeros(1, 3)}, repeats=1) > 0


def test_no_timed_call_is_refused():
    with pytest.raises(UserError, match="A latency needs at least one timed call, not 0"):
        latency(nn.Identity(), torch.zeros(1), repeats=0)
