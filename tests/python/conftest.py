"""Settings shared by all tests."""

import os

# Threads sleep while they wait for each other: spinning costs tenfold where cores are shared. Read
# when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Deterministic mode on a GPU wants a fixed cuBLAS workspace; read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "omni_moe", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("omni_moe")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "packaging: builds and installs a wheel (minutes)")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def deterministic_memory():
    """torch.empty is filled with NaN (floating point) or the largest value (integers)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def examples() -> list[dict]:
    """Each token is the one before it plus 1."""
    rows = 3 + (torch.arange(16).unsqueeze(1) + torch.arange(12)) % 32
    return [{"input_ids": row, "labels": row} for row in rows]
