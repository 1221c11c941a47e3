"""The documentation's code runs, and prints what the pages say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("page.py")
DURABLY = Path(sys.executable).with_name("durably")

PROSE = {"architecture.md", "index.md", "operations.md", "parity.md", "rules.md", "faults.md"}
"""Pages without code."""
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in PROSE)]
AT_ONCE = 3
PYTHON = re.compile(r"^```python\b.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DURABLY_")}


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RUNNER, page, folder],
        env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """All pages, as they end; a few run at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {page: pool.submit(run_page, page, tmp_path_factory.mktemp(page.stem)) for page in PAGES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_does_what_it_says(
    page: Path, ended: dict[Path, Future[subprocess.CompletedProcess[str]]]
) -> None:
    result = ended[page].result()
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", sorted(PROSE))
def test_a_page_that_is_prose_has_no_code(name: str) -> None:
    assert not PYTHON.search((ROOT / "docs" / name).read_text())


@pytest.mark.parametrize("mark", ["#>", "# >"])  # the formatter writes the second
def test_a_page_whose_output_is_another_fails(tmp_path: Path, mark: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nprint(1 + 1)\n{mark} 3\n```\n")
    result = run_page(page, tmp_path)
    assert "line 2: printed ['2'], and the page says ['3']" in result.stderr
    assert result.returncode == 1


def test_the_readme_can_be_followed_to_the_letter(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    program = PYTHON.search(readme)
    assert program is not None
    (tmp_path / "shop.py").write_text(program[1])
    with (tmp_path / "log").open("wb") as log:
        dev = subprocess.Popen(
            [DURABLY, "dev", "shop.py"], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while "ready: " not in (said := (tmp_path / "log").read_text()):
            assert dev.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        shop = subprocess.run(
            [sys.executable, "shop.py"],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        dev.terminate()
        dev.wait(30)
    assert shop.returncode == 0, shop.stderr
    assert shop.stdout.startswith("{'receipts': ['receipt-7-")


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.stem
)  # fmt: skip
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked to by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
