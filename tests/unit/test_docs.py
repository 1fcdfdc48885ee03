"""What the documentation points at is there: links and their headings, and files named in docs, docstrings and comments."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "nodes", "svdq", "tests", "tools", "web/docs", "workflows")
READMES = ROOT / "README.md", ROOT / "README.zh.md"
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
KINDS = "*.py", "*.cu*", "*.[ch]pp"
TEXTS = sorted([*PAGES, *(path for folder in FOLDERS for kind in KINDS for path in (ROOT / folder).rglob(kind)),
                ROOT / ".ci" / "run", ROOT / ".ci" / "gpu"])
NAMED = re.compile(r"(?<![\w/])(?:docs|tests|tools)/[\w/*.-]*\.(?:py|md|jpg|json|cpp|hpp)\b")


def name(path):
    return str(path.relative_to(ROOT))


def anchors(page):
    """The names GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name(page)}: {target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {target}: headings are {sorted(anchors(file))}"


def test_the_chinese_readme_says_the_same():
    """It is shorter, but has every address, template and version of ComfyUI, and of each model its repository and template."""
    ours, theirs = (page.read_text(encoding="utf-8") for page in READMES)
    for what in (r"https?://[^\s)`，]+", r"\bsvdq-\d\d\b", r"\b0\.\d+\.\d+\b"):
        found = set(re.findall(what, ours))
        assert found and found <= set(re.findall(what, theirs)), found - set(re.findall(what, theirs))
    model = re.compile(r"^\| ([^|]+) \| (\[[\w.-]+\]\(\S+\)) \|.*\| (svdq-\d\d) \|$", re.M)
    assert len(model.findall(ours)) == 7 and model.findall(ours) == model.findall(theirs)


@pytest.mark.parametrize("page", sorted((ROOT / "web" / "docs").glob("*.md")), ids=name)
def test_tables_of_help_fit_their_panel(page):
    """It is narrow, and cuts what is wider: cells of a few words, and prose below the table."""
    rows = re.findall(r"^\|.*", page.read_text(encoding="utf-8"), re.M)
    assert rows and not [row for row in rows if len(row) > 50]


def test_files_that_are_named_exist():
    named = {(name(text), file) for text in TEXTS for file in NAMED.findall(text.read_text(encoding="utf-8"))}
    assert {("README.md", "tests/run.py"), ("svdq/format.py", "tests/unit/test_checkpoint.py")} <= named
    missing = [f"{where}: {file}" for where, file in sorted(named) if not any(ROOT.glob(file))]
    assert not missing, "\n".join(missing)


# row of ours in "Others' kernels" -> column of "Sums of INT4 in three forms", start of its kernels' names in the counts
FORMS = {"fp16": (1, "gemm_w4a4_normal_", "_fp16n"), "by tensor cores": (2, "gemm_w4a4_normal_", "_diag"),
         "fp32": (0, "gemm_w4a4_{bf16", "}")}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_said_of_a_form_is_what_is_counted(form):
    """Instructions per MMA and the most registers stand in three places of docs/kernels.md, two of them written by hand."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    column, start, end = FORMS[form]
    counted = [row for row in rows if row[0].startswith(start) and row[0].endswith(end) and "IMMA" in row[-2]]
    ours, = (row for row in rows if row[0].startswith("ours") and row[0].endswith(form) and row[1].startswith("sm_80"))
    said = {row[0]: row[1 + column] for row in rows if row[0].startswith(("instructions per IMMA", "registers, warps"))}
    per_mma, registers = counted[0][5].split()[0], [row[2].split()[0] for row in counted]
    assert {ours[2], said["instructions per IMMA.16864"]} == {per_mma}
    assert ours[3] == ", ".join(registers)
    assert said["registers, warps per multiprocessor"].split(",")[0] == max(registers)
