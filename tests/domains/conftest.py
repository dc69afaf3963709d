from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from duet_ray.config import StudyConfig, config_from
from tests.domains.domain_toys import CHATML, make_tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML)


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., StudyConfig]:
    """A function from domains and other sections to a study whose folder is `tmp_path`."""

    def make(*domains: dict[str, Any], **sections: Any) -> StudyConfig:
        data = {
            "name": "toy",
            "model": {"path": "none"},
            "domains": list(domains),
            "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
            **sections,
        }
        return config_from(data, folder=tmp_path)

    return make
