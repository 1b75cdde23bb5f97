"""The documentation: every Python block runs by itself; links, named files and messages exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README, README_ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"
WITH_CODE = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WITH_CODE, README_ZH, ROOT / "CHANGELOG.md"]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# Words of blocks that need a package which may not be installed.
_OPTIONAL = {
    "transformers": "transformers",
    "Trainer": "accelerate",
    "peft": "peft",
    "plot_expert_load": "matplotlib",
    "BitsAndBytesConfig": "bitsandbytes",
    "trl": "trl",
    "torchao": "torchao",
}
_NAMED_FILE = re.compile(r"`((?:csrc|omni_moe|benchmarks|examples|tests)/[\w./]+\.\w+)`")


def _blocks() -> list:
    blocks = []
    for page in WITH_CODE:
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


def test_chinese_readme_has_the_same_code():
    """So that running the blocks of README.md is enough."""
    assert _FENCED.findall(README_ZH.read_text()) == _FENCED.findall(README.read_text())


def _anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(_FENCED.sub("", page.read_text()))
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = _FENCED.sub("", page.read_text())
    links = [(page.parent / path if path else page, anchor) for path, anchor in _LINK.findall(text)]
    files = [target for target, _ in links] + [ROOT / name for name in _NAMED_FILE.findall(text)]
    missing = [target for target in files if not target.exists()]
    assert not missing, f"{page.name} names {', '.join(map(str, missing))}"
    for target, anchor in links:
        assert not anchor or anchor in _anchors(target), f"no heading #{anchor} in {target.name}"


# ---- troubleshooting -----------------------------------------------------------------------------


def _source_text() -> str:
    """All messages of the library and its build, each string in one piece."""
    files = [ROOT / "Makefile", *(ROOT / "cmake").glob("*.cmake")]
    files += [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]
    files += (ROOT / "omni_moe").rglob("*.py")
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    source = _source_text()
    for message in messages:
        for part in message.split("…"):  # between the values
            assert part.strip() in source, message
