"""What every test runs under: offline, one thread, torch's state guarded.

With ``--check-types``, as `make test-all` has it, annotations and shapes are enforced as well. That
takes two to three times as long, so that the everyday tests do without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import beartype
import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# PEP 484: where float is asked for, an int will do.
_CHECKED = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_known: dict[tuple[Any, ...], Callable[..., Any]] = {}


def enforce(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the types and the shapes of a function's arguments and of its result.

    What arrives is an empty function of the same signature: for a closure, each time it is made. To
    make the same checks again and again took a third of the time of some tests.
    """
    name = function.__module__, function.__qualname__
    # As text, for the arguments of a ParamSpec have no hash.
    signature = (*name, function.__code__, str(function.__annotations__))
    if signature not in _known:
        _known[signature] = _CHECKED(function)
    return _known[signature]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-types", action="store_true", help="enforce sat_lens's annotations")


def pytest_configure(config: pytest.Config) -> None:
    """Install the hook before any test imports the library."""
    if config.getoption("--check-types"):
        jaxtyping.install_import_hook(["sat_lens", "paper"], f"{__name__}.enforce")


# `make test-all` asks for the thorough one.
settings.register_profile("everyday", derandomize=True, deadline=None, max_examples=10)
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("everyday")


@pytest.fixture
def types_unchecked() -> Iterator[None]:
    """Annotations off, as for users: bad input has to meet the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def demo() -> Any:
    import sat_lens as sl  # after the hook that checks it

    return sl.load_model("demo")


@pytest.fixture(autouse=True)
def torch_state_is_kept() -> Iterator[None]:
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    yield
    after = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    assert after == before, f"the test left torch at {after}, it was {before}"
