"""The documentation: every Python block runs by itself, and every link and named file exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
# Words of blocks that need a package which may not be installed.
_OPTIONAL = {
    "transformers": "transformers",
    "Trainer": "accelerate",
    "peft": "peft",
    "plot_expert_load": "matplotlib",
}
_NAMED_FILE = re.compile(r"`((?:csrc|omni_moe|benchmarks|examples|tests)/[\w./]+\.\w+)`")


def _blocks() -> list:
    blocks = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 2  # of the block's first line
            blocks.append(pytest.param(page, line, match.group(1), id=f"{page.name}:{line}"))
    return blocks


@pytest.mark.parametrize(("page", "line", "code"), _blocks())
def test_python_blocks_run(page, line, code, tmp_path, monkeypatch):
    for word, package in _OPTIONAL.items():
        if word in code:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # for what they write
    torch.manual_seed(0)
    # Line numbers of errors are those of the page.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    targets = [page.parent / target for target in _LINK.findall(text)]
    targets += [ROOT / name for name in _NAMED_FILE.findall(text)]
    missing = [target for target in targets if not target.exists()]
    assert not missing, f"{page.name} names {', '.join(map(str, missing))}"
