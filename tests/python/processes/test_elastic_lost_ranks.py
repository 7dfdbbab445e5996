"""A rank that does not come back ends elastic training, with an error that says why."""

from __future__ import annotations

import re
import signal
import time

import pytest

TRAINING = """
import torch
import horovod_cpp.torch as hvd
torch.set_num_threads(1)
hvd.init()
os.environ["HOROVOD_START_TIMEOUT"] = "3"  # from here on: at the start, one rank may take long to load torch
model = torch.nn.Linear(3, 1)
state = hvd.elastic.TorchState(
    model, torch.optim.SGD(model.parameters(), lr=0.1), sampler=hvd.elastic.ElasticSampler(range(1000)), step=0
)
attempts = []

@hvd.elastic.run
def train(state):
    attempts.append(1)
    while True:
        hvd.allreduce(torch.ones(10), name="gradient")
        state.sampler.record_batch(state.step, 1)
        state.step += 1
        if state.step == 5:
            state.commit()
            say("committed")
        if rank == 1 and state.step > 5:
            {end}

try:
    train(state)
except hvd.HorovodInternalError as error:
    say("error:", str(error).replace("\\n", " "))
    say("attempts", len(attempts), "step", state.step, "processed", state.sampler.processed_num)
    say("initialized", hvd.is_initialized())
"""


@pytest.mark.parametrize("end", ["time.sleep(600)", "return"])
def test_a_rank_that_does_not_come_back_is_named(start, end: str) -> None:
    """It is killed; or its training returns while that of the others goes on, and it ends."""
    job = start(3, TRAINING.format(end=end))
    job.wait_for_all("committed")
    if end != "return":
        job.send(1, signal.SIGKILL)
    began = time.monotonic()
    outputs = job.finish([0, 2])
    assert time.monotonic() - began < 30
    for rank, output in outputs.items():
        error = re.search(r"error: (.*)", output)
        assert error, output
        assert "the job could not be formed again: init() failed" in error[1]
        assert re.search(r"interrupted by HorovodInternalError: .*[Rr]ank 1\b", error[1]), f"rank {rank}: {error[1]}"
        assert "changes of membership are not supported yet" in error[1]
        assert "attempts 1 step 5 processed 15" in output, "it has gone back to the commit"
        assert "initialized False" in output
    assert re.search(r"init\(\) failed: .*rank 1 did not come in time", outputs[0])
