"""These tests run with `trimtab.as_peft` as the first import, in an environment that has no real peft.

They want a pytest of their own: `pytest tests/as_peft`.
"""

# isort: off
import trimtab.as_peft  # noqa: F401

# isort: on
import pytest

from tests.as_peft import tiny


@pytest.fixture
def llama():
    return tiny.llama()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()
