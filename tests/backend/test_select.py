"""Which backend the settings give, and what is said where there is none."""

import logging
import sys

import pytest
import torch

from llmopt.backend.reference import ReferenceBackend
from llmopt.backend.select import select_backend
from llmopt.errors import InputError, LlmoptError


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cuda(monkeypatch):
    """A machine that says it has CUDA; nothing is put there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine without the compiled module."""
    monkeypatch.setitem(sys.modules, "llmopt.kernels._cpu", None)
    monkeypatch.delitem(sys.modules, "llmopt.backend.cpu", raising=False)
    monkeypatch.delattr("llmopt.kernels._cpu", raising=False)


@pytest.fixture
def kernels():
    pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")


def test_auto_takes_the_compiled_kernels(no_cuda, kernels):
    backend = select_backend("auto", "auto", "auto", None)
    assert (backend.name, backend.device.type, backend.dtype) == ("cpu", "cpu", torch.float32)


def test_reference_is_reference(no_cuda):
    backend = select_backend("reference", "cpu", "bfloat16", None)
    assert (backend.name, backend.device.type, backend.dtype) == ("reference", "cpu", torch.bfloat16)


def test_without_the_module_auto_runs_on_plain_torch_and_says_so(no_cuda, no_kernels, caplog):
    with caplog.at_level(logging.WARNING):
        backend = select_backend("auto", "cpu", "auto", None)
    assert type(backend) is ReferenceBackend
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["running on plain torch"]


def test_without_the_module_cpu_says_how_to_get_it(no_cuda, no_kernels):
    with pytest.raises(LlmoptError, match=r"C\+\+ compiler"):
        select_backend("cpu", "cpu", "auto", None)


def test_float16_runs_on_plain_torch_and_says_so(no_cuda, caplog):
    with caplog.at_level(logging.WARNING):
        backend = select_backend("auto", "cpu", "float16", None)
    assert (type(backend), backend.dtype) == (ReferenceBackend, torch.float16)
    assert ["float16" in record.getMessage() for record in caplog.records] == [True]


def test_float16_is_refused_of_the_kernels(no_cuda):
    with pytest.raises(InputError, match="float32"):
        select_backend("cpu", "auto", "float16", None)


@pytest.mark.parametrize(("dtype", "name"), [("auto", "Rounded"), ("bfloat16", "Rounded"), ("float32", "Cpu")])
def test_the_dtype_says_whether_the_kernels_round_activations(no_cuda, dtype, name):
    pytest.importorskip("llmopt.kernels._cpu")
    assert type(select_backend("auto", "cpu", dtype, None)).__name__.startswith(name)


def test_cuda_without_cuda_is_refused(no_cuda):
    with pytest.raises(LlmoptError, match="CUDA"):
        select_backend("auto", "cuda", "auto", None)


def test_auto_takes_cuda_where_it_is(cuda):
    backend = select_backend("auto", "auto", "auto", None)
    assert (backend.name, backend.device.type, backend.dtype) == ("reference", "cuda", torch.bfloat16)


def test_cpu_asked_for_stays_on_the_cpu_where_cuda_is(cuda, kernels):
    assert select_backend("cpu", "auto", "auto", None).device.type == "cpu"


def test_cpu_on_cuda_is_refused(cuda):
    with pytest.raises(InputError, match="--device cpu"):
        select_backend("cpu", "cuda", "auto", None)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        (("gpu", "auto", "auto"), "auto, reference, cpu"),
        (("auto", "tpu", "auto"), "auto, cpu, cuda"),
        (("auto", "auto", "int8"), "auto, float32, bfloat16, float16"),
    ],
)
def test_unknown_values_are_refused_with_the_known_ones(settings, known):
    with pytest.raises(InputError, match=known):
        select_backend(*settings, None)


def test_threads_are_set_for_torch_too(no_cuda):
    before = torch.get_num_threads()
    try:
        select_backend("reference", "cpu", "auto", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
