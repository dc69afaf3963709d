"""The blocks of commands in `cluster/README.md`; each says in its first line which test runs it, or that none does."""

import re
from dataclasses import dataclass

from tests.cluster.manifests import CLUSTER

NOT_RUN = "# not run here"
_RUN = re.compile(r"# run in (tests/\S+\.py)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    section: str
    language: str
    text: str

    @property
    def run_in(self) -> str | None:
        """The test file that runs it; None: no test does.

        Raises:
            ValueError: the first line says neither.
        """
        first = self.text.splitlines()[0]
        if first == NOT_RUN:
            return None
        if (match := _RUN.fullmatch(first)) is None:
            raise ValueError(f"section {self.section!r}: a block must begin with {NOT_RUN!r} or '# run in <test file>'")
        return match[1]


def blocks(section: str | None = None) -> list[Block]:
    """All blocks in the order of the file, or those of one section by its heading."""
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    sections = [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]
    return [
        Block(section=heading, language=language, text=body)
        for heading, content in sections
        for language, body in _FENCE.findall(content)
        if section is None or heading == section
    ]
