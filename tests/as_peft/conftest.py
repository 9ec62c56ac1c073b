"""These tests run with `trimtab.as_peft` as the first import, in an environment that has no real peft: a pytest of their own."""

import trimtab.as_peft  # isort: skip

import pytest

from tests.as_peft import tiny


@pytest.fixture
def llama():
    return tiny.llama()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()
