"""A release: its metadata is complete but for what only the owner knows, which is said, and the forms of GitHub are valid."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svdq_pack.tools import release

ROOT = Path(__file__).resolve().parents[2]
FILES = "pyproject.toml", "CITATION.cff", "CHANGELOG.md", *release.PAGES
REPOSITORY, PUBLISHER, DATE = "https://github.com/some-one/ComfyUI-SVDQ", "some-one", "2026-12-31"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PUBLISH = ROOT / ".github" / "workflows" / "publish.yml"


@pytest.fixture
def root(tmp_path):
    """The files of a release, as they are here."""
    pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def filled(root):
    """The same with what the owner knows."""
    release.write(root, REPOSITORY, PUBLISHER, DATE)
    return root


@pytest.fixture
def settings(filled):
    import tomllib
    return tomllib.loads((filled / "pyproject.toml").read_text(encoding="utf-8"))


def change(root, name, old, new):
    text = (root / name).read_text(encoding="utf-8")
    changed = re.sub(old, new, text, count=1, flags=re.M)
    assert changed != text
    (root / name).write_text(changed, encoding="utf-8")


# ---- what is missing ----

def test_nothing_is_missing_but_what_the_owner_knows(root):
    said = release.missing(root)
    owners = [line for line in said if re.match("pyproject.toml: (PublisherId is empty|Repository is not there)", line)]
    assert said == owners
    if said:
        pytest.skip("before it is published, the repository's owner runs tools/release.py (docs/contributing.md)")


def test_all_is_there_once_the_owner_has_said_it(filled, capsys):
    assert release.missing(filled, "v0.1.0") == []
    assert release.main(["--check", "--tag", "v0.1.0"], filled) == 0 and capsys.readouterr().out == "all is there\n"
    before = {name: (filled / name).read_bytes() for name in FILES}
    release.write(filled, REPOSITORY, PUBLISHER, DATE)                  # again
    assert {name: (filled / name).read_bytes() for name in FILES} == before


def test_no_page_keeps_a_place_for_the_address(filled):
    """Of any page for people: an address that is to be filled in stands in <>, in whatever language."""
    places = {page.name: re.findall(r"git clone[^<\n]*(<[^>]+>)", page.read_text(encoding="utf-8"))
              for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
    assert {name for name, found in places.items() if found} <= {Path(page).name for page in release.PAGES}
    assert all("git clone <" not in (filled / page).read_text(encoding="utf-8") for page in release.PAGES)


def test_another_repository_takes_the_place_of_the_first(filled):
    release.write(filled, "https://github.com/other/svdq", "other")
    assert release.missing(filled, "v0.1.0") == []
    assert "some-one" not in "".join((filled / name).read_text(encoding="utf-8") for name in FILES[:3])


@pytest.mark.parametrize("name, old, new, said", [
    ("pyproject.toml", "^PublisherId = .*", 'PublisherId = ""', "PublisherId is empty"),
    ("pyproject.toml", "^Repository = .*\n", "", "Repository is not there"),
    ("pyproject.toml", "^Repository = .*", 'Repository = "https://example.org/x"', "no https://github.com/OWNER/NAME"),
    ("pyproject.toml", "main/docs/pictures/icon.png", "main/icon.png", "Icon is '.*main/icon.png', not '.*pictures/icon.png'"),
    ("pyproject.toml", "^Banner = .*\n", "", "Banner is None"),
    ("pyproject.toml", '^"Bug Tracker" = .*\n', "", "Bug Tracker is None"),
    ("pyproject.toml", "^version = .*", 'version = "0.1"', "version is '0.1', which is no X.Y.Z"),
    ("pyproject.toml", "^version = .*", 'version = "0.2.0"', "CHANGELOG.md: its first version is 0.1.0"),
    ("CITATION.cff", "^version: .*", 'version: "0.2.0"', "CITATION.cff: version is 0.2.0"),
    ("CITATION.cff", "^repository-code: .*\n", "", "CITATION.cff: repository-code"),
    ("CITATION.cff", "^date-released: .*", 'date-released: "2026-01-01"', "CITATION.cff: date-released is 2026-01-01"),
    ("CHANGELOG.md", r"^## \[0.1.0\].*", "## [0.1.0] - soon", "CHANGELOG.md: 0.1.0 has no date"),
    ("CHANGELOG.md", r"(^## \[0.1.0\].*\n)(.|\n)*", r"\1", "CHANGELOG.md: says nothing of 0.1.0"),
    ("CHANGELOG.md", r"^## \[0.1.0\].*", "## 0.1.0", "CHANGELOG.md: its first version is None"),
    ("README.md", re.escape(REPOSITORY), "<this repository>", "README.md: says <this repository>"),
    ("README.zh.md", re.escape(REPOSITORY), "<本仓库>", "README.zh.md: says <本仓库>")])
def test_what_is_missing_is_named(filled, capsys, name, old, new, said):
    change(filled, name, old, new)
    assert release.main(["--check", "--tag", "v0.1.0"], filled) == 1
    assert re.search(said, capsys.readouterr().out)


def test_a_tag_is_the_version(filled):
    said = "the tag is v0.1.1, the version of pyproject.toml 0.1.0: the tag must be v0.1.0"
    assert release.missing(filled, "v0.1.1") == [said]
    assert len(release.missing(filled, "0.1.0")) == 1


@pytest.mark.parametrize("arguments", [
    ("--repository", "https://example.org/a/b"), ("--repository", "https://github.com/a"), ("--publisher", 'a"b'),
    ("--publisher", ""), ("--date", "today"), ()])
def test_bad_arguments(root, arguments, capsys):
    before = (root / "pyproject.toml").read_bytes()
    with pytest.raises(SystemExit) as ended:
        release.main(["--write", *arguments], root)
    assert ended.value.code == 2 and (root / "pyproject.toml").read_bytes() == before


def test_notes_are_those_of_the_version(filled, capsys):
    """Up to the version before."""
    change(filled, "CHANGELOG.md", r"\Z", "\n## [0.0.1] - 2026-01-01\n\nthe first\n")
    assert release.main(["--notes"], filled) == 0
    said = capsys.readouterr().out
    assert "### Added" in said and "the first" not in said and "## [" not in said


# ---- the registry's rules, docs.comfy.org/registry/specifications ----

def test_project(settings):
    project, name = settings["project"], settings["project"]["name"]
    assert re.fullmatch(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*", name) and len(name) < 100 and "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and 20 < len(project["description"]) < 200
    assert project["license"] == "Apache-2.0" and (ROOT / "LICENSE").is_file()
    assert re.fullmatch(r">=3\.\d+", project["requires-python"])
    assert project["urls"].keys() == {"Repository", "Documentation", "Bug Tracker", "Changelog", "Paper"}
    assert all(url.startswith("https://") for url in project["urls"].values())
    allowed = r"Environment :: GPU :: NVIDIA CUDA|Operating System :: (POSIX :: Linux|Microsoft :: Windows|MacOS)"
    assert project["classifiers"] and all(re.fullmatch(allowed, classifier) for classifier in project["classifiers"])


def test_comfy(settings):
    comfy = settings["tool"]["comfy"]
    assert comfy.keys() == {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    assert comfy["PublisherId"] == PUBLISHER and re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert f"ComfyUI {comfy['requires-comfyui'][2:]} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    for key in ("Icon", "Banner"):
        start, _, path = comfy[key].partition("/main/")
        assert start == "https://raw.githubusercontent.com/some-one/ComfyUI-SVDQ" and (ROOT / path).is_file()


# ---- GitHub's files, and CITATION.cff ----

def checked(kind, file):
    """(exit code, what it says) of the file's published schema."""
    pytest.importorskip("check_jsonschema", reason="no check-jsonschema")
    done = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{kind}", "--force-filetype",
                           "yaml", str(file)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


KINDS = [(file, "github-issue-config" if file.stem == "config" else "github-issue-forms") for file in FORMS] + [
    (PUBLISH, "github-workflows"), (ROOT / "CITATION.cff", "citation-file-format")]


@pytest.mark.parametrize("file, kind", KINDS, ids=lambda value: getattr(value, "name", ""))
def test_schemas(file, kind):
    code, said = checked(kind, file)
    assert code == 0, said


@pytest.mark.parametrize("name, kind, old, new", [
    ("bug.yml", "github-issue-forms", "label: What", "lable: What"), ("config.yml", "github-issue-config", "about:", "abuot:"),
    ("publish.yml", "github-workflows", "runs-on:", "run-on:"),
    ("CITATION.cff", "citation-file-format", "type: software", "type: x"),
    ("CITATION.cff", "citation-file-format", "cff-version: 1.2.0", "cff-version: 1")])
def test_schemas_see_what_is_wrong(tmp_path, name, kind, old, new):
    """Each with a word misspelt."""
    file, = (file for file, _ in KINDS if file.name == name)
    (tmp_path / name).write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert checked(kind, tmp_path / name)[0] == 1


def test_the_citation_of_a_release(filled):
    code, said = checked("citation-file-format", filled / "CITATION.cff")
    assert code == 0, said


def test_forms_ask_for_the_doctor():
    yaml = pytest.importorskip("yaml")
    assert {file.stem for file in FORMS} == {"bug", "card", "config"}
    for file in FORMS:
        if file.stem != "config":
            fields = {field.get("id"): field for field in yaml.safe_load(file.read_text(encoding="utf-8"))["body"]}
            assert "svdq doctor --json" in fields["doctor"]["attributes"]["label"]
            assert fields["doctor"]["validations"]["required"]


def test_a_tag_publishes_after_the_check():
    """By the registry's own action, with the secret that the registry's documents name."""
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load(PUBLISH.read_text(encoding="utf-8"))
    assert action[True] == {"push": {"tags": ["v*"]}}               # YAML 1.1 reads `on` as true
    steps = action["jobs"]["publish"]["steps"]
    *before, last = steps
    assert last["uses"].startswith("Comfy-Org/publish-node-action@")
    assert last["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}
    commands = [step["run"] for step in before if "run" in step]
    assert commands[0] == 'python tools/release.py --check --tag "$GITHUB_REF_NAME"' and "--notes" in commands[1]
    assert "${{" not in "".join(commands)                           # a tag's name is no part of a script
