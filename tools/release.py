#!/usr/bin/env python3
"""What a release needs that only the owner of the repository knows, and whether all of it is there.

    python tools/release.py --check                     what is missing, a line each; exit code 0: nothing, 1: something
    python tools/release.py --check --tag v0.1.0        the same for this tag: version and date, too
    python tools/release.py --write --repository https://github.com/OWNER/NAME --publisher ID
    python tools/release.py --write --date 2026-12-31   the day of the release, in CHANGELOG.md and CITATION.cff
    python tools/release.py --notes                     what CHANGELOG.md says of the version, for the registry's page

Only Python 3.11 or newer is needed. The owner gives the repository's address and his publisher's name in ComfyUI's registry
(after the @ on registry.comfy.org); all that follows from them is written at once: addresses in pyproject.toml, those of icon
and banner on the branch main among them, in CITATION.cff, and in the pages that say <this repository>, each in its language.
The rules are those of docs.comfy.org/registry/specifications. docs/contributing.md, "Publish a version", has the steps around
this.
"""

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "<this repository>", "README.zh.md": "<本仓库>", "docs/contributing.md": "<this repository>"}
REPOSITORY = re.compile(r"https://github\.com/([\w-]+)/([\w.-]+?)")
SEMANTIC = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def addresses(repository):
    """{(section of pyproject.toml, key): value} that follow from the repository's address."""
    owner, name = REPOSITORY.fullmatch(repository).groups()
    pictures = f"https://raw.githubusercontent.com/{owner}/{name}/main/docs/pictures"
    return {("project.urls", "Repository"): repository,
            ("project.urls", "Documentation"): f"{repository}#readme",
            ("project.urls", "Bug Tracker"): f"{repository}/issues",
            ("project.urls", "Changelog"): f"{repository}/blob/main/CHANGELOG.md",
            ("tool.comfy", "Icon"): f"{pictures}/icon.png",
            ("tool.comfy", "Banner"): f"{pictures}/banner.png"}


# ---- check ----

def missing(root=ROOT, tag=None):
    """What is to be done before a release, one line each. tag: the release's, which must be the version's, with a date."""
    import tomllib

    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = settings["project"], settings["tool"]["comfy"]
    said, repository = [], project.get("urls", {}).get("Repository", "")
    if not comfy.get("PublisherId"):
        said.append("pyproject.toml: PublisherId is empty: --write --publisher ID, your publisher's name in ComfyUI's registry")
    if not repository:
        said.append("pyproject.toml: Repository is not there: --write --repository https://github.com/OWNER/NAME, which also "
                    "gives Documentation, Bug Tracker, Changelog, Icon and Banner")
    elif not REPOSITORY.fullmatch(repository):
        said.append(f"pyproject.toml: Repository is {repository!r}, which is no https://github.com/OWNER/NAME")
    else:
        for (section, key), value in addresses(repository).items():
            there = (comfy if section == "tool.comfy" else project["urls"]).get(key)
            if there != value:
                said.append(f"pyproject.toml: {key} is {there!r}, not {value!r}: --write --repository {repository}")
        if citation(root, "repository-code") != repository:
            said.append(f"CITATION.cff: repository-code is not {repository!r}: --write --repository {repository}")
        said += [f"{page}: says {place}: --write --repository {repository}" for page, place in PAGES.items()
                 if place in (root / page).read_text(encoding="utf-8")]
    version = project["version"]
    if not SEMANTIC.fullmatch(version):
        said.append(f"pyproject.toml: version is {version!r}, which is no X.Y.Z")
    newest, date, text = newest_changes(root)
    if newest != version:
        said.append(f"CHANGELOG.md: its first version is {newest}, that of pyproject.toml {version}")
    if not text:
        said.append(f"CHANGELOG.md: says nothing of {newest}")
    if citation(root, "version") != version:
        said.append(f"CITATION.cff: version is {citation(root, 'version')}, that of pyproject.toml {version}")
    if citation(root, "date-released") != date:
        said.append(f"CITATION.cff: date-released is {citation(root, 'date-released')}, that of CHANGELOG.md {date}")
    if tag is not None:
        if tag != f"v{version}":
            said.append(f"the tag is {tag}, the version of pyproject.toml {version}: the tag must be v{version}")
        if date is None:
            said.append(f"CHANGELOG.md: {newest} has no date: --write --date {datetime.date.today()}")
    return said


def newest_changes(root=ROOT):
    """(version, date or None, text) of the first version in CHANGELOG.md; (None, None, "") where it has none."""
    parts = re.split(r"^## \[([^\]]+)\] - (\S+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    if len(parts) < 4:
        return None, None, ""
    return parts[1], parts[2] if re.fullmatch(r"\d{4}-\d\d-\d\d", parts[2]) else None, parts[3].strip()


def citation(root, key):
    """The value of a key of CITATION.cff, or None."""
    found = re.search(rf'^{key}: "?([^"\n]+)"?$', (root / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    return found and found[1]


# ---- write ----

def write(root, repository=None, publisher=None, date=None):
    edit = Editor(root)
    if publisher:
        edit.toml("tool.comfy", "PublisherId", publisher)
    if repository:
        for (section, key), value in reversed(addresses(repository).items()):       # each comes first in its section
            edit.toml(section, key, value)
        edit.citation("repository-code", repository)
        for page, place in PAGES.items():
            edit.texts[page] = edit.text(page).replace(place, repository)
    if date:
        edit.texts["CHANGELOG.md"] = re.sub(r"^(## \[[^\]]+\] - )\S+$", rf"\g<1>{date}", edit.text("CHANGELOG.md"), count=1,
                                            flags=re.M)
        edit.citation("date-released", date)
    for name, text in edit.texts.items():
        (root / name).write_text(text, encoding="utf-8", newline="\n")
    return sorted(edit.texts)


class Editor:
    """Files as they will be: {name: text}."""

    def __init__(self, root):
        self.root, self.texts = root, {}

    def text(self, name):
        return self.texts.get(name) or (self.root / name).read_text(encoding="utf-8")

    def toml(self, section, key, value):
        """Set a key of a section that is there; a key that is not goes to the section's start."""
        name = key if re.fullmatch(r"[\w-]+", key) else f'"{key}"'
        head, title, rest = self.text("pyproject.toml").partition(f"\n[{section}]\n")
        body, bracket, tail = rest.partition("\n[")
        line = f'{name} = "{value}"'
        body, found = re.subn(rf"^{re.escape(name)} = .*$", lambda _: line, body, flags=re.M)
        self.texts["pyproject.toml"] = head + title + (body if found else f"{line}\n{body}") + bracket + tail

    def citation(self, key, value):
        """Set a key at the top of CITATION.cff, where one that is not there comes before its authors."""
        line, text = f'{key}: "{value}"', self.text("CITATION.cff")
        text, found = re.subn(rf"^{key}: .*$", lambda _: line, text, flags=re.M)
        self.texts["CITATION.cff"] = text if found else text.replace("\nauthors:\n", f"\n{line}\nauthors:\n", 1)


def valid(pattern, words):
    """An argument's type."""
    def check(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is no {words}")
        return text

    return check


def main(arguments=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    for name in ("--check", "--write", "--notes"):
        job.add_argument(name, action="store_true")
    parser.add_argument("--tag", metavar="vX.Y.Z")
    parser.add_argument("--repository", metavar="URL", type=valid(REPOSITORY, "https://github.com/OWNER/NAME"))
    parser.add_argument("--publisher", metavar="ID", type=valid(r"[A-Za-z0-9][\w-]*", "publisher's name"))
    parser.add_argument("--date", metavar="YYYY-MM-DD", type=valid(r"\d{4}-\d\d-\d\d", "YYYY-MM-DD"))
    options = parser.parse_args(arguments)
    if options.notes:
        print(newest_changes(root)[2])
        return 0
    if options.write:
        if not (options.repository or options.publisher or options.date):
            parser.error("--write: what? --repository, --publisher or --date")
        print("\n".join(write(root, options.repository, options.publisher, options.date)))
        return 0
    said = missing(root, options.tag)
    print("\n".join(said) or "all is there")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
