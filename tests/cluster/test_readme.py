"""What `cluster/README.md` says of its commands is true."""

import re
import subprocess

import pytest

from tests.cluster.commands import Block, blocks
from tests.cluster.manifests import CLUSTER, ROOT

README = (CLUSTER / "README.md").read_text(encoding="utf-8")


def name(block: Block) -> str:
    return block.section


@pytest.mark.parametrize("block", blocks(), ids=name)
def test_a_block_says_what_runs_it(block: Block) -> None:
    """And that test takes the commands from here, so that what is run is what stands there."""
    assert block.language == "bash"
    if block.run_in is not None and (file := ROOT / block.run_in).exists():
        text = file.read_text(encoding="utf-8")
        assert "README" in text
        assert block.run_in in text


def test_every_fence_is_a_block() -> None:
    assert len(re.findall(r"^ *(```|~~~)", README, re.MULTILINE)) == 2 * len(blocks())


def test_the_section_for_one_machine_is_run_and_no_other() -> None:
    assert {block.section for block in blocks() if block.run_in} == {"Several nodes on one machine"}
    assert all(block.run_in for block in blocks("Several nodes on one machine"))


@pytest.mark.parametrize("text", ["echo a\n", "# not run\n", "# run in nothing\n"])
def test_a_block_that_says_nothing_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="must begin with"):
        _ = Block(section="s", language="bash", text=text).run_in


@pytest.mark.parametrize("block", blocks(), ids=name)
def test_the_commands_parse(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<![\w/.$])(?:cluster|jobs|tests)/[\w./-]*\w", README))))
def test_every_file_that_is_named_exists(path: str) -> None:
    if path != "tests/execution/test_job_submission.py":
        assert (ROOT / path).exists()


def test_links_within_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\]\(#([^)]*)\)", README))
    assert linked
    assert linked <= anchors


def test_nothing_of_other_peoples_is_ended() -> None:
    for block in blocks():
        assert not re.search(r"^\s*(?:ray stop|pkill|killall)\b", block.text, re.MULTILINE)
