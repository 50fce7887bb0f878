"""What is asked of a graphics processor. Where there is none, most of it is rehearsed."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import make_model, relative, signal

from s4mini import train
from s4mini.kernel import backends, dplr_kernel
from s4mini.lowrank import half_spectrum, nplr
from s4mini.recipes import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# KeOps and Triton's interpreter take minutes where there is no GPU; test_kernel asks them less.
NAMES = ["tables", "cauchy"]
if DEVICE == "cuda":
    NAMES = [name for name, reason in backends().items() if not reason]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.mark.parametrize(("dtype", "tolerance"), [("complex128", 1e-11), ("complex64", 1e-5)])
@pytest.mark.parametrize("backend", NAMES)
def test_kernels_are_those_of_the_cpu(backend, dtype, tolerance):
    modes = half_spectrum(nplr("legs", 64))
    C = torch.view_as_complex(signal(3, 32, 2))
    system = [modes.Lambda, modes.P, modes.B, C]
    there = [t.detach().to(DEVICE, getattr(torch, dtype)).requires_grad_() for t in system]
    here = [t.detach().requires_grad_() for t in system]
    K, exact = dplr_kernel(*there, 0.01, 1000, backend), dplr_kernel(*here, 0.01, 1000, "tables")
    assert K.device.type == DEVICE and relative(K.cpu(), exact) < tolerance
    w = signal(3, 1000)
    got = torch.autograd.grad((K * w.to(K)).sum(), there)
    expected = torch.autograd.grad((exact * w).sum(), here)
    for a, b in zip(got, expected, strict=True):
        assert relative(a.cpu(), b) < 100 * tolerance


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"norm": "batch"}])
def test_a_network_is_that_of_the_cpu(options):
    model, u = make_model(**options), signal(3, 50, 2)
    exact = model(u)
    there = copy.deepcopy(model).to(DEVICE)
    assert relative(there(u.to(DEVICE)).cpu(), exact) < 1e-10
    if not options.get("bidirectional"):
        state = there.initial_state(3)
        for u_t in u.to(DEVICE).unbind(1):
            y, state = there.step(u_t, state)
        assert relative(y.cpu(), exact) < 1e-10


def test_narrow_numbers_outside_the_kernel():
    model, u = make_model().float().to(DEVICE), signal(3, 50, 2).float().to(DEVICE)
    exact = model(u)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert relative(model(u).float(), exact) < 0.05


@needs_gpu
def test_a_step_of_training_waits_for_nothing():
    model = make_model().float().to(DEVICE).train()
    u, y = signal(3, 50, 2).float().to(DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for mode in ("default", "default", "error"):  # what is made once may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.nn.functional.cross_entropy(model(u), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_run_by_ddp_on_one_device_is_a_plain_run(tmp_path):
    recipe = replace(RECIPES["digits"], epochs=1, epoch_size=200)
    plain = train.fit(recipe, tmp_path / "plain", progress="none")
    command = [sys.executable, "-m", "s4mini.cli", "fit", "digits", "--epochs=1"]
    command += ["--epoch-size=200", "--devices=1", "--strategy=ddp", "--progress=none"]
    subprocess.run([*command, f"--out={tmp_path / 'ddp'}"], check=True)
    found = json.loads((tmp_path / "ddp" / "result.json").read_text("utf8"))
    assert found["test_accuracy"] == pytest.approx(plain.test_accuracy, abs=0.02)
